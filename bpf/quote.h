/* The packet that an ICMP error quotes: finding its endpoints, and translating them with every checksum they touch. */
struct quote {
	struct packet inner; /* offsets, addresses and ports of the quoted packet */
	u16 check; /* its transport checksum, when has_check */
	bool has_check;
};

#define SUM_CHUNK 64
#define SUM_MAX 1536 /* no ICMP error is longer than an Ethernet frame; of one that is, the rest goes unchecked */

/* Does the one's-complement sum over @len bytes at @offset, a checksum among them, come out? */
static __always_inline bool sum_is_right(const struct packet *p, u32 offset, u64 len)
{
	__be32 words[SUM_CHUNK / 4];
	u32 sum = 0;

	if (len > SUM_MAX)
		return true;
#pragma clang loop unroll(disable)
	for (int i = 0; i < SUM_MAX / SUM_CHUNK && len >= SUM_CHUNK; i++) {
		if (bpf_skb_load_bytes(p->skb, offset, words, SUM_CHUNK))
			return false;
		sum = bpf_csum_diff(NULL, 0, words, SUM_CHUNK, sum);
		offset += SUM_CHUNK;
		len -= SUM_CHUNK;
	}
	__builtin_memset(words, 0, sizeof(words));
	if (len) {
		/* Counted from 0: the verifier of Linux 6.1 concludes nothing from a number's not being 0. */
		len--;
		asm volatile("" : "+r"(len)); /* or LLVM counts in a way whose bounds the verifier does not see */
		if (len >= SUM_CHUNK - 1 || bpf_skb_load_bytes(p->skb, offset, words, len + 1))
			return false;
	}
	return csum_fold16(bpf_csum_diff(NULL, 0, words, SUM_CHUNK, sum)) == 0xffff;
}

/* Only within the packet as its IP header tells it: what lies behind (Ethernet padding) is no part of the quote. */
static __always_inline bool quote_load(const struct packet *p, u32 offset, void *to, u32 len)
{
	return offset + len <= p->l4 + p->l4_len && !bpf_skb_load_bytes(p->skb, offset, to, len);
}

/* As packet_blur(): what follows need not be walked for each kind of quote. */
static __always_inline void quote_blur(struct quote *q)
{
	u32 unknown = q->inner.now;

	q->has_check = number_blur(q->has_check, unknown);
	q->check = number_blur(q->check, unknown);
	q->inner.class = number_blur(q->inner.class, unknown);
	q->inner.proto = number_blur(q->inner.proto, unknown);
	q->inner.src_port = number_blur(q->inner.src_port, unknown);
	q->inner.dst_port = number_blur(q->inner.dst_port, unknown);
}

/* False for what cannot be of a session: no quote, one of a later fragment, or of other ICMP than queries. 8 bytes of
 * its transport are enough. The addresses are set even then, when there are any.
 */
static __always_inline bool quote_parse(const struct packet *p, struct quote *q)
{
	u32 l3 = p->l4 + sizeof(struct icmp_header), header;
	u16 check = 0; /* not read into *@q, which would then have to be in memory as a whole: the stack is small */
	struct ip_header ip;
	union {
		struct port_header port;
		struct icmp_header icmp;
	} l4;

	if (!quote_load(p, l3, &ip, sizeof(ip)))
		return false;
	q->inner.src = ip.src;
	q->inner.dst = ip.dst;
	header = (ip.version_ihl & 0xf) * 4;
	if (ip.version_ihl >> 4 != 4 || header < sizeof(ip) || ip.frag_off & bpf_htons(IP_OFFSET_UNITS))
		return false;
	if (!quote_load(p, l3 + header, &l4, sizeof(l4)))
		return false;
	q->inner.skb = p->skb;
	q->inner.now = p->now;
	q->inner.l3 = l3;
	q->inner.l4 = l3 + header;
	q->inner.proto = ip.proto;
	q->inner.class = class_of(ip.proto);
	if (q->inner.class == CLASS_NONE) {
		if (ip.proto == IPPROTO_SCTP) {
			q->inner.src_port = l4.port.src;
			q->inner.dst_port = l4.port.dst;
		}
		return true;
	}
	if (q->inner.class == CLASS_ICMP) {
		q->inner.src_port = l4.icmp.type == ICMP_ECHO ? l4.icmp.id : 0;
		q->inner.dst_port = l4.icmp.type == ICMP_ECHO_REPLY ? l4.icmp.id : 0;
		if (l4.icmp.type != ICMP_ECHO && l4.icmp.type != ICMP_ECHO_REPLY)
			return false;
	} else {
		q->inner.src_port = l4.port.src;
		q->inner.dst_port = l4.port.dst;
	}
	q->has_check = quote_load(p, q->inner.l4 + l4_check_offset(ip.proto), &check, sizeof(check));
	q->check = check;
	quote_blur(q);
	return true;
}

/* Stores @len bytes at @offset of the quote and makes the outer ICMP checksum agree: @delta is what they change. */
static __always_inline long quote_store(const struct packet *p, u32 offset, void *bytes, u32 len, u32 delta)
{
	return bpf_l4_csum_replace(p->skb, p->l4 + offsetof(struct icmp_header, check), 0, delta, 0) ?:
	       bpf_skb_store_bytes(p->skb, offset, bytes, len, 0);
}

/* The quoted IP header's change of address is cancelled in the outer sum by that of its own checksum, so those two
 * need no correction outside. All offsets in the quote are even relative to the ICMP header.
 */
static __always_inline long quote_rewrite(const struct packet *p, const struct quote *q, enum side side, addr_t new,
					  __be16 new_port)
{
	const struct packet *inner = &q->inner;
	u32 port_delta = csum_delta_port(packet_port(inner, side), new_port);
	u32 delta = port_delta;
	u16 check;

	if (inner->class == CLASS_NONE)
		return rewrite_addr(inner, side, new);
	if (inner->class != CLASS_ICMP)
		delta = csum_fold16(delta + csum_delta_addr(packet_addr(inner, side), new));
	if (q->has_check && (inner->class != CLASS_UDP || q->check)) {
		check = inner->class == CLASS_UDP ? csum_apply_udp(q->check, delta) : csum_apply(q->check, delta);
		if (quote_store(p, inner->l4 + l4_check_offset(inner->proto), &check, sizeof(check),
				csum_delta_port(q->check, check)))
			return -1;
	}
	/* One to one, ports stay; a query's identifier is no port on the side of who answers. */
	if (new_port == packet_port(inner, side))
		return rewrite_addr(inner, side, new);
	return quote_store(p, inner->l4 + l4_port_offset(inner->proto, side), &new_port, sizeof(new_port),
			   port_delta) ?:
	       rewrite_addr(inner, side, new);
}
