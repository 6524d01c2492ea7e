/* The TC programs. The suffix _l3 is for interfaces without Ethernet header (tun, ppp); those are compiled on demand, with
 * -DL3.
 */

#ifdef L3
int masq_wan_out_l3(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now() };

	trace_begin(&p);
	return trace_end(&p, TRACE_WAN_OUT, slow_outbound(&p));
}

int masq_wan_in_l3(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now() };

	trace_begin(&p);
	return trace_end(&p, TRACE_WAN_IN, slow_inbound(&p));
}

int masq_lan_in_l3(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now() };

	trace_begin(&p);
	return trace_end(&p, TRACE_LAN_IN, slow_lan(&p, true));
}

int masq_lan_lean_l3(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now() };

	trace_begin(&p);
	return trace_end(&p, TRACE_LAN_IN, slow_lan(&p, false));
}

int masq_lan_out_l3(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now() };

	trace_begin(&p);
	return trace_end(&p, TRACE_LAN_OUT, slow_lan_out(&p));
}
#else
int masq_wan_out(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };

	trace_begin(&p);
	return trace_end(&p, TRACE_WAN_OUT, slow_outbound(&p));
}

int masq_wan_in(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };

	trace_begin(&p);
	return trace_end(&p, TRACE_WAN_IN, slow_inbound(&p));
}

int masq_lan_in(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };

	trace_begin(&p);
	return trace_end(&p, TRACE_LAN_IN, slow_lan(&p, true));
}

int masq_lan_lean(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };

	trace_begin(&p);
	return trace_end(&p, TRACE_LAN_IN, slow_lan(&p, false));
}

int masq_lan_out(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };

	trace_begin(&p);
	return trace_end(&p, TRACE_LAN_OUT, slow_lan_out(&p));
}

int masq_lo_out(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };

	trace_begin(&p);
	return trace_end(&p, TRACE_LO_OUT, slow_loopback(&p));
}

int masq_punt_in(struct __sk_buff *skb)
{
	return tc_verdict(punt_back(skb));
}
#endif
