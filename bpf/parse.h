/* From an skb to struct packet: every header read once, by its true length, before anything is changed. Headers are
 * read and written in place; they are pulled into the linear part of the skb first, should they lie beyond it.
 */
struct port_header { /* TCP and UDP agree on these */
	__be16 src, dst;
};

struct tcp_header {
	struct port_header port;
	__be32 seq, ack;
	u8 data_offset; /* upper four bits, in words */
	u8 flags;
	__be16 window;
	u16 check;
	__be16 urgent;
};

struct udp_header {
	struct port_header port;
	__be16 len;
	u16 check;
};

struct icmp_header {
	u8 type, code;
	u16 check;
	__be16 id, seq;
};

#define IP_MORE_FRAGMENTS 0x2000
#define IP_OFFSET_UNITS 0x1fff

#define OPTIONS_MAX 40 /* bytes, of IP and of TCP */
#define OPTION_END 0
#define OPTION_NOP 1
#define IP_OPTION_LOOSE_ROUTE 131
#define IP_OPTION_STRICT_ROUTE 137

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACHABLE 3
#define ICMP_TOO_BIG 4 /* code of unreachable */
#define ICMP_REDIRECT 5
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER 12

static __always_inline u32 class_of(u8 proto)
{
	return proto == IPPROTO_TCP  ? CLASS_TCP :
	       proto == IPPROTO_UDP  ? CLASS_UDP :
	       proto == IPPROTO_ICMP ? CLASS_ICMP :
				       CLASS_NONE;
}

static __always_inline bool icmp_is_error(u8 type)
{
	return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER;
}

static __always_inline bool packet_is_icmp_error(const struct packet *p)
{
	return p->proto == IPPROTO_ICMP && icmp_is_error(p->icmp_type);
}

/* It quotes a packet too. */
static __always_inline bool packet_is_redirect(const struct packet *p)
{
	return p->proto == IPPROTO_ICMP && p->icmp_type == ICMP_REDIRECT;
}

static __always_inline bool packet_is_later_fragment(const struct packet *p)
{
	return p->fragment_offset > 0;
}

/* Where a packet from outside cannot come from, whoever we are (RFC 6890): this network, loopback, multicast, reserved.
 * Nobody's address is what asks for one (DHCP).
 */
static __always_inline bool addr_is_martian(addr_t addr)
{
	u8 first = bpf_ntohl(addr.word[0]) >> 24;

	return !addr_is_unset(addr) && (first == 0 || first == 127 || first >= 224);
}

/* As the IP header says; a super-packet is one. */
static __always_inline u32 packet_bytes(const struct packet *p)
{
	return p->l4 - p->l3 + p->l4_len;
}

/* A later fragment of something whose ports only the first one tells. */
static __always_inline bool packet_follows_first(const struct packet *p)
{
	return packet_is_later_fragment(p) && (p->class != CLASS_NONE || p->proto == IPPROTO_SCTP);
}

#define IP_HEADER_MAX 60
#define HEADERS_MAX 256 /* no header of ours lies further out; the verifier insists on a bound */

/* @len bytes at @offset of the packet, or NULL. Good until the next helper that changes the packet. */
static __always_inline void *packet_at(const struct packet *p, u64 offset, u32 len)
{
	struct __sk_buff *skb = p->skb;
	void *at;

	/* Else LLVM may keep the address of skb->data, which the verifier does not let it read from; or check a copy of
	 * what it adds.
	 */
	asm volatile("" : "+r"(skb), "+r"(offset));
	if (offset > HEADERS_MAX)
		return NULL;
	at = (void *)(long)skb->data + offset;
	/* Else LLVM may compute the sum twice, and the verifier not see that the checked one is the one used. */
	asm volatile("" : "+r"(at));
	return at + len > (void *)(long)skb->data_end ? NULL : at;
}

/* Makes IP and transport header at @l3 reachable by packet_at(), as far as the packet goes. */
static __always_inline void headers_pull(const struct packet *p, u32 l3)
{
	u32 wanted = l3 + IP_HEADER_MAX + sizeof(struct tcp_header);

	if (wanted > p->skb->len)
		wanted = p->skb->len;
	if (!packet_at(p, 0, wanted))
		bpf_skb_pull_data(p->skb, wanted);
}

/* RFC 1858: a first fragment too short for its transport header hides it from every check. */
static __always_inline enum verdict too_short(const struct packet *p)
{
	return drop(p->more_fragments ? COUNT_drop_fragment_tiny : COUNT_drop_malformed);
}

/* RFC 3128: a fragment that would overwrite the ports and flags that were looked at in the first; and one that ends
 * beyond the longest packet there can be.
 */
static __always_inline enum verdict parse_later_fragment(const struct packet *p)
{
	u32 end = p->l4 - p->l3 + p->fragment_offset + p->l4_len;

	if ((p->class == CLASS_TCP && p->fragment_offset < sizeof(struct tcp_header)) || end > 65535)
		return drop(COUNT_drop_malformed);
	return CONTINUE;
}

static __always_inline enum verdict parse_tcp(struct packet *p)
{
	struct tcp_header *tcp = packet_at(p, p->l4, sizeof(*tcp));
	u32 header;

	if (!tcp || p->l4_len < sizeof(*tcp))
		return too_short(p);
	header = (tcp->data_offset >> 4) * 4;
	if (header < sizeof(*tcp) || header > p->l4_len)
		return too_short(p);
	p->payload = p->l4 + header;
	p->src_port = tcp->port.src;
	p->dst_port = tcp->port.dst;
	p->seq = tcp->seq;
	p->ack = tcp->ack;
	p->tcp_flags = tcp->flags;
	return CONTINUE;
}

static __always_inline enum verdict parse_udp(struct packet *p)
{
	struct udp_header *udp = packet_at(p, p->l4, sizeof(*udp));

	if (!udp || p->l4_len < sizeof(*udp))
		return too_short(p);
	p->src_port = udp->port.src;
	p->dst_port = udp->port.dst;
	return CONTINUE;
}

/* SCTP's ports stand where TCP's do; its checksum covers no address, and its ports are never changed. */
static __always_inline enum verdict parse_sctp(struct packet *p)
{
	struct port_header *sctp = packet_at(p, p->l4, sizeof(*sctp));

	if (!sctp || p->l4_len < sizeof(*sctp))
		return too_short(p);
	p->src_port = sctp->src;
	p->dst_port = sctp->dst;
	return CONTINUE;
}

/* The offset in the packet at which, among the options from @from to @until, the first of kind @one or @other begins; 0
 * when there is none. Without jumps in the loop, as the verifier would follow each of them in every round.
 */
static __always_inline u32 option_find(const struct packet *p, u32 from, u32 until, u8 one, u8 other)
{
	struct scratch *scratch = scratch_get();
	u32 at = 0, going = 1, found = 0;
	u64 length = until - from - 1;

	if (!scratch || from == until)
		return 0;
	asm volatile("" : "+r"(length)); /* or LLVM drops the mask that the verifier wants to see */
	length = (length & (OPTIONS_SPAN - 1)) + 1;
	__builtin_memset(scratch->options, 0, sizeof(scratch->options));
	if (bpf_skb_load_bytes(p->skb, from, scratch->options, length))
		return 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < OPTIONS_MAX; i++) {
		u32 kind = scratch->options[at], size = scratch->options[at + 1];
		u32 nop = is_equal(kind, OPTION_NOP), hit = going & (is_equal(kind, one) | is_equal(kind, other));

		found |= -hit & (from + at);
		going &= is_any(kind) & ~hit & (nop | ~is_below(size, 2));
		size = nop | ((nop - 1) & size);
		going &= is_below(at + size, length);
		at += -going & size;
		asm volatile("" : "+r"(at));
		at &= OPTIONS_SPAN - 1;
	}
	return found;
}

/* RFC 791: a packet that dictates its own route goes round every policy. */
static __always_inline bool is_source_routed(const struct packet *p)
{
	return option_find(p, p->l3 + sizeof(struct ip_header), p->l4, IP_OPTION_LOOSE_ROUTE, IP_OPTION_STRICT_ROUTE);
}

static __always_inline enum verdict parse_icmp(struct packet *p)
{
	struct icmp_header *icmp = packet_at(p, p->l4, sizeof(*icmp));

	if (!icmp || p->l4_len < sizeof(*icmp))
		return too_short(p);
	p->icmp_type = icmp->type;
	if (icmp->type == ICMP_ECHO)
		p->src_port = icmp->id;
	else if (icmp->type == ICMP_ECHO_REPLY)
		p->dst_port = icmp->id;
	else
		p->class = CLASS_NONE;
	return CONTINUE;
}

static __always_inline enum verdict parse(struct packet *p)
{
	struct __sk_buff *skb = p->skb;
	struct ip_header *ip;
	u32 header, total;

	/* A tag that the device took off belongs to a VLAN interface, not to this one. */
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return pass(COUNT_own_not_ip);
	headers_pull(p, p->l3);
	ip = packet_at(p, p->l3, sizeof(*ip));
	if (!ip)
		return drop(COUNT_drop_malformed);
	header = (ip->version_ihl & 0xf) * 4;
	total = bpf_ntohs(ip->tot_len);
	if (!total && skb->gso_segs > 1) /* a super-packet beyond 64 kB (BIG TCP) */
		total = skb->len - p->l3;
	if (ip->version_ihl >> 4 != 4 || header < sizeof(*ip) || total < header || p->l3 + total > skb->len)
		return drop(COUNT_drop_malformed);

	p->l4 = p->l3 + header;
	p->l4_len = total - header;
	p->options = is_below(sizeof(*ip), header); /* by a jump, Linux 6.1 would walk on with a header longer than 20 and shorter than 21 */
	p->src = ip->src;
	p->dst = ip->dst;
	p->ttl = ip->ttl;
	p->proto = ip->proto;
	p->class = class_of(ip->proto);
	p->fragment_id = ip->id;
	p->fragment_offset = (bpf_ntohs(ip->frag_off) & IP_OFFSET_UNITS) * 8;
	p->more_fragments = ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS);
	if (p->options && is_source_routed(p))
		return drop(COUNT_drop_source_route);
	if (packet_is_later_fragment(p))
		return parse_later_fragment(p);
	if (p->proto == IPPROTO_SCTP)
		return parse_sctp(p);
	switch (p->class) {
	case CLASS_TCP:
		return parse_tcp(p);
	case CLASS_UDP:
		return parse_udp(p);
	case CLASS_ICMP:
		return parse_icmp(p);
	}
	return CONTINUE;
}
