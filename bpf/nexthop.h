/* The way out. Arming: copying into a flow what the kernel just decided for a packet of it, so that XDP can repeat it. Runs at
 * the egress hooks, where the packet has been routed, filtered by nftables, and given its neighbour's MAC.
 */
struct ethernet_header {
	u16 dst[3];
	u16 src[3];
	__be16 proto;
};

#define LONGEST_LEAST 576 /* RFC 791: every IPv4 host takes this much; saves the short packets of a flow a second look */

/* In bytes of IP; of a super-packet, that of one segment. */
static __always_inline u32 packet_length(const struct packet *p)
{
	u32 header = p->class == CLASS_TCP ? p->payload - p->l4 : sizeof(struct udp_header);

	return p->l4 - p->l3 + (p->skb->gso_size ? header + p->skb->gso_size : p->l4_len);
}

/* How long a packet the kernel has just let pass. That, and no MTU, is what XDP holds a flow to: route MTUs, locked or not,
 * and policy routing are the kernel's to know (bpf_fib_lookup tells only of locked ones).
 */
static __always_inline u32 packet_longest(const struct packet *p)
{
	u32 length = packet_length(p);

	return length > LONGEST_LEAST ? length : LONGEST_LEAST;
}

static __always_inline void flow_arm(const struct settings *cfg, const struct packet *p, struct flow *flow)
{
	struct interface *from = interface_at(p->skb->ingress_ifindex), *to = interface_at(p->skb->ifindex);
	u32 longest = packet_longest(p);
	struct ethernet_header eth;

	if (trace_keeps_off(p))
		return;
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
	flow->armed_at = p->now;
}

static __always_inline bool session_may_fly(const struct settings *cfg, const struct session *s)
{
	return cfg->accelerate && !(s->out.marks & SESSION_ALG) &&
	       (slot_class(s->mapping) != CLASS_TCP || tcp_is_established(s));
}

/* Where the kernel would send a packet to @dst: an interface index, 0 when nowhere. */
static __always_inline u32 route_to(const struct packet *p, addr_t dst)
{
	struct bpf_fib_lookup way = { .family = ADDR_FAMILY, .ipv4_dst = dst.word[0], .ifindex = p->skb->ifindex };
	long result = bpf_fib_lookup(p->skb, &way, sizeof(way), 0);

	return result == BPF_FIB_LKUP_RET_SUCCESS || result == BPF_FIB_LKUP_RET_NO_NEIGH ? way.ifindex : 0;
}

#define NO_SUCH_DEVICE (-19) /* ENODEV */

/* bpf_check_mtu is the cheapest helper that knows. */
static __always_inline bool device_is_there(const struct packet *p, u32 ifindex)
{
	u64 mtu = 0; /* as keys are, see maps.h */

	return bpf_check_mtu(p->skb, ifindex, (u32 *)&mtu, 0, 0) != NO_SUCH_DEVICE;
}

/* bcc declares this helper with an argument too few. */
static long (*redirect_neigh)(u32 ifindex, void *params, int length, u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/* A hairpinned packet is turned round by way of the WAN's ingress hook. Until then its mark, which is nobody else's
 * before it has passed netfilter, tells so, of which WAN it is a matter, and by which interface it came.
 */
#define HAIRPIN_MARK 0x4d500000
#define HAIRPIN_MARKED 0xfff00000
#define HAIRPIN_WAN_AT 16
#define HAIRPIN_WAN 0xf
#define HAIRPIN_CAME_BY 0xffff
#define HAIRPIN_OWN 0xffff /* in place of an interface: the answer to a packet of the gateway's own */

static __always_inline bool hairpin_is_marked(const struct __sk_buff *skb)
{
	return (skb->mark & HAIRPIN_MARKED) == HAIRPIN_MARK;
}

static __always_inline u32 hairpin_came_by(const struct packet *p)
{
	return p->skb->mark & HAIRPIN_CAME_BY;
}

static __always_inline u32 hairpin_wan(const struct packet *p)
{
	return p->skb->mark >> HAIRPIN_WAN_AT & HAIRPIN_WAN;
}

/* Redirects take packets with an Ethernet header; one where there is none yet. */
static __always_inline bool ethernet_put(const struct packet *p)
{
	struct ethernet_header eth = { .proto = bpf_htons(ETH_P_IP) };

	return p->l3 || !(bpf_skb_change_head(p->skb, sizeof(eth), 0) ||
			  bpf_skb_store_bytes(p->skb, 0, &eth, sizeof(eth), 0));
}

/* To one of the WAN's hooks, with what they need to know. */
static __always_inline enum verdict hairpin_redirect(const struct settings *cfg, const struct packet *p, u32 mark, u64 hook)
{
	if (!ethernet_put(p))
		return drop(COUNT_drop_rewrite);
	p->skb->mark = mark;
	return bpf_redirect(cfg->wan, hook) == TC_ACT_REDIRECT ? REDIRECT : drop(COUNT_drop_hairpin_route);
}

/* From the LAN to the WAN's egress hook. @inside: on to another host, else to the gateway itself. */
static __always_inline enum verdict hairpin_go_out(const struct settings *cfg, const struct packet *p, bool inside)
{
	u32 came_by = inside ? p->skb->ifindex & HAIRPIN_CAME_BY : HAIRPIN_OWN;

	return hairpin_redirect(cfg, p, HAIRPIN_MARK | (p->wan & HAIRPIN_WAN) << HAIRPIN_WAN_AT | came_by, 0);
}

/* From lo to the WAN's ingress hook: what the gateway asks needs no translation on its way out. */
static __always_inline enum verdict hairpin_come_in(const struct settings *cfg, const struct packet *p)
{
	return hairpin_redirect(cfg, p, HAIRPIN_MARK | LOOPBACK, BPF_F_INGRESS);
}

static __always_inline enum verdict hairpin_done(const struct packet *p, enum counter kind)
{
	carry(kind, 0, packet_bytes(p));
	return REDIRECT;
}

/* Forwards a hairpinned packet, translated by now, to its LAN: what the kernel does with all others. */
static __always_inline enum verdict hairpin_send(const struct packet *p)
{
	bool own = hairpin_came_by(p) == LOOPBACK;
	struct ip_header *ip;
	struct interface *to;
	u32 ifindex;
	addr_t dst;

	if (bpf_skb_load_bytes(p->skb, p->l3 + offsetof(struct ip_header, dst), &dst, sizeof(dst)))
		return drop(COUNT_drop_rewrite);
	ifindex = route_to(p, dst);
	to = interface_at(ifindex);
	ip = packet_at(p, p->l3, sizeof(*ip));
	if (!ip || !to || to->role != ROLE_LAN)
		return drop(COUNT_drop_hairpin_route);
	if (ip->ttl <= 1)
		return drop(COUNT_drop_ttl);
	ip->ttl--;
	ip->check = csum_apply(ip->check, CSUM_DELTA_TTL);
	p->skb->mark = 0;
	if (!ethernet_put(p) || redirect_neigh(ifindex, NULL, 0, 0) != TC_ACT_REDIRECT)
		return drop(COUNT_drop_hairpin_route);
	return hairpin_done(p, own ? COUNT_slow_hairpin_own : COUNT_slow_hairpin);
}

/* Up the gateway's own stack, by the way on which its packet to itself came. */
static __always_inline enum verdict loopback_send(const struct packet *p)
{
	struct ethernet_header eth = { .proto = bpf_htons(ETH_P_IP) };

	if ((!p->l3 && bpf_skb_change_head(p->skb, sizeof(eth), 0)) || bpf_skb_store_bytes(p->skb, 0, &eth, sizeof(eth), 0) ||
	    bpf_redirect(LOOPBACK, BPF_F_INGRESS) != TC_ACT_REDIRECT)
		return drop(COUNT_drop_hairpin_route);
	return hairpin_done(p, COUNT_slow_hairpin_own);
}

/* At the WAN's egress hook, translated once. */
static __always_inline enum verdict hairpin_turn(const struct settings *cfg, const struct packet *p)
{
	if (hairpin_came_by(p) == HAIRPIN_OWN) {
		p->skb->mark = 0;
		return loopback_send(p);
	}
	return bpf_redirect(cfg->wan, BPF_F_INGRESS) == TC_ACT_REDIRECT ? REDIRECT : drop(COUNT_drop_hairpin_route);
}
