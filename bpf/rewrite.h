/* One "old → new" rewrite of an endpoint for both directions. The skb helpers keep partial checksums
 * (offloaded skbs) and super-packets right; `delta` arguments are sums, see csum.h.
 */
static __always_inline u32 l4_check_offset(u8 proto)
{
	return proto == IPPROTO_TCP ? offsetof(struct tcp_header, check) :
	       proto == IPPROTO_UDP ? offsetof(struct udp_header, check) :
				      offsetof(struct icmp_header, check);
}

static __always_inline u32 l4_port_offset(u8 proto, enum side side)
{
	if (proto == IPPROTO_ICMP)
		return offsetof(struct icmp_header, id);
	return side == SOURCE ? offsetof(struct port_header, src) : offsetof(struct port_header, dst);
}

static __always_inline u32 ip_addr_offset(enum side side)
{
	return side == SOURCE ? offsetof(struct ip_header, src) : offsetof(struct ip_header, dst);
}

static __always_inline addr_t packet_addr(const struct packet *p, enum side side)
{
	return side == SOURCE ? p->src : p->dst;
}

static __always_inline __be16 packet_port(const struct packet *p, enum side side)
{
	return side == SOURCE ? p->src_port : p->dst_port;
}

static __always_inline long rewrite_addr(const struct packet *p, enum side side, addr_t new)
{
	u32 delta = csum_delta_addr(packet_addr(p, side), new);

	return bpf_l3_csum_replace(p->skb, p->l3 + offsetof(struct ip_header, check), 0, delta, 0) ?:
	       bpf_skb_store_bytes(p->skb, p->l3 + ip_addr_offset(side), &new, sizeof(new), 0);
}

static __always_inline long rewrite_transport(const struct packet *p, enum side side, addr_t new, __be16 new_port)
{
	u32 check = p->l4 + l4_check_offset(p->proto);
	u64 zero_stays = p->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	long failed = 0;

	/* The ICMP checksum has no pseudo header. */
	if (p->proto != IPPROTO_ICMP)
		failed = bpf_l4_csum_replace(p->skb, check, 0, csum_delta_addr(packet_addr(p, side), new),
					     BPF_F_PSEUDO_HDR | zero_stays);
	return failed ?:
	       bpf_l4_csum_replace(p->skb, check, 0, csum_delta_port(packet_port(p, side), new_port), zero_stays) ?:
	       bpf_skb_store_bytes(p->skb, p->l4 + l4_port_offset(p->proto, side), &new_port, sizeof(new_port), 0);
}

/* A packet half rewritten must not go on, hence DROP. */
static __always_inline enum verdict rewrite(const struct packet *p, enum side side, addr_t new, __be16 new_port,
					    enum counter done)
{
	if (rewrite_transport(p, side, new, new_port) || rewrite_addr(p, side, new))
		return drop(COUNT_drop_rewrite);
	return pass(done);
}
