/* Endpoint-independent mappings (RFC 4787 REQ-1) and their sessions: opening, reopening and reaping. Once a slot is claimed
 * (claim.h), everything changes by compare-and-swap on session.life, so packets on several CPUs and the reaper can meet here
 * without a lock.
 */
#define CLAIM_TRIES 8
#define RECLAIM_TRIES 32

static __always_inline void session_init(const struct settings *cfg, struct session *s, const struct ends *e,
					 u32 mapping, u32 now)
{
	struct flow out = {
		.remote_addr = e->remote,
		.remote_port = e->remote_port,
		.new_addr = slot_addr(cfg, mapping),
		.new_port = slot_port(mapping),
		.armed_at = cfg->disarmed_at,
		.last_seen = now,
		.marks = e->marks,
	};
	struct flow in = out;
	struct traffic none = {};

	in.new_addr = e->internal;
	in.new_port = e->internal_port;
	s->internal = endpoint(e->internal, e->internal_port, slot_class(mapping), slot_wan(cfg, mapping));
	s->out = out;
	s->in = in;
	s->sent = none;
	s->received = none;
	s->opened_at = now;
	s->mapping = mapping;
}

static __always_inline void mapping_closed(const struct settings *cfg, struct mapping_key key, u32 slot, u64 life)
{
	u32 *found = mappings.lookup(&key);

	front_take(cfg, key, slot);
	if (found && *found == slot)
		mappings.delete(&key);
	if (life & LIFE_COUNTED)
		host_mapping_ended(key.addr, key.class);
	count(COUNT_mapping_closed);
}

static __always_inline struct ending *session_ending(const struct settings *cfg, const struct session *s)
{
	struct scratch *scratch = scratch_get();
	struct ending *ending;

	if (!scratch)
		return NULL;
	ending = &scratch->ending;
	ending->flows = session_flows(s);
	ending->owner = endpoint(s->in.new_addr, s->in.new_port, slot_class(s->mapping), slot_wan(cfg, s->mapping));
	ending->mapping = s->mapping;
	ending->internal = s->internal.addr;
	ending->marks = s->out.marks;
	return ending;
}

static __always_inline void session_ended(const struct settings *cfg, struct ending *ending, u32 slot,
					  const struct session *s, u64 life, enum close_reason reason, u32 now)
{
	count(COUNT_session_closed);
	event_closed(s, life, reason, now);
	if (ending->marks & SESSION_INDEXED)
		index_leave(cfg, &ending->flows, slot);
	if (ending->marks & SESSION_COUNTED)
		host_session_ended(ending->internal);
	if (ending->marks & SESSION_ALG)
		control_close(&ending->flows.in);
}

/* Ends what is expired in @slot (or, for another reason, what is there): the session, and with its last session the mapping, whose
 * rest begins. XDP looks at no life, so it is disarmed too.
 */
static __always_inline void slot_reap(const struct settings *cfg, u32 slot, enum close_reason reason, u32 now)
{
	struct session *s = session_at(slot), *mapping;
	struct ending *ending;
	u64 life, left;
	bool stays;

	if (!s)
		return;
	life = s->life;
	stays = slot < further_base(cfg) && life & (LIFE_FURTHER_MASK | LIFE_STATIC);
	if ((life & LIFE_STATE) != LIFE_LIVE || (stays && !(life & LIFE_SESSION)))
		return;
	if (life & LIFE_SESSION && reason == CLOSE_EXPIRED && !session_is_expired(cfg, s, now))
		return;
	ending = session_ending(cfg, s);
	if (!ending)
		return;
	if (!stays)
		s->out.last_seen = now;
	left = stays ? life & ~LIFE_SESSION : (life & ~(LIFE_STATE | LIFE_SESSION | LIFE_COUNTED)) | LIFE_RESTING;
	if (!life_swap(s, life, left))
		return;
	session_disarm(cfg, s);
	if (!stays && slot < further_base(cfg))
		mapping_closed(cfg, ending->owner, slot, life);
	mapping = session_at(ending->mapping);
	if (slot >= further_base(cfg) && mapping)
		__sync_fetch_and_add(&mapping->life, -LIFE_FURTHER);
	if (life & LIFE_SESSION)
		session_ended(cfg, ending, slot, s, left, reason, now);
}

static __always_inline bool slot_is_to_be_had(const struct settings *cfg, const struct session *s, u32 now)
{
	u64 life = s->life;

	if ((life & LIFE_STATE) == LIFE_RESTING)
		return true;
	return (life & LIFE_STATE) == LIFE_LIVE && !(life & (LIFE_FURTHER_MASK | LIFE_STATIC)) &&
	       (!(life & LIFE_SESSION) || session_is_expired(cfg, s, now));
}

/* The agent lets ports rest and returns them. Should it be dead for long, packets help themselves: any closed or
 * expired port of the pool will do then.
 */
static __always_inline u32 slot_reclaim(const struct settings *cfg, u32 base, const struct pool *pool, u32 now)
{
	struct session *s = NULL;
	u32 slot = NO_SLOT;
	u64 life;

#pragma clang loop unroll(disable)
	for (int i = 0; i < RECLAIM_TRIES; i++) {
		slot = base + pool_random_port(pool);
		s = session_at(slot);
		if (!s)
			return NO_SLOT;
		if (slot_is_to_be_had(cfg, s, now))
			break;
	}
	if (!s)
		return NO_SLOT;
	slot_reap(cfg, slot, CLOSE_EXPIRED, now);
	life = s->life;
	if ((life & LIFE_STATE) != LIFE_RESTING || !life_swap(s, life, 0))
		return NO_SLOT;
	count(COUNT_mapping_reclaimed);
	return slot;
}

/* Has the gateway a socket of its own at this endpoint, listening or talking to this remote? */
static __always_inline bool socket_is_at(const struct packet *p, addr_t external, __be16 port, addr_t remote,
					 __be16 remote_port)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock;
	u64 class = p->class;

	asm volatile("" : "+r"(class)); /* or LLVM makes loops around this for each class */
	if (class == CLASS_ICMP)
		return false;
	tuple.ipv4.saddr = remote.word[0];
	tuple.ipv4.sport = remote_port;
	tuple.ipv4.daddr = external.word[0];
	tuple.ipv4.dport = port;
	sock = class == CLASS_TCP ?
		       bpf_skc_lookup_tcp(p->skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0) :
		       bpf_sk_lookup_udp(p->skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!sock)
		return false;
	bpf_sk_release(sock);
	return true;
}

static __always_inline bool slot_is_local(const struct settings *cfg, const struct packet *p, u32 slot)
{
	return socket_is_at(p, slot_addr(cfg, slot), slot_port(slot), p->dst, p->dst_port);
}

/* Is the internal port tried first? The gateway's own queries always keep their identifier when it is free: a raw socket
 * cannot be asked whether it wants the reply.
 */
static __always_inline u32 port_is_preferred(const struct settings *cfg, const struct packet *p, const struct pool *pool)
{
	u32 own_query = p->own & ~is_any(p->class ^ CLASS_ICMP);

	return (cfg->preserve | own_query) & pool_has(pool, bpf_ntohs(p->src_port));
}

/* Has both lines of a slot fetched side by side, while its port is looked at: they are cold, and about to be written. */
static __always_inline void slot_fetch(u32 slot)
{
	struct session *s = session_at(slot);

	if (!s)
		return;
	*(volatile u32 *)&s->opened_at;
	*(volatile u32 *)&s->mapping;
}

/* In a word of `claims`, the bits of ports of the internal port's parity, or all (RFC 4787 REQ-4). */
static __always_inline u64 ports_fitting(const struct settings *cfg, __be16 internal_port)
{
	u32 parity = cfg->parity & 1;

	return 0x5555555555555555ULL << (bpf_ntohs(internal_port) & parity) | ((u64)parity - 1);
}

/* A claimed slot on which the gateway does not listen itself, or NO_SLOT: a random free port of the pool, uniform over
 * both ranges (RFC 6056), or when every try met a taken one, whatever is found. A port of the other parity than the
 * internal one's may lie just outside the pool, where everything is taken.
 */
static __always_inline u32 slot_for_mapping(const struct settings *cfg, const struct packet *p, const struct pool *pool, u32 external)
{
	u32 base = slot_of(external, p->class, 0), port = bpf_ntohs(p->src_port), parity = cfg->parity & 1, slot;
	u64 fitting = ports_fitting(cfg, p->src_port);
	u32 preferred = port_is_preferred(cfg, p, pool);

#pragma clang loop unroll(disable)
	for (int i = 0; i < CLAIM_TRIES; i++) {
		u32 number = pool_random_port(pool);

		number ^= (number ^ port) & (parity | -preferred);
		preferred = 0;
		slot = base + number;
		if (!slot_claim(slot))
			continue;
		slot_fetch(slot);
		if (!slot_is_local(cfg, p, slot))
			return slot;
		slot_release(slot);
	}
	slot = slot_claim_scan(base, pool, fitting);
	if (slot == NO_SLOT && !parity)
		slot = slot_reclaim(cfg, base, pool, p->now);
	if (slot == NO_SLOT || !slot_is_local(cfg, p, slot))
		return slot;
	slot_release(slot);
	return NO_SLOT;
}

/* Whose port it is. Said before the mapping is published. */
static __always_inline void mapping_init(const struct settings *cfg, struct session *s, u32 slot, const struct ends *e, u32 now)
{
	addr_t nobody = {};

	s->in.new_addr = e->internal;
	s->in.new_port = e->internal_port;
	s->out.new_addr = slot_addr(cfg, slot);
	s->out.new_port = slot_port(slot);
	s->out.last_seen = now;
	s->out.remote_addr = s->in.remote_addr = nobody;
	s->out.remote_port = s->in.remote_port = 0;
	s->mapping = slot;
}

/* A port for a new mapping, or NO_SLOT. With blocks the gateway itself is a host like others, as its queries have identifiers. */
static __always_inline u32 mapping_slot(const struct settings *cfg, const struct packet *p, u32 external)
{
	const struct pool *pool;
	struct tenant *tenant;
	u32 slot;

	if (!PORT_BLOCKS)
		return slot_blur(slot_for_mapping(cfg, p, pool_for(cfg, p->class, p->src_port), external));
	tenant = tenant_get(p->src);
	pool = tenant ? block_pool(cfg, tenant, p, external, ports_fitting(cfg, p->src_port)) : NULL;
	slot = pool ? slot_blur(slot_for_mapping(cfg, p, pool, external)) : NO_SLOT;
	if (slot == NO_SLOT || block_keep(cfg, slot, p->src))
		return slot;
	slot_release(slot);
	return NO_SLOT;
}

/* Makes a mapping, which has no session yet, and returns its slot; that of another CPU, should that have been first;
 * NO_SLOT when no port is to be had.
 */
static __always_inline u32 mapping_open(const struct settings *cfg, const struct packet *p, const struct ends *e,
					u32 external, struct host *host)
{
	struct mapping_key key = endpoint(e->internal, e->internal_port, p->class, p->wan);
	u32 slot = mapping_slot(cfg, p, external);
	struct session *s = session_at(slot);

	if (slot == NO_SLOT || !s)
		return NO_SLOT;
	mapping_init(cfg, s, slot, e, p->now);
	if (host)
		__sync_fetch_and_add(&host->mappings[p->class & CLASS_MASK], 1);
	s->life = LIFE_OPENING | (host ? LIFE_COUNTED : 0); /* nobody ends it before it can be found */
	if (!mappings.insert(&key, &slot)) {
		front_put(cfg, key, slot);
		life_settle(s, 0);
		count(COUNT_mapping_opened);
		return slot;
	}
	if (host)
		__sync_fetch_and_add(&host->mappings[p->class & CLASS_MASK], -1);
	s->life = 0;
	slot_release(slot);
	return slot_of_internal(key);
}

/* A place for a session of the mapping @m in @slot: the mapping's own when that is free or its session expired, else
 * a further one, or NO_SLOT. The place of a mapping that is not static tells whose it is, so no other host's session may
 * stand there.
 */
static __always_inline u32 session_place(const struct settings *cfg, const struct ends *e, u32 slot, struct session *m,
					 u64 life, u32 now)
{
	bool is_own = m->in.new_port == e->internal_port && addr_equal(m->in.new_addr, e->internal);

	if ((life & LIFE_SESSION && !session_is_expired(cfg, m, now)) || !(is_own || life & LIFE_STATIC))
		return slot_claim_further(cfg, further_place(cfg, slot, e->remote, e->remote_port));
	return slot;
}

/* From now on lookups find the session being opened in @s. A swap even where there is nothing to be changed, as it is the
 * barrier between being seen and looking for others.
 */
static __always_inline void session_show(struct session *s)
{
	u64 life = s->life;

	life_swap(s, life, life | LIFE_OPENING);
}

/* Ends the expired session in a mapping's own place, if there is one, for another to be made there. Until that is alive
 * nobody joins the mapping, and the reaper leaves it alone.
 */
static __always_inline bool session_clear(const struct settings *cfg, struct session *m, u32 slot, u64 life, u32 now)
{
	u64 left = ((life + LIFE_CHANGE) & ~LIFE_SESSION) | LIFE_OPENING;
	struct ending *ending = session_ending(cfg, m);

	if (!ending || !life_swap(m, life, left))
		return false;
	if (life & LIFE_SESSION)
		session_ended(cfg, ending, slot, m, left, CLOSE_EXPIRED, now);
	return true;
}

/* Has another session, not expired, one of the 5-tuples @flows? That is asked when the entries of both stand, so of two CPUs
 * that open the same one at least sees the other.
 */
static __always_inline bool session_is_second(const struct settings *cfg, const struct flow_keys *flows, bool is_mapped,
					      u32 place, u32 now)
{
	u32 mapping = is_mapped ? flows->in.mapping : slot_of_internal(flows->out.internal);
	u32 other = slot_blur(index_other(cfg, &flows->out, mapping, place));
	struct session *first = session_at(other);
	u64 life;

	if (index_other(cfg, &flows->in, flows->in.mapping, place) != NO_SLOT)
		return true;
	if (!first)
		return false;
	slot_reap(cfg, other, CLOSE_EXPIRED, now);
	life = first->life & (LIFE_STATE | LIFE_SESSION);
	return life != LIFE_RESTING && life != LIFE_LIVE;
}

/* Opens a session with a new remote endpoint on the mapping in *@slot, which becomes its place. It comes alive last, when
 * all that leads to it is there.
 */
static __always_inline struct session *session_join(const struct settings *cfg, const struct ends *e, u32 *slot, u32 now,
						    enum verdict *verdict)
{
	struct session *m = session_at(*slot), *s;
	struct scratch *scratch = scratch_get();
	u64 life = m && scratch ? m->life : 0;
	struct flow_keys *flows;
	u32 place;

	if (!scratch || (life & LIFE_STATE) != LIFE_LIVE) {
		*verdict = deny(COUNT_drop_session_busy, DROP);
		return NULL;
	}
	place = slot_blur(session_place(cfg, e, *slot, m, life, now));
	s = session_at(place);
	if (!s) {
		*verdict = deny(COUNT_drop_sessions_full, REFUSE);
		return NULL;
	}
	/* From now on the mapping is not idle, and stays in `mappings`. */
	if (place == *slot ? !session_clear(cfg, m, place, life, now) : !life_swap(m, life, life + LIFE_FURTHER)) {
		if (place != *slot)
			slot_release(place);
		*verdict = deny(COUNT_drop_session_busy, DROP);
		return NULL;
	}
	session_init(cfg, s, e, *slot, now);
	session_show(s);
	flows = &scratch->joining;
	*flows = session_flows(s);
	if (!place_is_expected(cfg, flows, place) ||
	    !(e->is_mapped || slot_of_internal(flows->out.internal) == flows->in.mapping)) {
		if (!index_enter(cfg, flows, place)) {
			*verdict = deny(COUNT_drop_sessions_full, DROP);
			goto undo;
		}
		s->out.marks |= SESSION_INDEXED;
	}
	if (session_is_second(cfg, flows, e->is_mapped, place, now))
		*verdict = deny(COUNT_drop_reply_taken, DROP);
	if (*verdict == CONTINUE) {
		count(COUNT_session_opened);
		control_open(s, now);
		life_settle(s, place == *slot ? LIFE_SESSION : LIFE_LIVE | LIFE_SESSION);
		*slot = place;
		return s;
	}
	if (s->out.marks & SESSION_INDEXED)
		index_leave(cfg, flows, place);
undo:
	if (place == *slot) {
		life_settle(s, 0);
	} else {
		s->life = 0;
		slot_release(place);
		__sync_fetch_and_add(&m->life, -LIFE_FURTHER);
	}
	return NULL;
}

/* An expired session over the same endpoints starts anew in place. */
static __always_inline bool session_reopen(const struct settings *cfg, struct session *s, const struct ends *e, u32 now)
{
	struct ends same = *e;
	u64 life = s->life;

	if (!life_is_session(life) || s->in.new_port != e->internal_port || !addr_equal(s->in.new_addr, e->internal))
		return false;
	same.marks = (s->out.marks & SESSION_KEPT) | (e->marks & ~SESSION_KEPT);
	s->out.last_seen = now; /* as in session_join() */
	if (!life_swap(s, life, life + LIFE_CHANGE))
		return false;
	event_of_session(s, EVENT_CLOSED, now);
	if (s->out.marks & SESSION_ALG & ~same.marks) {
		struct flow_key inbound = flow_inbound(s->mapping, s->out.remote_addr, s->out.remote_port);

		control_close(&inbound);
	}
	session_init(cfg, s, &same, s->mapping, now);
	control_open(s, now);
	count(COUNT_session_reopened);
	return true;
}
