/* Arming: copying into a flow what the kernel just decided for a packet of it, so that XDP can repeat it. Runs at
 * the egress hooks, where the packet has been routed, filtered by nftables, and given its neighbour's MAC.
 */
struct ethernet_header {
	u16 dst[3];
	u16 src[3];
	__be16 proto;
};

/* The MTU the kernel would hold this packet to: the route's when our lookup finds the route taken, else the device's
 * (policy routing by mark cannot be repeated from here).
 */
static __always_inline u32 route_mtu(const struct packet *p, addr_t dst, u32 device_mtu)
{
	struct bpf_fib_lookup fib = {
		.family = AF_INET,
		.ifindex = p->skb->ingress_ifindex,
		.ipv4_src = p->src.word[0],
		.ipv4_dst = dst.word[0],
		.tot_len = 1, /* asks for the MTU in mtu_result, which shares its place */
	};
	u32 mtu;

	if (bpf_fib_lookup(p->skb, &fib, sizeof(fib), 0) || fib.ifindex != p->skb->ifindex)
		return device_mtu;
	mtu = fib.tot_len;
	return mtu && mtu < device_mtu ? mtu : device_mtu;
}

/* @old is the endpoint that the flow's new one replaces, @dst the address the kernel routed by. */
static __always_inline void flow_arm(const struct settings *cfg, const struct packet *p, struct flow *flow,
				     addr_t old_addr, __be16 old_port, addr_t dst)
{
	struct interface *from = interface_at(p->skb->ingress_ifindex), *to = interface_at(p->skb->ifindex);
	u32 l3_delta = csum_delta_addr(old_addr, flow->new_addr);
	struct ethernet_header eth;

	if (!from || !to || !(from->xdp & XDP_FROM) || !(to->xdp & XDP_TO) || p->l3 != sizeof(eth))
		return;
	if (p->class == CLASS_ICMP || p->options || p->more_fragments)
		return;
	if (bpf_skb_load_bytes(p->skb, 0, &eth, sizeof(eth)))
		return;
	flow->mtu = route_mtu(p, dst, to->mtu);
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
