/* Endpoint-independent mappings (RFC 4787 REQ-1) and further sessions: claiming a slot, opening, reopening
 * and reaping. A slot belongs to whoever set its bit in `claims`; everything after that changes by
 * compare-and-swap on session.life, so packets on several CPUs and the reaper can meet here without a lock.
 */
#define CLAIM_TRIES 16
#define CLAIM_WORDS 128
#define LOCAL_TRIES 4
#define RECLAIM_TRIES 16

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

/* LLVM's BPF backend crashes on __builtin_ctzll. */
static __always_inline u32 lowest_bit(u64 word)
{
	u32 bit = 0;

#pragma clang loop unroll(full)
	for (u32 half = 32; half; half /= 2) {
		if (word & ((1ULL << half) - 1))
			continue;
		word >>= half;
		bit += half;
	}
	return bit;
}

/* A free slot among CLAIM_WORDS words of the pool's two ranges (ports counted from slot @base), from a random word round,
 * or NO_SLOT. With one port in a hundred free that finds one, and a small pool is looked through whole; when it does not,
 * the sender's next packet looks elsewhere. Words at the edges of the pool hold foreign ports too, but those are claimed.
 * The loop only finds the word: what stands inside it is paid 128 times over in the verifier's time at attach.
 */
static __always_inline u32 slot_claim_scan(u32 base, const struct pool *pool)
{
	u32 low = (base + pool->first[0]) / 64, high = (base + pool->first[1]) / 64;
	u32 low_words = (pool->first[0] % 64 + pool->count[0] + 63) / 64;
	u32 words = low_words + (pool->first[1] % 64 + pool->count[1] + 63) / 64;
	u32 start = bpf_get_prandom_u32(), word = 0, slot;
	u64 free = 0;

	if (!words)
		return NO_SLOT;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < CLAIM_WORDS; i++) {
		u32 nth = (start + i) % words;
		u64 *claim;

		word = nth < low_words ? low + nth : high + nth - low_words;
		claim = claims.lookup(&word);
		if (!claim)
			return NO_SLOT;
		free = ~*claim;
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

/* A random free port of the pool, uniform over both ranges (RFC 6056), or NO_SLOT when every try met a taken one. */
static __always_inline u32 slot_claim_random(const struct settings *cfg, u32 external, u32 class)
{
	const struct pool *pool = &cfg->pool[class];

#pragma clang loop unroll(disable)
	for (int i = 0; i < CLAIM_TRIES; i++) {
		u32 nth = random_below(pool->count[0] + pool->count[1]);
		u32 port = nth < pool->count[0] ? pool->first[0] + nth :
						  pool->first[1] + nth - pool->count[0];
		u32 slot = slot_of(external, class, 0) + port;

		if (slot_claim(slot))
			return slot;
	}
	return NO_SLOT;
}

static __always_inline u32 slot_claim_further(void)
{
	const struct pool all = { .count = { FURTHER } };

#pragma clang loop unroll(disable)
	for (int i = 0; i < CLAIM_TRIES; i++) {
		u32 slot = FURTHER_BASE + random_below(FURTHER);

		if (slot_claim(slot))
			return slot;
	}
	return slot_claim_scan(FURTHER_BASE, &all);
}

static __always_inline void session_init(const struct settings *cfg, struct session *s, const struct packet *p,
					 u32 mapping, addr_t external, __be16 external_port)
{
	struct flow out = {
		.remote_addr = p->dst,
		.remote_port = p->dst_port,
		.new_addr = external,
		.new_port = external_port,
		.armed_at = cfg->disarmed_at,
		.last_seen = p->now,
	};
	struct flow in = out;

	in.new_addr = p->src;
	in.new_port = p->src_port;
	s->out = out;
	s->in = in;
	s->opened_at = p->now;
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

static __always_inline bool slot_is_published(const struct session *s, u32 slot)
{
	struct mapping_key endpoint = mapping_key_of(s);
	struct remote_key remote = remote_key_of(s);
	u32 *found = slot < FURTHER_BASE ? mappings.lookup(&endpoint) : remotes.lookup(&remote);

	return found && *found == slot;
}

static __always_inline void slot_unpublish(const struct session *s, u32 slot)
{
	struct mapping_key endpoint = mapping_key_of(s);
	struct remote_key remote = remote_key_of(s);

	if (!slot_is_published(s, slot))
		return;
	if (slot < FURTHER_BASE)
		mappings.delete(&endpoint);
	else
		remotes.delete(&remote);
}

/* Ends what is in @slot, of which @life was read before; its rest begins. XDP looks at no life, so it is disarmed too. */
static __always_inline bool slot_close(const struct settings *cfg, struct session *s, u32 slot, u64 life, u32 now)
{
	s->out.last_seen = now;
	if (!life_swap(s, life, (life & ~(LIFE_STATE | LIFE_SESSION)) | LIFE_RESTING))
		return false;
	session_disarm(cfg, s);
	slot_unpublish(s, slot);
	if (life & LIFE_SESSION)
		count(COUNT_session_closed);
	return true;
}

static __always_inline void further_close(const struct settings *cfg, struct session *s, u32 slot, u64 life, u32 now)
{
	struct session *mapping = session_at(s->mapping);

	if (slot_close(cfg, s, slot, life, now) && mapping)
		__sync_fetch_and_add(&mapping->life, -LIFE_FURTHER);
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
	if (life & LIFE_SESSION && !(force ? slot_is_published(s, slot) : session_is_expired(cfg, s, now)))
		return;
	if (slot >= FURTHER_BASE) {
		further_close(cfg, s, slot, life, now);
	} else if (!(life & LIFE_FURTHER_MASK)) {
		if (slot_close(cfg, s, slot, life, now))
			count(COUNT_mapping_closed);
	} else if (life & LIFE_SESSION && life_swap(s, life, life & ~LIFE_SESSION)) {
		session_disarm(cfg, s);
		count(COUNT_session_closed);
	}
}

/* The agent lets ports rest and returns them. Should it be dead for long, packets help themselves: any closed or
 * expired port of the pool will do then.
 */
static __always_inline u32 slot_reclaim(const struct settings *cfg, u32 external, u32 class, u32 now)
{
	const struct pool *pool = &cfg->pool[class];
	u32 base = slot_of(external, class, 0);

#pragma clang loop unroll(disable)
	for (int i = 0; i < RECLAIM_TRIES; i++) {
		u32 slot = base + pool->first[0] + random_below(pool->count[0]);
		struct session *s = session_at(slot);
		u64 life;

		if (!s)
			return NO_SLOT;
		slot_reap(cfg, slot, false, now);
		life = s->life;
		if ((life & LIFE_STATE) == LIFE_RESTING && life_swap(s, life, 0)) {
			count(COUNT_mapping_reclaimed);
			return slot;
		}
	}
	return NO_SLOT;
}

/* Has the gateway a socket of its own at this endpoint, listening or talking to this remote? */
static __always_inline bool socket_is_at(const struct packet *p, addr_t external, __be16 port, addr_t remote,
					 __be16 remote_port)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock;

	if (p->class == CLASS_ICMP)
		return false;
	tuple.ipv4.saddr = remote.word[0];
	tuple.ipv4.sport = remote_port;
	tuple.ipv4.daddr = external.word[0];
	tuple.ipv4.dport = port;
	sock = p->class == CLASS_TCP ?
		       bpf_skc_lookup_tcp(p->skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0) :
		       bpf_sk_lookup_udp(p->skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!sock)
		return false;
	bpf_sk_release(sock);
	return true;
}

static __always_inline bool slot_is_local(const struct settings *cfg, const struct packet *p, u32 slot)
{
	return socket_is_at(p, cfg->external[0], bpf_htons(slot % PORTS), p->dst, p->dst_port);
}

/* A claimed slot on which the gateway does not listen itself, or NO_SLOT. The gateway's own queries keep their
 * identifier when it is free: a raw socket cannot be asked whether it wants the reply.
 */
static __always_inline u32 slot_for_mapping(const struct settings *cfg, const struct packet *p, bool own)
{
	u32 slot = slot_of(0, p->class, p->src_port);

	if (own && p->class == CLASS_ICMP && slot_claim(slot))
		return slot;
#pragma clang loop unroll(disable)
	for (int i = 0; i < LOCAL_TRIES; i++) {
		slot = slot_claim_random(cfg, 0, p->class);
		if (slot == NO_SLOT)
			break;
		if (!slot_is_local(cfg, p, slot))
			return slot;
		slot_release(slot);
	}
	slot = slot_claim_scan(slot_of(0, p->class, 0), &cfg->pool[p->class]);
	if (slot == NO_SLOT)
		slot = slot_reclaim(cfg, 0, p->class, p->now);
	if (slot == NO_SLOT || !slot_is_local(cfg, p, slot))
		return slot;
	slot_release(slot);
	return NO_SLOT;
}

/* Makes mapping and session at once. The slot, which is what replies find, is complete before the internal
 * endpoint is published. NULL with *@slot set: another CPU was first, go on with its mapping.
 */
static __always_inline struct session *mapping_open(const struct settings *cfg, const struct packet *p, bool own,
						    u32 *slot, enum verdict *verdict)
{
	struct mapping_key key = { .addr = p->src, .port = p->src_port, .class = p->class };
	u32 claimed = slot_for_mapping(cfg, p, own);
	struct session *s = session_at(claimed);

	if (claimed == NO_SLOT || !s) {
		*verdict = drop(COUNT_drop_ports_exhausted);
		return NULL;
	}
	session_init(cfg, s, p, claimed, cfg->external[0], bpf_htons(claimed % PORTS));
	s->life = LIFE_LIVE | LIFE_SESSION;
	if (!mappings.insert(&key, &claimed)) {
		count(COUNT_mapping_opened);
		count(COUNT_session_opened);
		return s;
	}
	s->life = 0;
	slot_release(claimed);
	*slot = slot_of_internal(p->src, p->class, p->src_port);
	if (*slot == NO_SLOT)
		*verdict = drop(COUNT_drop_sessions_full);
	return NULL;
}

static __always_inline struct session *further_open(const struct settings *cfg, const struct packet *p, u32 mapping,
						    struct session *m, u64 life, enum verdict *verdict)
{
	struct remote_key key = { .mapping = mapping, .addr = p->dst, .port = p->dst_port };
	u32 slot = slot_claim_further();
	struct session *s = session_at(slot);

	if (slot == NO_SLOT || !s) {
		*verdict = drop(COUNT_drop_sessions_full);
		return NULL;
	}
	session_init(cfg, s, p, mapping, m->out.new_addr, m->out.new_port);
	if (!life_swap(m, life, life + LIFE_FURTHER))
		goto busy;
	s->life = LIFE_LIVE | LIFE_SESSION;
	if (!remotes.insert(&key, &slot)) {
		count(COUNT_session_opened);
		return s;
	}
	s->life = 0;
	__sync_fetch_and_add(&m->life, -LIFE_FURTHER);
busy:
	slot_release(slot);
	*verdict = drop(COUNT_drop_session_busy);
	return NULL;
}

/* Opens a session with a new remote endpoint on the mapping in @slot: in the mapping's own place when that is free
 * or its session expired, else in a further one.
 */
static __always_inline struct session *session_join(const struct settings *cfg, const struct packet *p, u32 slot,
						    enum verdict *verdict)
{
	struct session *m = session_at(slot);
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
	if (life & LIFE_SESSION && !session_is_expired(cfg, m, p->now))
		return further_open(cfg, p, slot, m, life, verdict);
	m->out.last_seen = p->now; /* before the swap, or the reaper could take what it finds there for expired */
	if (!life_swap(m, life, taken)) {
		*verdict = drop(COUNT_drop_session_busy);
		return NULL;
	}
	if (life & LIFE_SESSION)
		count(COUNT_session_closed);
	session_init(cfg, m, p, slot, m->out.new_addr, m->out.new_port);
	count(COUNT_session_opened);
	return m;
}

/* An expired session that its own host speaks on again starts anew in place. */
static __always_inline bool session_reopen(const struct settings *cfg, struct session *s, const struct packet *p)
{
	u64 life = s->life;

	if (!life_is_session(life))
		return false;
	s->out.last_seen = p->now; /* as in session_join() */
	if (!life_swap(s, life, life + LIFE_CHANGE))
		return false;
	session_init(cfg, s, p, s->mapping, s->out.new_addr, s->out.new_port);
	count(COUNT_session_reopened);
	return true;
}
