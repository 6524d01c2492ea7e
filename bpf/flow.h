/* Sessions and their two flows: finding one, whether it is alive, what a packet does to it. Only this file and
 * mapping.h know how the tables are laid out.
 */
static __always_inline struct flow *session_flow(struct session *s, enum direction direction)
{
	return direction == OUTBOUND ? &s->out : &s->in;
}

static __always_inline u32 slot_of(u32 external, u32 class, __be16 port)
{
	return (external * CLASSES + class) * PORTS + bpf_ntohs(port);
}

static __always_inline u32 slot_class(u32 slot)
{
	return slot / PORTS % CLASSES;
}

/* The external endpoint of a mapping's slot. */
static __always_inline addr_t slot_addr(const struct settings *cfg, u32 slot)
{
	u64 external = slot / PORTS / CLASSES;

	asm volatile("" : "+r"(external)); /* or LLVM drops the check that the verifier wants to see */
	return cfg->external[external & EXTERNAL_MASK];
}

static __always_inline __be16 slot_port(u32 slot)
{
	return bpf_htons(slot % PORTS);
}

static __always_inline u32 slot_wan(const struct settings *cfg, u32 slot)
{
	u64 external = slot / PORTS / CLASSES;

	if (WANS == 1)
		return 0;
	asm volatile("" : "+r"(external)); /* as in slot_addr() */
	return cfg->external_wan[external & EXTERNAL_MASK];
}

/* The index of an external address, or NO_EXTERNAL. Of several not by comparing with each: the verifier would follow every
 * one of them through all that comes after.
 */
static __always_inline u32 external_of(const struct settings *cfg, addr_t addr)
{
#if EXTERNALS == 1
	return addr_equal(cfg->external[0], addr) ? 0 : NO_EXTERNAL;
#else
	u32 *external = externals.lookup(&addr);
	return external ? *external : NO_EXTERNAL;
#endif
}

static __always_inline u32 addr_hash(addr_t addr)
{
	u32 hash = 0;

	for (int i = 0; i < ADDR_WORDS; i++)
		hash = (hash ^ addr.word[i]) * 0x9e3779b1;
	hash ^= hash >> 15;
	hash *= 0x85ebca6b;
	return hash ^ hash >> 13;
}

/* Which external address of a WAN an internal host appears as: always the same of those it may have. */
static __always_inline u32 external_for(addr_t internal, u32 wan)
{
#if EXTERNALS == 1
	return 0;
#else
	struct choice_key key = { .bits = CHOICE_ADDR_AT + ADDR_BITS, .wan = wan, .addr = internal };
	struct choice *choice = choices.lookup(&key);
	u64 nth;

	if (!choice)
		return wan < WANS ? wan : 0;
	nth = (u64)addr_hash(internal) * choice->count >> 32;
	asm volatile("" : "+r"(nth)); /* or LLVM drops the mask that the verifier wants to see */
	return choice->external[nth & (CHOICE_MAX - 1)];
#endif
}

/* The slot of the external endpoint (@addr, @port), or NO_SLOT when the address is not ours to masquerade as. */
static __always_inline u32 slot_of_external(const struct settings *cfg, addr_t addr, u32 class, __be16 port)
{
	u32 external = external_of(cfg, addr);

	return external == NO_EXTERNAL ? NO_SLOT : slot_of(external, class, port);
}

static __always_inline bool flow_is_with(const struct flow *flow, addr_t remote, __be16 port)
{
	return flow->remote_port == port && addr_equal(flow->remote_addr, remote);
}

static __always_inline bool life_is_session(u64 life)
{
	return (life & (LIFE_STATE | LIFE_SESSION)) == (LIFE_LIVE | LIFE_SESSION);
}

static __always_inline bool life_swap(struct session *s, u64 from, u64 to)
{
	return __sync_val_compare_and_swap(&s->life, from, to) == from;
}

/* The end of LIFE_OPENING, or of a slot that was free. */
static __always_inline void life_settle(struct session *s, u64 bits)
{
	__sync_fetch_and_or(&s->life, bits);
	__sync_fetch_and_and(&s->life, ~LIFE_OPENING | LIFE_LIVE);
}

/* RFC 7857 section 2: both sides have spoken and acknowledged, and neither both have closed nor one has reset. */
static __always_inline bool tcp_sides_are_established(u8 one, u8 other)
{
	u8 both = one & other, any = one | other;

	return (both & TCP_ACK) && !(both & TCP_FIN) && !(any & TCP_RST);
}

static __always_inline bool tcp_is_established(const struct session *s)
{
	return tcp_sides_are_established(s->out.tcp_seen, s->in.tcp_seen);
}

static __always_inline u32 idle_limit(const struct settings *cfg, u32 class, u8 tcp_seen, u8 tcp_seen_other)
{
	switch (class) {
	case CLASS_TCP:
		return tcp_sides_are_established(tcp_seen, tcp_seen_other) ? cfg->tcp_established :
									     cfg->tcp_transitory;
	case CLASS_UDP:
		return cfg->udp;
	}
	return cfg->icmp;
}

static __always_inline u32 session_idle_limit(const struct settings *cfg, const struct session *s)
{
	return idle_limit(cfg, slot_class(s->mapping), s->out.tcp_seen, s->in.tcp_seen);
}

/* Signed, because another CPU's jiffies may be ahead of ours by one. */
static __always_inline bool idle_longer(u32 now, u32 last_seen, u32 limit)
{
	return (s32)(now - last_seen) > (s32)limit;
}

static __always_inline bool session_is_expired(const struct settings *cfg, const struct session *s, u32 now)
{
	u32 limit = session_idle_limit(cfg, s);

	return idle_longer(now, s->out.last_seen, limit) &&
	       (!cfg->inbound_refresh || idle_longer(now, s->in.last_seen, limit));
}

static __always_inline bool session_is_alive(const struct settings *cfg, const struct session *s, u32 now)
{
	return life_is_session(s->life) && !session_is_expired(cfg, s, now);
}

/* The live session of @internal with this remote by whichever WAN, if the remote opened it, or @whoever did; by the WAN
 * named rather than by another. The loop only finds, and what it found is blurred, as what follows is long.
 */
static __always_inline struct session *session_by_any(const struct settings *cfg, struct mapping_key internal, addr_t remote,
						      __be16 port, bool whoever, u32 now)
{
	u32 first = internal.wan, found = NO_WAN;

#pragma clang loop unroll(disable)
	for (u32 i = 1; i <= WANS; i++) {
		struct session *s;

		internal.wan = (first + i) % WANS;
		s = session_find_outbound(cfg, internal, remote, port);
		if (s && session_is_alive(cfg, s, now) && (whoever || s->out.marks & SESSION_FROM_OUTSIDE))
			found = internal.wan;
	}
	internal.wan = number_blur(found, now);
	return internal.wan < WANS ? session_find_outbound(cfg, internal, remote, port) : NULL;
}

static __always_inline bool flow_is_armed(const struct settings *cfg, const struct flow *flow, u32 now)
{
	return !idle_longer(now, flow->armed_at, cfg->rearm) && (s32)(flow->armed_at - cfg->disarmed_at) > 0;
}

/* For XDP, which looks at no life: the session to which the flow @key belongs, an armed one if there is. Of one in its
 * expected place only the line of that direction is touched.
 */
static __always_inline struct session *session_find_armed(const struct settings *cfg, const struct flow_key *key, u32 now)
{
	u32 mapping = key->direction == INBOUND ? key->mapping : mapping_hint(cfg, key->internal), place = mapping;
	struct session *unarmed = NULL, *s;

#pragma clang loop unroll(disable)
	for (u32 i = 0; i < PLACES; i++) {
		s = session_at(place);
		if (!s)
			break;
		if (session_has(s, key)) {
			if (flow_is_armed(cfg, session_flow(s, key->direction), now))
				return s;
			unarmed = s;
		}
		place = further_place(cfg, mapping, key->remote, key->remote_port) ^ i;
	}
	entry_find(cfg, key, NO_SLOT, &s);
	return s ?: unarmed;
}

static __always_inline void flow_disarm(const struct settings *cfg, struct flow *flow)
{
	flow->armed_at = cfg->disarmed_at;
}

static __always_inline void session_disarm(const struct settings *cfg, struct session *s)
{
	flow_disarm(cfg, &s->out);
	flow_disarm(cfg, &s->in);
}

/* Idle for long enough to be absent. */
static __always_inline void session_expire(const struct settings *cfg, struct session *s, u32 now)
{
	s->out.last_seen = s->in.last_seen = now - session_idle_limit(cfg, s) - 1;
	session_disarm(cfg, s);
}

static __always_inline void flow_touch(struct session *s, enum direction direction, u32 now, u32 bytes)
{
	struct traffic *traffic = direction == OUTBOUND ? &s->sent : &s->received;

	session_flow(s, direction)->last_seen = now;
	traffic->packets++;
	traffic->bytes += bytes;
}

/* RFC 793 has no segment with none of SYN, ACK, RST, nor with two of SYN, FIN, RST. */
static __always_inline bool tcp_flags_are_sane(u8 flags)
{
	u8 kind = flags & (TCP_SYN | TCP_FIN | TCP_RST);

	return flags & (TCP_SYN | TCP_ACK | TCP_RST) && !(kind & (kind - 1));
}

/* TCP opens a session with SYN; in the middle of a connection (the gateway was restarted) also with a plain ACK,
 * so that the other side can answer and both learn. FIN and RST open nothing.
 */
static __always_inline enum verdict may_open(const struct packet *p)
{
	u8 flags = p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK);

	if (p->class != CLASS_TCP || flags == TCP_SYN || flags == TCP_ACK)
		return CONTINUE;
	return drop(tcp_flags_are_sane(p->tcp_flags) ? COUNT_drop_tcp_no_session : COUNT_drop_tcp_flags);
}

/* Follows one segment @p sent by the side of flow @from. A RST counts only with the very sequence number that
 * the other side acknowledged last, which an off-path attacker cannot know; data after it revives the session
 * (RFC 7857 section 2.2).
 */
static __always_inline void tcp_track(const struct settings *cfg, struct session *s, struct flow *from,
				      struct flow *to, const struct packet *p)
{
	if (p->tcp_flags & TCP_RST) {
		if (p->seq != to->last_ack)
			return;
		from->tcp_seen |= TCP_RST;
		session_disarm(cfg, s);
		return;
	}
	if (p->tcp_flags & TCP_SYN && !tcp_is_established(s)) {
		from->tcp_seen = 0; /* a new connection over the same endpoints */
		if (!(p->tcp_flags & TCP_ACK)) {
			to->tcp_seen = 0;
			to->last_ack = bpf_htonl(bpf_ntohl(p->seq) + 1); /* what it will acknowledge, if it does */
		}
	}
	from->tcp_seen &= ~TCP_RST;
	to->tcp_seen &= ~TCP_RST;
	from->tcp_seen |= p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_FIN);
	if (p->tcp_flags & TCP_ACK)
		from->last_ack = p->ack;
}
