/* ICMP errors (RFC 5508 section 4): the quoted packet is what the error is about; its endpoint on our side is
 * translated together with the outer address. Inbound, the quote is a packet that we sent, so its source is the
 * external endpoint; outbound, it is a packet that we delivered, so its destination is the internal one.
 */
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
	asm volatile("" : "+r"(len)); /* or LLVM counts in a way whose bounds the verifier does not see */
	if (len && (len >= SUM_CHUNK || bpf_skb_load_bytes(p->skb, offset, words, len)))
		return false;
	return csum_fold16(bpf_csum_diff(NULL, 0, words, SUM_CHUNK, sum)) == 0xffff;
}

/* Only within the packet as its IP header tells it: what lies behind (Ethernet padding) is no part of the quote. */
static __always_inline bool quote_load(const struct packet *p, u32 offset, void *to, u32 len)
{
	return offset + len <= p->l4 + p->l4_len && !bpf_skb_load_bytes(p->skb, offset, to, len);
}

/* False for what cannot be of a session: no quote, one of a later fragment, or of other ICMP than queries. 8 bytes of
 * its transport are enough. The addresses are set even then, when there are any.
 */
static __always_inline bool quote_parse(const struct packet *p, struct quote *q)
{
	u32 l3 = p->l4 + sizeof(struct icmp_header), header, check;
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
	check = q->inner.l4 + l4_check_offset(ip.proto);
	q->has_check = quote_load(p, check, &q->check, sizeof(q->check));
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

	if (inner->class != CLASS_ICMP)
		delta = csum_fold16(delta + csum_delta_addr(packet_addr(inner, side), new));
	if (q->has_check && (inner->class != CLASS_UDP || q->check)) {
		check = inner->class == CLASS_UDP ? csum_apply_udp(q->check, delta) : csum_apply(q->check, delta);
		if (quote_store(p, inner->l4 + l4_check_offset(inner->proto), &check, sizeof(check),
				csum_delta_port(q->check, check)))
			return -1;
	}
	return quote_store(p, inner->l4 + l4_port_offset(inner->proto, side), &new_port, sizeof(new_port),
			   port_delta) ?:
	       rewrite_addr(inner, side, new);
}

/* RFC 5508 REQ-3. */
static __always_inline bool icmp_error_is_intact(const struct packet *p, const struct quote *q)
{
	return sum_is_right(p, p->l4, p->l4_len) && sum_is_right(p, q->inner.l3, q->inner.l4 - q->inner.l3);
}

#define MTU_LEAST 552 /* what no honest path is below; less would only slow a host down */
#define SEQ_WINDOW (1U << 22) /* bytes in flight, and quoted late */

/* Could this be about what we sent? Nobody off the path knows what the remote acknowledged last; before it has spoken,
 * that is what it will acknowledge.
 */
static __always_inline bool icmp_error_is_plausible(const struct packet *p, const struct quote *q, const struct session *s)
{
	struct icmp_header icmp;
	__be32 seq;

	if (bpf_skb_load_bytes(p->skb, p->l4, &icmp, sizeof(icmp)))
		return false;
	/* the next hop's MTU stands where queries have their sequence number (RFC 1191) */
	if (icmp.type == ICMP_UNREACHABLE && icmp.code == ICMP_TOO_BIG && icmp.seq && bpf_ntohs(icmp.seq) < MTU_LEAST)
		return false;
	if (q->inner.class != CLASS_TCP || !s->in.last_ack)
		return true;
	if (!quote_load(p, q->inner.l4 + offsetof(struct tcp_header, seq), &seq, sizeof(seq)))
		return false;
	return bpf_ntohl(seq) - bpf_ntohl(s->in.last_ack) + SEQ_WINDOW < 2 * SEQ_WINDOW;
}

static __always_inline enum verdict portless_error_outbound(const struct settings *cfg, const struct packet *p,
							    const struct quote *q, bool own)
{
	const struct packet *inner = &q->inner;
	struct binding_key key = { .remote_addr = inner->src,
				   .remote_port = inner->src_port,
				   .port = inner->dst_port,
				   .proto = inner->proto };
	struct binding *b = binding_find(cfg, &key, p->now);

	if (!b || !addr_equal(b->internal, inner->dst))
		return own && prefix_role(inner->dst) < PREFIX_INTERNAL ? pass(COUNT_own_outbound) :
		       own					       ? drop(COUNT_drop_icmp_error_leak) :
									 drop(COUNT_drop_icmp_error_no_session);
	if (!own && !icmp_error_is_intact(p, q))
		return drop(COUNT_drop_icmp_checksum);
	if (rewrite_addr(inner, DESTINATION, cfg->external[0]) || (!own && rewrite_addr(p, SOURCE, cfg->external[0])))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_icmp_error_outbound);
}

static __always_inline enum verdict icmp_error_outbound(const struct settings *cfg, const struct packet *p, bool own)
{
	struct quote q = {};
	struct session *s = NULL;

	if (quote_parse(p, &q)) {
		if (q.inner.class == CLASS_NONE)
			return portless_error_outbound(cfg, p, &q, own);
		s = session_find_outbound(slot_of_internal(q.inner.dst, q.inner.class, q.inner.dst_port), q.inner.dst,
					  q.inner.dst_port, q.inner.src, q.inner.src_port, q.inner.class);
	}
	if (!s || !session_is_alive(cfg, s, p->now)) {
		if (!own)
			return drop(COUNT_drop_icmp_error_no_session);
		return prefix_role(q.inner.dst) >= PREFIX_INTERNAL ? drop(COUNT_drop_icmp_error_leak) :
								      pass(COUNT_own_outbound);
	}
	if (!own && !icmp_error_is_intact(p, &q))
		return drop(COUNT_drop_icmp_checksum);
	if (quote_rewrite(p, &q, DESTINATION, s->out.new_addr, s->out.new_port))
		return drop(COUNT_drop_rewrite);
	if (!own && rewrite_addr(p, SOURCE, s->out.new_addr))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_icmp_error_outbound);
}

static __always_inline enum verdict portless_error_inbound(const struct settings *cfg, const struct packet *p,
							   const struct quote *q)
{
	const struct packet *inner = &q->inner;
	struct binding_key key = { .remote_addr = inner->dst,
				   .remote_port = inner->dst_port,
				   .port = inner->src_port,
				   .proto = inner->proto };
	struct binding *b = binding_find(cfg, &key, p->now);

	if (!b)
		return own_inbound(p);
	if (!icmp_error_is_intact(p, q))
		return drop(COUNT_drop_icmp_checksum);
	if (rewrite_addr(inner, SOURCE, b->internal) || rewrite_addr(p, DESTINATION, b->internal))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_icmp_error_inbound);
}

static __always_inline enum verdict icmp_error_inbound(const struct settings *cfg, const struct packet *p)
{
	struct quote q = {};
	struct session *s;
	u32 slot;

	if (!quote_parse(p, &q) || !addr_equal(p->dst, q.inner.src))
		return own_inbound(p);
	if (q.inner.class == CLASS_NONE)
		return portless_error_inbound(cfg, p, &q);
	slot = slot_of_external(cfg, q.inner.src, q.inner.class, q.inner.src_port);
	s = session_find(slot, q.inner.dst, q.inner.dst_port, INBOUND);
	if (!s || !session_is_alive(cfg, s, p->now))
		return own_inbound(p);
	if (!icmp_error_is_intact(p, &q))
		return drop(COUNT_drop_icmp_checksum);
	if (!icmp_error_is_plausible(p, &q, s))
		return drop(COUNT_drop_icmp_error_implausible);
	if (quote_rewrite(p, &q, SOURCE, s->in.new_addr, s->in.new_port) ||
	    rewrite_addr(p, DESTINATION, s->in.new_addr))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_icmp_error_inbound);
}
