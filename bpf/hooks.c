/* The TC programs, each as a function of its own. The suffix _l3 is for interfaces without Ethernet header (tun, ppp). */
#define WITH_ETHERNET sizeof(struct ethernet_header)
#define WITHOUT_ETHERNET 0

static __always_inline int wan_out(struct __sk_buff *skb, u32 l3)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = l3 };

	trace_begin(&p);
	return trace_end(&p, TRACE_WAN_OUT, slow_outbound(&p));
}

static __always_inline int wan_in(struct __sk_buff *skb, u32 l3)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = l3 };

	trace_begin(&p);
	return trace_end(&p, TRACE_WAN_IN, slow_inbound(&p));
}

/* @whole: with redirects, too. */
static __always_inline int lan_in(struct __sk_buff *skb, u32 l3, bool whole)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = l3 };

	trace_begin(&p);
	return trace_end(&p, TRACE_LAN_IN, slow_lan(&p, whole));
}

static __always_inline int lan_out(struct __sk_buff *skb, u32 l3)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = l3 };

	trace_begin(&p);
	return trace_end(&p, TRACE_LAN_OUT, slow_lan_out(&p));
}

int masq_wan_out(struct __sk_buff *skb)
{
	return wan_out(skb, WITH_ETHERNET);
}

int masq_wan_in(struct __sk_buff *skb)
{
	return wan_in(skb, WITH_ETHERNET);
}

int masq_lan_in(struct __sk_buff *skb)
{
	return lan_in(skb, WITH_ETHERNET, true);
}

int masq_lan_lean(struct __sk_buff *skb)
{
	return lan_in(skb, WITH_ETHERNET, false);
}

int masq_lan_out(struct __sk_buff *skb)
{
	return lan_out(skb, WITH_ETHERNET);
}

int masq_lo_out(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = WITH_ETHERNET };

	trace_begin(&p);
	return trace_end(&p, TRACE_LO_OUT, slow_loopback(&p));
}

int masq_punt_in(struct __sk_buff *skb)
{
	return tc_verdict(punt_back(skb));
}

int masq_wan_out_l3(struct __sk_buff *skb)
{
	return wan_out(skb, WITHOUT_ETHERNET);
}

int masq_wan_in_l3(struct __sk_buff *skb)
{
	return wan_in(skb, WITHOUT_ETHERNET);
}

int masq_lan_in_l3(struct __sk_buff *skb)
{
	return lan_in(skb, WITHOUT_ETHERNET, true);
}

int masq_lan_lean_l3(struct __sk_buff *skb)
{
	return lan_in(skb, WITHOUT_ETHERNET, false);
}

int masq_lan_out_l3(struct __sk_buff *skb)
{
	return lan_out(skb, WITHOUT_ETHERNET);
}
