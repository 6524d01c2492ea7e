/* Arming: copying into a flow what the kernel just decided for a packet of it, so that XDP can repeat it. Runs at
 * the egress hooks, where the packet has been routed, filtered by nftables, and given its neighbour's MAC.
 */
struct ethernet_header {
	u16 dst[3];
	u16 src[3];
	__be16 proto;
};

#define LONGEST_LEAST 576 /* RFC 791: every IPv4 host takes this much; saves the short packets of a flow a second look */

/* How long a packet the kernel has just let pass, in bytes of IP. That, and no MTU, is what XDP holds a flow to: route
 * MTUs, locked or not, and policy routing are the kernel's to know (bpf_fib_lookup tells only of locked ones). Of a
 * super-packet it is what one segment has at least.
 */
static __always_inline u32 packet_longest(const struct packet *p)
{
	u32 segment = p->skb->gso_size ? sizeof(struct udp_header) + p->skb->gso_size : p->l4_len;
	u32 length = p->l4 - p->l3 + segment;

	return length > LONGEST_LEAST ? length : LONGEST_LEAST;
}

/* @old is the endpoint that the flow's new one replaces. */
static __always_inline void flow_arm(const struct settings *cfg, const struct packet *p, struct flow *flow,
				     addr_t old_addr, __be16 old_port)
{
	struct interface *from = interface_at(p->skb->ingress_ifindex), *to = interface_at(p->skb->ifindex);
	u32 l3_delta = csum_delta_addr(old_addr, flow->new_addr);
	u32 longest = packet_longest(p);
	struct ethernet_header eth;

	if (!from || !to || !(from->xdp & XDP_FROM) || !(to->xdp & XDP_TO) || p->l3 != sizeof(eth))
		return;
	if (p->class == CLASS_ICMP || p->options || p->more_fragments)
		return;
	if (bpf_skb_load_bytes(p->skb, 0, &eth, sizeof(eth)))
		return;
	if (longest > flow->longest || !flow_is_armed(cfg, flow, p->now))
		flow->longest = longest < to->mtu ? longest : to->mtu;
	flow->egress = p->skb->ifindex;
	__builtin_memcpy(flow->next_hop, eth.dst, sizeof(eth.dst));
	flow->l3_delta = l3_delta;
	flow->l4_delta = csum_fold16(l3_delta + csum_delta_port(old_port, flow->new_port));
	flow->armed_at = p->now;
}

static __always_inline bool session_may_fly(const struct settings *cfg, const struct session *s)
{
	return cfg->accelerate && (slot_class(s->mapping) != CLASS_TCP || tcp_is_established(s));
}
