/* TC on the WAN: a complete NAT by itself, and the only place where anything is decided. It sees every packet
 * that leaves or enters the WAN through the stack: all of them in TC mode, what XDP passed up in XDP mode.
 */

/* Whose packet is it? CONTINUE: an internal host's, to be translated. @leaks: it quotes a packet of such a host. */
static __always_inline enum verdict source_policy(const struct packet *p, bool leaks)
{
	struct interface *from = interface_at(p->skb->ingress_ifindex);
	bool local = !p->skb->ingress_ifindex;

	switch (prefix_role(p->src)) {
	case PREFIX_INTERNAL:
		if (!is_exempt(p, p->dst, p->dst_port))
			return CONTINUE;
		fragment_begin_own(p);
		return pass(COUNT_own_exempt);
	case PREFIX_OWN:
		return pass(COUNT_own_outbound);
	case PREFIX_PRIVATE:
		if (local && addr_is_unset(p->src)) /* a DHCP client on the WAN */
			return pass(COUNT_own_outbound);
		return drop(COUNT_drop_source_private);
	}
	if (from && from->role == ROLE_LAN)
		return drop(COUNT_drop_source_foreign);
	/* Translated on its way in, but its LAN is gone and the default route leads back out. */
	if (from && from->role == ROLE_WAN && prefix_role(p->dst) >= PREFIX_INTERNAL)
		return drop(COUNT_drop_turned_round);
	return leaks ? drop(COUNT_drop_icmp_error_leak) : pass(COUNT_own_outbound);
}

/* A socket of the gateway's own may have taken an external port that is mapped, towards the same remote: then its
 * packets are translated like any other host's, as are its ICMP queries, whose identifiers nobody reserves.
 */
static __always_inline bool own_needs_translation(const struct settings *cfg, const struct packet *p)
{
	struct session *s;

	if (p->class == CLASS_ICMP)
		return true;
	s = session_find_inbound(cfg, slot_of_external(cfg, p->src, p->class, p->src_port), p->dst, p->dst_port);
	if (s && session_is_alive(cfg, s, p->now))
		return true;
	/* Once translated it stays so, when the other session ends too: the remote must not see its port change. */
	s = session_find_outbound(cfg, endpoint(p->src, p->src_port, p->class, p->wan), p->dst, p->dst_port);
	return s && session_is_alive(cfg, s, p->now);
}

#define SHARE_TRIES 8

/* All ports are taken: when that is allowed, another host's is shared, for this remote only; but none of a forward or a
 * pinhole, which stands for its endpoint also while no session runs there.
 */
static __always_inline u32 slot_to_share(const struct settings *cfg, const struct packet *p, u32 external)
{
	const struct pool *pool = pool_for(cfg, p->class, p->src_port);

#pragma clang loop unroll(disable)
	for (int i = 0; i < SHARE_TRIES; i++) {
		u32 slot = slot_of(external, p->class, 0) + pool_random_port(pool);
		struct session *s = session_at(slot);

		if (s && !(s->life & LIFE_STATIC))
			return slot;
	}
	return NO_SLOT;
}

/* Why there is no port for @p's host. */
static __always_inline enum counter port_shortage(const struct settings *cfg, const struct packet *p)
{
	struct tenant *tenant = PORT_BLOCKS ? tenant_find(p->src) : NULL;

	if (!PORT_BLOCKS)
		return COUNT_drop_ports_exhausted;
	return tenant && block_place(cfg, tenant) == HOST_BLOCKS ? COUNT_drop_host_limit : COUNT_drop_blocks_exhausted;
}

/* A new session for @p on its mapping in @slot, if there is one; or NULL with the reason in @verdict. @s is the expired
 * session over the same endpoints, if any.
 */
static __always_inline struct session *session_open(const struct settings *cfg, struct packet *p, u32 slot, struct session *s,
						    enum verdict *verdict)
{
	struct host *host = NULL;
	struct ends *e = ends_blank();
	u32 external;

	if (!e || !packet_blur(p)) {
		*verdict = DROP;
		return NULL;
	}
	e->internal = p->src;
	e->remote = p->dst;
	e->internal_port = p->src_port;
	e->remote_port = p->dst_port;
	*verdict = p->own ? CONTINUE : source_policy(p, false);
	if (*verdict == CONTINUE)
		*verdict = may_open(p);
	if (*verdict != CONTINUE)
		return NULL;
	e->marks = p->own ? 0 : trigger_mark(p) | alg_mark(p->class, p->dst_port, p->src);
	external = slot_blur(p->own ? external_of(cfg, p->src) : external_for(p->src, p->wan));
	if (addr_is_unset(slot_addr(cfg, slot_of(external, 0, 0)))) {
		*verdict = deny(COUNT_drop_no_external, REFUSE);
		return NULL;
	}
	if (s && session_reopen(cfg, s, e, p->now))
		return s;
	if (!p->own)
		host = host_get(cfg, p->src, p->now);
	if (host)
		*verdict = host_may_open(cfg, host, p->class, slot == NO_SLOT, p->now);
	if (*verdict == CONTINUE && !packet_blur(p)) /* again: what was asked since leaves many ways */
		*verdict = DROP;
	if (*verdict != CONTINUE)
		return NULL;
	/* Counted before others can see it: it could end, and be counted off, at once-> */
	if (host)
		__sync_fetch_and_add(&host->sessions, 1);
	e->marks |= host ? SESSION_COUNTED : 0;
	s = NULL;
	e->is_mapped = true;
	if (slot == NO_SLOT) {
		slot = mapping_open(cfg, p, e, external, host);
		if (slot == NO_SLOT && cfg->overload) {
			slot = slot_to_share(cfg, p, external);
			e->is_mapped = false;
		}
	}
	if (slot == NO_SLOT)
		*verdict = deny(port_shortage(cfg, p), REFUSE);
	else
		s = session_join(cfg, e, &slot, p->now, verdict);
	if (!s && host)
		__sync_fetch_and_add(&host->sessions, -1);
	return s;
}

/* The session is looked for first: of an established flow nothing else needs to be asked. */
static __always_inline enum verdict translate_outbound(const struct settings *cfg, struct packet *p)
{
	struct mapping_key internal = endpoint(p->src, p->src_port, p->class, p->wan);
	u32 mapping = slot_of_internal(internal);
	struct session *s = session_find_mapped(cfg, internal, mapping, p->dst, p->dst_port), *answered;
	enum verdict verdict;

	if (!s || !session_is_alive(cfg, s, p->now)) {
		/* Its remote may have come by another WAN than the kernel chooses now. */
		answered = WANS > 1 && !p->own && !p->hairpin ?
				   session_by_any(cfg, internal, p->dst, p->dst_port, false, p->now) :
				   NULL;
		if (answered)
			return choose_wan(p, answered->internal.wan, answered->out.new_addr);
		s = session_open(cfg, p, mapping, s, &verdict);
		if (!s) {
			/* One way for the verifier from here, out of hundreds. */
			verdict = number_blur(verdict, p->now);
			event_refused(endpoint(p->src, p->src_port, p->class, p->wan), p->dst, p->dst_port, p->now);
			return refusal_send(cfg, p, verdict);
		}
		if (!packet_blur(p)) /* from here on a new session is like any other */
			return DROP;
	}
	if (s->out.marks & SESSION_ALG) {
		verdict = alg_read(cfg, p, s, PUNT_ALG_OUT);
		if (verdict != CONTINUE)
			return verdict;
		if (alg_shifts(p, s, OUTBOUND))
			return alg_again(p, p->alg | ALG_SHIFT, 0);
	}
	if (p->class == CLASS_TCP) {
		if (!tcp_flags_are_sane(p->tcp_flags))
			return drop(COUNT_drop_tcp_flags);
		tcp_track(cfg, s, &s->out, &s->in, p);
		mss_clamp(p);
	}
	event_opened(s, p->now);
	flow_touch(s, OUTBOUND, p->now, packet_bytes(p));
	contact_remember(cfg, p, s->mapping);
	if (s->out.marks & SESSION_TRIGGERS)
		trigger_pull(p);
	if (session_may_fly(cfg, s) && !p->hairpin)
		flow_arm(cfg, p, &s->out);
	if (p->more_fragments && fragment_begin(cfg, p, SOURCE, s->out.new_addr) != CONTINUE)
		return DROP;
	return rewrite(p, SOURCE, s->out.new_addr, s->out.new_port, COUNT_slow_outbound);
}

static __always_inline enum verdict fragment_outbound(const struct settings *cfg, struct packet *p)
{
	struct fragment *first = fragment_recall(cfg, p);
	enum verdict verdict;

	if (first && fragment_is_own(first))
		return pass(COUNT_own_exempt);
	if (first && addr_is_unset(first->new_addr[SOURCE])) /* redirected, while this one was on its way */
		return drop(COUNT_drop_fragment_orphan);
	/* The gateway's own keep their address, and leave where the kernel sends them. */
	if (first && !addr_equal(p->src, first->new_addr[SOURCE]) &&
	    choose_wan(p, first->wan, first->new_addr[SOURCE]) != CONTINUE)
		return ELSEWHERE;
	if (first)
		return fragment_rewrite(p, first, COUNT_slow_fragment_outbound);
	verdict = source_policy(p, false);
	if (verdict != CONTINUE)
		return verdict;
	if (!p->hairpin && punt(cfg, p, PUNT_FRAGMENT_OUT)) {
		count(COUNT_punt_fragment);
		return REDIRECT;
	}
	return drop(COUNT_drop_fragment_orphan);
}

/* What has no endpoint of its own, from whoever it is. */
static __always_inline enum verdict other_outbound(const struct settings *cfg, struct packet *p)
{
	u32 role = prefix_role(p->src);
	/* A redirect quotes a packet as errors do, but no host's leaves. */
	bool error = packet_is_icmp_error(p) || (role != PREFIX_INTERNAL && packet_is_redirect(p));
	enum verdict verdict;

	if (error && (role == PREFIX_OWN || role == PREFIX_INTERNAL))
		return icmp_error_outbound(cfg, p, role == PREFIX_OWN);
	verdict = source_policy(p, error && icmp_error_leaks(p));
	if (verdict != CONTINUE)
		return verdict;
	if (p->proto == IPPROTO_ICMP)
		return drop(COUNT_drop_icmp_type);
	return refusal_send(cfg, p, portless_outbound(cfg, p));
}

static __always_inline enum verdict walk_outbound(const struct settings *cfg, struct packet *p)
{
	addr_t twin;
	u32 external;

	if (cfg->basic && counterpart_outside(p->src, &twin))
		return choose_wan(p, counterpart_wan(p->src), twin) ?: basic_translate(p, SOURCE, twin, COUNT_slow_basic_outbound);
	if (packet_follows_first(p) || call_follows_first(p))
		return fragment_outbound(cfg, p);
	if (p->class == CLASS_NONE || (p->class == CLASS_ICMP && p->icmp_type != ICMP_ECHO))
		return other_outbound(cfg, p);
	external = external_of(cfg, p->src);
	p->own = external != NO_EXTERNAL;
	if (p->own)
		p->wan = external_wan(cfg, external);
	if (p->own && !own_needs_translation(cfg, p))
		return pass(COUNT_own_outbound);
	return translate_outbound(cfg, p);
}

/* parse(), with what the packet's mark says. What follows is walked once by the verifier, not once for each kind of packet. */
static __always_inline enum verdict packet_read(struct packet *p)
{
	enum verdict verdict = parse(p);

	p->hairpin = hairpin_is_marked(p->skb);
	p->alg = alg_marks(p->skb);
	if (p->alg)
		p->skb->mark = 0;
	if (verdict == CONTINUE && !packet_blur(p))
		verdict = DROP;
	return verdict;
}

static __always_inline enum verdict slow_outbound(struct packet *p)
{
	struct settings *cfg = settings_get();
	enum verdict verdict = packet_read(p);

	if (verdict != CONTINUE || !cfg)
		return verdict;
	p->wan = packet_wan(p);
	if (p->alg & ALG_SHIFT)
		return alg_shift(cfg, p, OUTBOUND);
	verdict = walk_outbound(cfg, p);
	if (verdict == ELSEWHERE)
		return leave_elsewhere(cfg, p);
	return verdict == PASS && p->hairpin ? hairpin_turn(cfg, p) : verdict;
}

static __always_inline enum verdict fragment_inbound(const struct settings *cfg, const struct packet *p)
{
	struct fragment *first = fragment_recall(cfg, p);

	if (first)
		return fragment_is_own(first) ?
			       own_inbound(p) :
			       fragment_rewrite(p, first, COUNT_slow_fragment_inbound);
	if (!p->hairpin && punt(cfg, p, PUNT_FRAGMENT_IN)) {
		count(COUNT_punt_fragment);
		return REDIRECT;
	}
	return own_inbound(p);
}

static __always_inline enum verdict translate_inbound(const struct settings *cfg, struct packet *p, u32 slot)
{
	struct session *s = session_find_inbound(cfg, slot, p->src, p->src_port);
	enum verdict verdict;

	if (!s || !session_is_alive(cfg, s, p->now)) {
		s = session_admit(cfg, p, slot, s, &verdict);
		if (!s)
			return verdict;
		if (!packet_blur(p)) /* as on the way out */
			return DROP;
	}
	if (s->out.marks & SESSION_ALG) {
		verdict = alg_read(cfg, p, s, PUNT_ALG_IN);
		if (verdict != CONTINUE)
			return verdict;
	}
	if (p->class == CLASS_TCP) {
		if (!tcp_flags_are_sane(p->tcp_flags))
			return drop(COUNT_drop_tcp_flags);
		/* A reset that will not get beyond this gateway must not end what its addressee goes on with. */
		if (!(p->tcp_flags & TCP_RST && p->ttl <= 1))
			tcp_track(cfg, s, &s->in, &s->out, p);
		mss_clamp(p);
	}
	event_opened(s, p->now);
	flow_touch(s, INBOUND, p->now, packet_bytes(p));
	if (p->more_fragments && fragment_begin(cfg, p, DESTINATION, s->in.new_addr) != CONTINUE)
		return DROP;
	verdict = rewrite(p, DESTINATION, s->in.new_addr, s->in.new_port, COUNT_slow_inbound);
	if (verdict == PASS && s->out.marks & SESSION_ALG && alg_shifts(p, s, INBOUND))
		return alg_again(p, p->alg | ALG_SHIFT, BPF_F_INGRESS);
	return verdict;
}

static __always_inline enum verdict portless_or_own(const struct settings *cfg, const struct packet *p)
{
	enum verdict verdict = p->proto == IPPROTO_ICMP ? CONTINUE : portless_inbound(cfg, p);

	if (verdict != CONTINUE)
		return verdict;
	return p->proto == IPPROTO_GRE && packet_is_later_fragment(p) ? fragment_inbound(cfg, p) : own_inbound(p);
}

static __always_inline enum verdict walk_inbound(const struct settings *cfg, struct packet *p)
{
	addr_t twin;

	/* Before anything else: no kind of packet may name an internal host from outside, or claim to be from us. Sessions
	 * with such remotes there are, of hairpins.
	 */
	if (!p->hairpin && external_of(cfg, p->src) != NO_EXTERNAL)
		return drop(COUNT_drop_source_martian);
	if (external_of(cfg, p->dst) == NO_EXTERNAL) {
		if (prefix_role(p->dst) == PREFIX_INTERNAL)
			return is_exempt(p, p->src, p->src_port) ? pass(COUNT_own_exempt) :
								    drop(COUNT_drop_destination_internal);
		if (cfg->basic && counterpart_of(p->dst, &twin))
			return basic_inbound(p, twin);
		return own_inbound(p);
	}
	if (packet_follows_first(p))
		return fragment_inbound(cfg, p);
	if (packet_is_icmp_error(p))
		return icmp_error_inbound(cfg, p);
	if (p->class == CLASS_NONE || (p->class == CLASS_ICMP && p->icmp_type != ICMP_ECHO_REPLY))
		return portless_or_own(cfg, p);
	return translate_inbound(cfg, p, slot_of_external(cfg, p->dst, p->class, p->dst_port));
}

static __always_inline enum verdict slow_inbound(struct packet *p)
{
	struct settings *cfg = settings_get();
	enum verdict verdict = packet_read(p);

	if (verdict != CONTINUE || !cfg)
		return verdict;
	if (p->alg & ALG_SHIFT) {
		p->wan = packet_wan(p);
		return alg_shift(cfg, p, INBOUND);
	}
	verdict = walk_inbound(cfg, p);
	return verdict == PASS && p->hairpin ? hairpin_send(p) : verdict;
}
