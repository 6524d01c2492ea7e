/* One "old → new" rewrite of an endpoint for both directions. Transport checksums go through the skb helper, which
 * alone knows whether one is partial (offloaded skbs, super-packets); its `to` is a sum, see csum.h. An IP header's
 * checksum never is, so it is written in place. Where the device has summed the whole packet (CHECKSUM_COMPLETE), that
 * sum stays right, because every change here is cancelled by that of a checksum.
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
	struct ip_header *ip = packet_at(p, p->l3, sizeof(*ip));

	if (!ip)
		return -1;
	ip->check = csum_apply(ip->check, csum_delta_addr(packet_addr(p, side), new));
	if (side == SOURCE)
		ip->src = new;
	else
		ip->dst = new;
	return 0;
}

/* The transport checksum, where it covers addresses; ICMP's and SCTP's do not. DCCP and UDP-Lite agree on its place. */
static __always_inline long rewrite_sums(const struct packet *p, enum side side, addr_t new)
{
	u32 delta = csum_delta_addr(packet_addr(p, side), new);
	u64 zero_stays = p->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	u64 never_zero = p->proto == IPPROTO_UDPLITE ? BPF_F_MARK_MANGLED_0 : 0; /* RFC 3828 section 3.1 */

	if (packet_is_later_fragment(p))
		return 0;
	if (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP)
		return bpf_l4_csum_replace(p->skb, p->l4 + l4_check_offset(p->proto), 0, delta,
					   BPF_F_PSEUDO_HDR | zero_stays);
	if (p->proto == IPPROTO_DCCP || p->proto == IPPROTO_UDPLITE)
		return bpf_l4_csum_replace(p->skb, p->l4 + offsetof(struct udp_header, check), 0, delta,
					   BPF_F_PSEUDO_HDR | never_zero);
	return 0;
}

static __always_inline long rewrite_transport(const struct packet *p, enum side side, addr_t new, __be16 new_port)
{
	u32 check = p->l4 + l4_check_offset(p->proto);
	u64 zero_stays = p->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__be16 *port;

	/* The ICMP checksum has no pseudo header. */
	if (p->proto != IPPROTO_ICMP &&
	    bpf_l4_csum_replace(p->skb, check, 0, csum_delta_addr(packet_addr(p, side), new),
				BPF_F_PSEUDO_HDR | zero_stays))
		return -1;
	if (bpf_l4_csum_replace(p->skb, check, 0, csum_delta_port(packet_port(p, side), new_port), zero_stays))
		return -1;
	port = packet_at(p, p->l4 + l4_port_offset(p->proto, side), sizeof(*port));
	if (!port)
		return -1;
	*port = new_port;
	return 0;
}

/* In a hairpin the first translation is no end. */
static __always_inline enum verdict translated(const struct packet *p, enum counter done)
{
	struct interface *here = WANS > 1 ? interface_at(p->skb->ifindex) : NULL;

	if (p->hairpin)
		return PASS;
	carry(done, here ? here->wan : 0, packet_bytes(p));
	return PASS;
}

/* A packet half rewritten must not go on, hence DROP. */
static __always_inline enum verdict rewrite(const struct packet *p, enum side side, addr_t new, __be16 new_port,
					    enum counter done)
{
	if (rewrite_transport(p, side, new, new_port) || rewrite_addr(p, side, new))
		return drop(COUNT_drop_rewrite);
	return translated(p, done);
}
