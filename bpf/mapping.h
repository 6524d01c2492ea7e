/* Endpoint-independent mappings (RFC 4787 REQ-1) and further sessions: claiming a slot, opening, reopening
 * and reaping. A slot belongs to whoever set its bit in `claims`; everything after that changes by
 * compare-and-swap on session.life, so packets on several CPUs and the reaper can meet here without a lock.
 */
#define CLAIM_TRIES 8
#define CLAIM_WORDS 64
#define FURTHER_TRIES 4
#define FURTHER_WORDS 16
#define RECLAIM_TRIES 8

static __always_inline bool slot_claim(u32 slot)
{
	u64 bit = 1ULL << (slot % 64);
	u32 word = slot / 64;
	u64 *claim = claims.lookup(&word);

	/* Look before the atomic: most tries on a full pool then cost no locked access. */
	return claim && !(*claim & bit) && !(__sync_fetch_and_or(claim, bit) & bit);
}

static __always_inline void slot_release(u32 slot)
{
	u32 word = slot / 64;
	u64 *claim = claims.lookup(&word);

	if (claim)
		__sync_fetch_and_and(claim, ~(1ULL << (slot % 64)));
}

/* Comparisons without jumps. In code that leads into a loop, each jump would have the verifier walk that loop once more;
 * the asm keeps LLVM from making jumps of them. Numbers below 2^63 only.
 */
static __always_inline u32 is_below(u64 a, u64 b)
{
	u64 difference = a - b;

	asm volatile("" : "+r"(difference));
	return difference >> 63;
}

static __always_inline u32 is_any(u64 word)
{
	word |= -word;
	asm volatile("" : "+r"(word));
	return word >> 63;
}

/* LLVM's BPF backend crashes on __builtin_ctzll. */
static __always_inline u32 lowest_bit(u64 word)
{
	word &= -word;
	return is_any(word & 0xaaaaaaaaaaaaaaaaULL) | is_any(word & 0xccccccccccccccccULL) << 1 |
	       is_any(word & 0xf0f0f0f0f0f0f0f0ULL) << 2 | is_any(word & 0xff00ff00ff00ff00ULL) << 3 |
	       is_any(word & 0xffff0000ffff0000ULL) << 4 | is_any(word & 0xffffffff00000000ULL) << 5;
}

/* A free slot among @tries words of the pool's two ranges (ports counted from slot @base), from a random word round,
 * or NO_SLOT; @fitting has the bits that will do. With one port in a hundred free that finds one, and a small pool is looked through whole; when it does not,
 * the sender's next packet looks elsewhere. Words at the edges of the pool hold foreign ports too, but those are claimed.
 * The loop only finds the word: what stands inside it is paid @tries times over in the verifier's time at attach.
 */
static __always_inline u32 slot_claim_scan(u32 base, const struct pool *pool, u64 fitting, u32 tries)
{
	u32 low = (base + pool->first[0]) / 64, high = (base + pool->first[1]) / 64;
	u32 low_words = (pool->first[0] % 64 + pool->count[0] + 63) / 64;
	u32 words = low_words + (pool->first[1] % 64 + pool->count[1] + 63) / 64;
	u32 start = bpf_get_prandom_u32(), word = 0, slot;
	u64 free = 0;

	if (!words)
		return NO_SLOT;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < tries; i++) {
		u32 nth = (start + i) % words;
		u64 *claim;

		word = nth < low_words ? low + nth : high + nth - low_words;
		claim = claims.lookup(&word);
		if (!claim)
			return NO_SLOT;
		free = ~*claim & fitting;
		if (free)
			break;
	}
	if (!free)
		return NO_SLOT;
	slot = word * 64 + lowest_bit(free);
	return slot_claim(slot) ? slot : NO_SLOT;
}

static __always_inline u32 random_below(u32 limit)
{
	return ((u64)bpf_get_prandom_u32() * limit) >> 32;
}

static __always_inline u32 pool_size(const struct pool *pool)
{
	return pool->count[0] + pool->count[1];
}

static __always_inline u32 pool_random_port(const struct pool *pool)
{
	u32 nth = random_below(pool_size(pool));

	return nth < pool->count[0] ? pool->first[0] + nth : pool->first[1] + nth - pool->count[0];
}

static __always_inline u32 pool_has(const struct pool *pool, u32 port)
{
	return is_below((u32)(port - pool->first[0]), pool->count[0]) |
	       is_below((u32)(port - pool->first[1]), pool->count[1]);
}

static __always_inline const struct pool *pool_for(const struct settings *cfg, u32 class, __be16 internal_port)
{
	u32 i = class & CLASS_MASK;
	u32 low = is_below(bpf_ntohs(internal_port), 1024) & is_any(cfg->pool[CLASS_ROOM + i].count[0]);
	u32 at = CLASS_ROOM * low + i;

	asm volatile("" : "+r"(at)); /* or LLVM drops the mask that the verifier of Linux 6.1 wants to see */
	return &cfg->pool[at & (2 * CLASS_ROOM - 1)];
}

static __always_inline bool slot_is_of_pool(const struct settings *cfg, u32 slot)
{
	u32 i = slot_class(slot) & CLASS_MASK;

	asm volatile("" : "+r"(i)); /* or LLVM drops the mask that the verifier wants to see */
	i &= CLASS_MASK;
	return pool_has(&cfg->pool[i], slot % PORTS) || pool_has(&cfg->pool[CLASS_ROOM + i], slot % PORTS);
}

static __always_inline u32 slot_claim_further(void)
{
	const struct pool all = { .count = { FURTHER } };

#pragma clang loop unroll(disable)
	for (int i = 0; i < FURTHER_TRIES; i++) {
		u32 slot = FURTHER_BASE + random_below(FURTHER);

		if (slot_claim(slot))
			return slot;
	}
	return slot_claim_scan(FURTHER_BASE, &all, ~0ULL, FURTHER_WORDS);
}

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

	in.new_addr = e->internal;
	in.new_port = e->internal_port;
	s->out = out;
	s->in = in;
	s->opened_at = now;
	s->mapping = mapping;
}

/* The entries that lead to a slot. A slot is complete, and can be found by the reaper, a moment before it is published;
 * and an entry of the same name may by then be another slot's.
 */
static __always_inline struct mapping_key mapping_key_of(const struct session *s)
{
	struct mapping_key key = { .addr = s->in.new_addr,
				   .port = s->in.new_port,
				   .class = slot_class(s->mapping) };
	return key;
}

static __always_inline struct remote_key remote_key_of(const struct session *s)
{
	struct remote_key key = { .mapping = s->mapping, .addr = s->out.remote_addr, .port = s->out.remote_port };
	return key;
}

static __always_inline struct reply_key reply_key_of(const struct session *s)
{
	struct reply_key key = { .addr = s->in.new_addr,
				 .remote_addr = s->out.remote_addr,
				 .port = s->in.new_port,
				 .remote_port = s->out.remote_port,
				 .class = slot_class(s->mapping) };
	return key;
}

static __always_inline bool slot_is_published(const struct session *s, u32 slot)
{
	struct mapping_key endpoint = mapping_key_of(s);
	struct remote_key remote = remote_key_of(s);
	struct reply_key reply = reply_key_of(s);
	u32 *found = slot >= FURTHER_BASE	       ? remotes.lookup(&remote) :
		     s->out.marks & SESSION_BY_REPLY ? replies.lookup(&reply) :
							       mappings.lookup(&endpoint);

	return found && *found == slot;
}

static __always_inline void mapping_unpublish(const struct session *s, u32 slot)
{
	struct mapping_key key = mapping_key_of(s);
	u32 *found = mappings.lookup(&key);

	if (found && *found == slot)
		mappings.delete(&key);
}

static __always_inline void remote_unpublish(const struct session *s, u32 slot)
{
	struct remote_key key = remote_key_of(s);
	u32 *found = remotes.lookup(&key);

	if (found && *found == slot)
		remotes.delete(&key);
}

static __always_inline void reply_unpublish(const struct reply_key *key, u32 slot)
{
	u32 *found = replies.lookup((struct reply_key *)key);

	if (found && *found == slot)
		replies.delete((struct reply_key *)key);
}

/* A session's end takes effect with a swap of its slot's life, after which the slot may be another's at once; so what is
 * to be tidied up is noted before.
 */
struct ending {
	struct reply_key reply;
	u8 marks;
};

static __always_inline struct ending session_ending(const struct session *s)
{
	struct ending ending = { .reply = reply_key_of(s), .marks = s->out.marks };
	return ending;
}

static __always_inline void session_ended(const struct ending *ending, u32 slot)
{
	count(COUNT_session_closed);
	if (ending->marks & SESSION_COUNTED)
		host_session_ended(ending->reply.addr);
	if (ending->marks & SESSION_BY_REPLY)
		reply_unpublish(&ending->reply, slot);
}

/* Ends what is in @slot, of which @life was read before; its rest begins. XDP looks at no life, so it is disarmed too. */
static __always_inline bool slot_close(const struct settings *cfg, struct session *s, u32 slot, u64 life, u32 now)
{
	struct ending ending = session_ending(s);

	s->out.last_seen = now;
	if (!life_swap(s, life, (life & ~(LIFE_STATE | LIFE_SESSION | LIFE_COUNTED)) | LIFE_RESTING))
		return false;
	session_disarm(cfg, s);
	if (slot < FURTHER_BASE)
		mapping_unpublish(s, slot);
	else
		remote_unpublish(s, slot);
	if (life & LIFE_COUNTED)
		host_mapping_ended(ending.reply.addr, ending.reply.class);
	if (life & LIFE_SESSION)
		session_ended(&ending, slot);
	return true;
}

static __always_inline void further_close(const struct settings *cfg, struct session *s, u32 slot, u64 life, u32 now)
{
	struct session *mapping = session_at(s->mapping);

	if (slot_close(cfg, s, slot, life, now) && mapping)
		__sync_fetch_and_add(&mapping->life, -LIFE_FURTHER);
}

/* The mapping stays, for its further sessions or because it is static. */
static __always_inline void session_close(const struct settings *cfg, struct session *s, u32 slot, u64 life)
{
	struct ending ending = session_ending(s);

	if (!life_swap(s, life, life & ~LIFE_SESSION))
		return;
	session_disarm(cfg, s);
	session_ended(&ending, slot);
}

/* Closes what is expired in @slot (or, forced, what is there): the session, and with its last session the mapping. */
static __always_inline void slot_reap(const struct settings *cfg, u32 slot, bool force, u32 now)
{
	struct session *s = session_at(slot);
	u64 life;

	if (!s)
		return;
	life = s->life;
	if ((life & LIFE_STATE) != LIFE_LIVE)
		return;
	if (life & LIFE_SESSION && !(force ? life & LIFE_STATIC || slot_is_published(s, slot) :
					     session_is_expired(cfg, s, now)))
		return;
	if (slot >= FURTHER_BASE) {
		further_close(cfg, s, slot, life, now);
	} else if (!(life & (LIFE_FURTHER_MASK | LIFE_STATIC))) {
		if (slot_close(cfg, s, slot, life, now))
			count(COUNT_mapping_closed);
	} else if (life & LIFE_SESSION) {
		session_close(cfg, s, slot, life);
	}
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
	slot_reap(cfg, slot, false, now);
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

/* A claimed slot on which the gateway does not listen itself, or NO_SLOT: a random free port of the pool, uniform over
 * both ranges (RFC 6056), or when every try met a taken one, whatever is found. A port of the other parity than the
 * internal one's may lie just outside the pool, where everything is taken.
 */
static __always_inline u32 slot_for_mapping(const struct settings *cfg, const struct packet *p, u32 external)
{
	const struct pool *pool = pool_for(cfg, p->class, p->src_port);
	u32 base = slot_of(external, p->class, 0), port = bpf_ntohs(p->src_port), parity = cfg->parity & 1, slot;
	u64 fitting = 0x5555555555555555ULL << (port & parity) | ((u64)parity - 1);
	u32 preferred = port_is_preferred(cfg, p, pool);

#pragma clang loop unroll(disable)
	for (int i = 0; i < CLAIM_TRIES; i++) {
		u32 number = pool_random_port(pool);

		number ^= (number ^ port) & (parity | -preferred);
		preferred = 0;
		slot = base + number;
		if (!slot_claim(slot))
			continue;
		if (!slot_is_local(cfg, p, slot))
			return slot;
		slot_release(slot);
	}
	slot = slot_claim_scan(base, pool, fitting, CLAIM_WORDS);
	if (slot == NO_SLOT && !parity)
		slot = slot_reclaim(cfg, base, pool, p->now);
	if (slot == NO_SLOT || !slot_is_local(cfg, p, slot))
		return slot;
	slot_release(slot);
	return NO_SLOT;
}

/* Makes mapping and session at once. The slot, which is what replies find, is complete before the internal
 * endpoint is published. NULL with *@slot set: another CPU was first, go on with its mapping.
 */
static __always_inline struct session *mapping_open(const struct settings *cfg, const struct packet *p,
						    const struct ends *e, u32 external, struct host *host,
						    u32 *slot,
						    enum verdict *verdict)
{
	struct mapping_key key = { .addr = e->internal, .port = e->internal_port, .class = p->class };
	u32 claimed = slot_blur(slot_for_mapping(cfg, p, external));
	struct session *s = session_at(claimed);

	if (claimed == NO_SLOT || !s) {
		*verdict = REFUSE;
		return NULL;
	}
	session_init(cfg, s, e, claimed, p->now);
	s->life = LIFE_LIVE | LIFE_SESSION | (host ? LIFE_COUNTED : 0);
	if (host)
		__sync_fetch_and_add(&host->mappings[p->class & CLASS_MASK], 1);
	if (!mappings.insert(&key, &claimed)) {
		count(COUNT_mapping_opened);
		count(COUNT_session_opened);
		return s;
	}
	if (host)
		__sync_fetch_and_add(&host->mappings[p->class & CLASS_MASK], -1);
	s->life = 0;
	slot_release(claimed);
	*slot = slot_of_internal(e->internal, p->class, e->internal_port);
	if (*slot == NO_SLOT)
		*verdict = refuse(COUNT_drop_sessions_full);
	return NULL;
}

/* Leads to @slot by the 5-tuple where the mapping does not; CONTINUE unless that is not possible. */
static __always_inline enum verdict reply_publish(const struct ends *e, u32 class, u32 slot)
{
	struct reply_key key = { .addr = e->internal,
				 .remote_addr = e->remote,
				 .port = e->internal_port,
				 .remote_port = e->remote_port,
				 .class = class };

	if (!(e->marks & SESSION_BY_REPLY) || !replies.insert(&key, &slot))
		return CONTINUE;
	return drop(replies.lookup(&key) ? COUNT_drop_reply_taken : COUNT_drop_sessions_full);
}

static __always_inline struct session *further_open(const struct settings *cfg, const struct ends *e, u32 *slot,
						    struct session *m, u64 life, u32 now, enum verdict *verdict)
{
	struct remote_key key = { .mapping = *slot, .addr = e->remote, .port = e->remote_port };
	u32 mapping = *slot, further = slot_claim_further();
	struct session *s = session_at(further);

	if (further == NO_SLOT || !s) {
		*verdict = refuse(COUNT_drop_sessions_full);
		return NULL;
	}
	session_init(cfg, s, e, mapping, now);
	*verdict = reply_publish(e, slot_class(mapping), further);
	if (*verdict != CONTINUE)
		goto release;
	if (!life_swap(m, life, life + LIFE_FURTHER))
		goto busy;
	s->life = LIFE_LIVE | LIFE_SESSION;
	if (!remotes.insert(&key, &further)) {
		count(COUNT_session_opened);
		*slot = further;
		return s;
	}
	s->life = 0;
	__sync_fetch_and_add(&m->life, -LIFE_FURTHER);
busy:
	*verdict = drop(COUNT_drop_session_busy);
	if (e->marks & SESSION_BY_REPLY) {
		struct reply_key reply = reply_key_of(s);

		reply_unpublish(&reply, further);
	}
release:
	slot_release(further);
	return NULL;
}

/* Opens a session with a new remote endpoint on the mapping in *@slot: in the mapping's own place when that is free
 * or its session expired, else in a further one; *@slot becomes its place.
 */
static __always_inline struct session *session_join(const struct settings *cfg, const struct ends *e, u32 *slot, u32 now,
						    enum verdict *verdict)
{
	struct remote_key key = { .mapping = *slot, .addr = e->remote, .port = e->remote_port };
	struct session *m = session_at(*slot);
	struct ending ending;
	bool taken_by_live;
	u64 life, taken;

	if (!m) {
		*verdict = drop(COUNT_drop_session_busy);
		return NULL;
	}
	life = m->life;
	taken = (life + LIFE_CHANGE) | LIFE_SESSION;
	if ((life & LIFE_STATE) != LIFE_LIVE) {
		*verdict = drop(COUNT_drop_session_busy);
		return NULL;
	}
	taken_by_live = life & LIFE_SESSION && !session_is_expired(cfg, m, now);
	if (taken_by_live && flow_is_with(&m->out, e->remote, e->remote_port)) {
		*verdict = drop(COUNT_drop_reply_taken);
		return NULL;
	}
	/* Another host that shares the port speaks with this remote; whoever stood here would get its answers. */
	if (!taken_by_live && life & LIFE_FURTHER_MASK && remotes.lookup(&key)) {
		*verdict = drop(COUNT_drop_reply_taken);
		return NULL;
	}
	/* The place of a mapping that is not static tells whose it is, so no other host's session may stand there. */
	if (taken_by_live || (e->marks & SESSION_BY_REPLY && !(life & LIFE_STATIC)))
		return further_open(cfg, e, slot, m, life, now, verdict);
	ending = session_ending(m);
	m->out.last_seen = now; /* before the swap, or the reaper could take what it finds there for expired */
	if (!life_swap(m, life, taken)) {
		*verdict = drop(COUNT_drop_session_busy);
		return NULL;
	}
	if (life & LIFE_SESSION)
		session_ended(&ending, *slot);
	session_init(cfg, m, e, *slot, now);
	*verdict = reply_publish(e, slot_class(*slot), *slot);
	if (*verdict != CONTINUE) {
		life_swap(m, taken, taken & ~LIFE_SESSION);
		return NULL;
	}
	count(COUNT_session_opened);
	return m;
}

/* An expired session over the same endpoints starts anew in place. */
static __always_inline bool session_reopen(const struct settings *cfg, struct session *s, const struct ends *e, u32 now)
{
	struct ends same = *e;
	u64 life = s->life;

	if (!life_is_session(life) || s->in.new_port != e->internal_port || !addr_equal(s->in.new_addr, e->internal))
		return false;
	same.marks = (s->out.marks & (SESSION_BY_REPLY | SESSION_COUNTED)) | (e->marks & SESSION_FROM_OUTSIDE);
	s->out.last_seen = now; /* as in session_join() */
	if (!life_swap(s, life, life + LIFE_CHANGE))
		return false;
	session_init(cfg, s, &same, s->mapping, now);
	count(COUNT_session_reopened);
	return true;
}
