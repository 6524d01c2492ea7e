/* ICMP errors (RFC 5508 section 4): the quoted packet is what the error is about; its endpoint on our side is
 * translated together with the outer address. Inbound, the quote is a packet that we sent, so its source is the
 * external endpoint; outbound, it is a packet that we delivered, so its destination is the internal one.
 */
struct quote {
	struct packet inner; /* offsets, addresses and ports of the quoted packet */
	u16 check; /* its transport checksum, when has_check */
	bool has_check;
};

/* Only within the packet as its IP header tells it: what lies behind (Ethernet padding) is no part of the quote. */
static __always_inline bool quote_load(const struct packet *p, u32 offset, void *to, u32 len)
{
	return offset + len <= p->l4 + p->l4_len && !bpf_skb_load_bytes(p->skb, offset, to, len);
}

/* False for what is no quote of TCP, UDP or an ICMP query; 8 bytes of its transport are enough. The addresses are set
 * even then, when there are any.
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
	if (q->inner.class == CLASS_NONE)
		return false;
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

static __always_inline enum verdict icmp_error_outbound(const struct settings *cfg, const struct packet *p, bool own)
{
	struct quote q = {};
	struct session *s = NULL;

	if (quote_parse(p, &q))
		s = session_find(slot_of_internal(q.inner.dst, q.inner.class, q.inner.dst_port), q.inner.src,
				 q.inner.src_port, OUTBOUND);
	if (!s || !session_is_alive(cfg, s, p->now)) {
		if (!own)
			return drop(COUNT_drop_icmp_error_no_session);
		return prefix_role(q.inner.dst) >= PREFIX_INTERNAL ? drop(COUNT_drop_icmp_error_leak) :
								      pass(COUNT_own_outbound);
	}
	if (quote_rewrite(p, &q, DESTINATION, s->out.new_addr, s->out.new_port))
		return drop(COUNT_drop_rewrite);
	if (!own && rewrite_addr(p, SOURCE, s->out.new_addr))
		return drop(COUNT_drop_rewrite);
	return pass(COUNT_slow_icmp_error_outbound);
}

static __always_inline enum verdict icmp_error_inbound(const struct settings *cfg, const struct packet *p)
{
	struct quote q = {};
	struct session *s;
	u32 slot;

	if (!quote_parse(p, &q) || !addr_equal(p->dst, q.inner.src))
		return pass(COUNT_own_inbound);
	slot = slot_of_external(cfg, q.inner.src, q.inner.class, q.inner.src_port);
	s = session_find(slot, q.inner.dst, q.inner.dst_port, INBOUND);
	if (!s || !session_is_alive(cfg, s, p->now))
		return pass(COUNT_own_inbound);
	if (quote_rewrite(p, &q, SOURCE, s->in.new_addr, s->in.new_port) ||
	    rewrite_addr(p, DESTINATION, s->in.new_addr))
		return drop(COUNT_drop_rewrite);
	return pass(COUNT_slow_icmp_error_inbound);
}
