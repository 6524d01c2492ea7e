/* ICMP errors (RFC 5508 section 4): the quoted packet is what the error is about; its endpoint on our side is
 * translated together with the outer address. Inbound, the quote is a packet that we sent, so its source is the
 * external endpoint; outbound, it is a packet that we delivered, so its destination is the internal one.
 */
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

static __always_inline enum verdict portless_error_outbound(const struct settings *cfg, struct packet *p,
							    const struct quote *q, bool own)
{
	const struct packet *inner = &q->inner;
	struct binding_key key = { .remote_addr = inner->src,
				   .remote_port = inner->src_port,
				   .port = inner->dst_port,
				   .proto = inner->proto };
	struct binding *b = NULL;
	addr_t external;

	/* The kernel's WAN first: what the error is about may have come by another. */
	for (u32 i = 0; i < (WANS > 1 ? WANS + 1 : 1) && !b; i++) {
		key.external = external_for(inner->dst, i ? i - 1 : p->wan);
		b = binding_find(cfg, &key, p->now);
		if (b && !addr_equal(b->internal, inner->dst))
			b = NULL;
	}
	if (!b)
		return own && prefix_role(inner->dst) < PREFIX_INTERNAL ? pass(COUNT_own_outbound) :
		       own					       ? drop(COUNT_drop_icmp_error_leak) :
									 drop(COUNT_drop_icmp_error_no_session);
	external = slot_addr(cfg, slot_of(key.external, 0, 0));
	if (!own && choose_wan(p, slot_wan(cfg, slot_of(key.external, 0, 0)), external) != CONTINUE)
		return ELSEWHERE;
	if (rewrite_addr(inner, DESTINATION, external) || (!own && rewrite_addr(p, SOURCE, external)))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_icmp_error_outbound);
}

/* Would it tell the outside of a host inside, as the receiver of the quoted packet or as its sender? */
static __always_inline bool quote_leaks(const struct quote *q)
{
	return prefix_role(q->inner.dst) >= PREFIX_INTERNAL || prefix_role(q->inner.src) == PREFIX_INTERNAL;
}

/* Of somebody for whom the gateway only routes: not ours to translate. */
static __always_inline bool icmp_error_leaks(const struct packet *p)
{
	struct quote q = {};

	quote_parse(p, &q);
	return quote_leaks(&q) && !is_exempt(p, p->dst, 0);
}

static __always_inline enum verdict icmp_error_outbound(const struct settings *cfg, struct packet *p, bool own)
{
	struct quote q = {};
	struct session *s = NULL;
	struct mapping_key internal;
	addr_t twin;

	if (quote_parse(p, &q)) {
		if (!own && !icmp_error_is_intact(p, &q))
			return drop(COUNT_drop_icmp_checksum);
		if (q.inner.class == CLASS_NONE)
			return portless_error_outbound(cfg, p, &q, own);
		internal = endpoint(q.inner.dst, q.inner.dst_port, q.inner.class, p->wan);
		s = WANS == 1 ? session_find_outbound(cfg, internal, q.inner.src, q.inner.src_port) :
				session_by_any(cfg, internal, q.inner.src, q.inner.src_port, true, p->now);
	}
	if (!s || !session_is_alive(cfg, s, p->now)) {
		if (is_exempt(p, p->dst, 0))
			return pass(COUNT_own_exempt);
		if (own && cfg->basic && counterpart_outside(q.inner.dst, &twin) && q.inner.skb)
			return quote_rewrite(p, &q, DESTINATION, twin, q.inner.dst_port) ?
				       drop(COUNT_drop_rewrite) :
				       translated(p, COUNT_slow_icmp_error_outbound);
		if (!own)
			return drop(COUNT_drop_icmp_error_no_session);
		return quote_leaks(&q) ? drop(COUNT_drop_icmp_error_leak) : pass(COUNT_own_outbound);
	}
	if (!own && choose_wan(p, s->internal.wan, s->out.new_addr) != CONTINUE)
		return ELSEWHERE;
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
				   .proto = inner->proto,
				   .external = external_of(cfg, p->dst) };
	struct binding *b = binding_find(cfg, &key, p->now);

	if (!b)
		return own_inbound(p);
	if (rewrite_addr(inner, SOURCE, b->internal) || rewrite_addr(p, DESTINATION, b->internal))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_icmp_error_inbound);
}

static __always_inline enum verdict icmp_error_inbound(const struct settings *cfg, const struct packet *p)
{
	struct quote q = {};
	struct session *s;
	u32 slot;

	if (!p->hairpin && source_is_impossible(p))
		return drop(COUNT_drop_source_martian);
	if (!quote_parse(p, &q) || !addr_equal(p->dst, q.inner.src))
		return own_inbound(p);
	if (!icmp_error_is_intact(p, &q))
		return drop(COUNT_drop_icmp_checksum);
	if (q.inner.class == CLASS_NONE)
		return portless_error_inbound(cfg, p, &q);
	slot = slot_of_external(cfg, q.inner.src, q.inner.class, q.inner.src_port);
	s = session_find_inbound(cfg, slot, q.inner.dst, q.inner.dst_port);
	if (!s || !session_is_alive(cfg, s, p->now))
		return own_inbound(p);
	if (!icmp_error_is_plausible(p, &q, s))
		return drop(COUNT_drop_icmp_error_implausible);
	if (quote_rewrite(p, &q, SOURCE, s->in.new_addr, s->in.new_port) ||
	    rewrite_addr(p, DESTINATION, s->in.new_addr))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_icmp_error_inbound);
}
