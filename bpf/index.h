/* The index: from the wire 5-tuple of a flow to its session. An entry is four bytes: the slot and a tag, a few bits of the
 * 5-tuple's hash. A packet thus touches the line of one bucket and the line of its half of a session, and whether that is
 * the right one is decided there, by the whole 5-tuple. So it does no harm that an entry is read without a lock and may
 * lead to a slot that has been given to another session by then.
 *
 * The inbound flow of a session that stands in the slot of its external endpoint needs no entry: the packet names the slot.
 *
 * The hash is the multilinear one of Dietzfelbinger and Thorup, keyed at attach: for whoever does not know the key, two
 * 5-tuples meet no more often than by chance. The few entries whose bucket is full stand in a hash table of the kernel's;
 * a second bucket for them would have the verifier walk twice as much, for every lookup.
 */
#define SLOT_BITS 24 /* 64 external addresses and four million further sessions need no more */
#define SLOT_MASK ((1 << SLOT_BITS) - 1)

static __always_inline struct mapping_key endpoint(addr_t addr, __be16 port, u32 class, u32 wan)
{
	struct mapping_key key = { .addr = addr, .port = port, .class = class, .wan = wan };
	return key;
}

static __always_inline struct flow_key flow_outbound(struct mapping_key internal, addr_t remote, __be16 port)
{
	struct flow_key key = { .internal = internal, .remote = remote, .remote_port = port, .direction = OUTBOUND };
	return key;
}

static __always_inline struct flow_key flow_inbound(u32 mapping, addr_t remote, __be16 port)
{
	struct flow_key key = { .mapping = mapping, .remote = remote, .remote_port = port, .direction = INBOUND };
	return key;
}

static __always_inline struct flow_keys session_flows(const struct session *s)
{
	struct flow_keys keys = { .out = flow_outbound(s->internal, s->out.remote_addr, s->out.remote_port),
				  .in = flow_inbound(s->mapping, s->out.remote_addr, s->out.remote_port) };
	return keys;
}

static __always_inline u32 flow_hash(const struct settings *cfg, const struct flow_key *key)
{
	u32 rest = key->internal.port | (u32)key->internal.class << 16 | (u32)key->internal.wan << 24;
	const u64 *seed = cfg->seed;
	u64 sum = seed[0] + seed[1] * key->remote_port;

	for (int i = 0; i < ADDR_WORDS; i++)
		sum += seed[2 + i] * key->remote.word[i];
	if (key->direction == INBOUND)
		return (sum + seed[2 + ADDR_WORDS] * key->mapping) >> 32;
	for (int i = 0; i < ADDR_WORDS; i++)
		sum += seed[3 + ADDR_WORDS + i] * key->internal.addr.word[i];
	return (sum + seed[3 + 2 * ADDR_WORDS] * rest) >> 32;
}

static __always_inline struct bucket *bucket_of(const struct settings *cfg, u32 hash)
{
	u32 nth = (u64)hash * cfg->buckets >> 32;
	return buckets.lookup(&nth);
}

/* Never 0, which is no entry. */
static __always_inline u32 entry_of(u32 hash, u32 slot)
{
	return ((hash & 0xff) ?: 1) << SLOT_BITS | slot;
}

static __always_inline bool session_has(const struct session *s, const struct flow_key *key)
{
	const struct flow *flow = key->direction == OUTBOUND ? &s->out : &s->in;

	if (flow->remote_port != key->remote_port || !addr_equal(flow->remote_addr, key->remote))
		return false;
	if (key->direction == INBOUND)
		return s->mapping == key->mapping;
	return addr_equal(s->internal.addr, key->internal.addr) && s->internal.port == key->internal.port &&
	       s->internal.class == key->internal.class && s->internal.wan == key->internal.wan;
}

/* Does a session stand in the slot of that life, be it still on its way there? */
static __always_inline bool life_is_taken(u64 life)
{
	return life & LIFE_SESSION || (life & LIFE_STATE) == LIFE_OPENING;
}

static __always_inline u32 own_place_find(const struct flow_key *key, u32 except, struct session **found)
{
	struct session *s = session_at(key->mapping);

	if (!s || key->mapping == except || !session_has(s, key) || !life_is_taken(s->life))
		return NO_SLOT;
	*found = s;
	return key->mapping;
}

static __always_inline u32 bucket_find(const struct bucket *bucket, const struct flow_key *key, u32 tag, u32 except,
				       struct session **found)
{
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < BUCKET_ENTRIES; i++) {
		u32 entry = *(const volatile u32 *)&bucket->entry[i], slot = entry & SLOT_MASK;
		struct session *s;

		if (entry >> SLOT_BITS != tag || slot == except)
			continue;
		s = session_at(slot);
		if (s && session_has(s, key)) {
			*found = s;
			return slot;
		}
	}
	return NO_SLOT;
}

static __always_inline u32 overflow_find(const struct flow_key *key, u32 except, struct session **found)
{
	u32 *entry = overflow.lookup(key), slot = entry ? *entry : except;
	struct session *s;

	if (slot == except)
		return NO_SLOT;
	s = session_at(slot);
	if (!s || !session_has(s, key))
		return NO_SLOT;
	*found = s;
	return slot;
}

/* The slot of the session to which the flow @key belongs, dead or alive, but for @except; or NO_SLOT. Looks at the half of
 * its direction only, so that an accelerated packet stays within one cache line of it.
 */
static __always_inline u32 index_find(const struct settings *cfg, const struct flow_key *key, u32 except,
				      struct session **found)
{
	struct bucket *bucket;
	u32 hash, slot;

	*found = NULL;
	if (key->direction == INBOUND) {
		slot = own_place_find(key, except, found);
		if (*found)
			return slot;
	}
	hash = flow_hash(cfg, key);
	bucket = bucket_of(cfg, hash);
	if (!bucket)
		return NO_SLOT;
	slot = bucket_find(bucket, key, entry_of(hash, 0) >> SLOT_BITS, except, found);
	return *found || !bucket->was_full ? slot : overflow_find(key, except, found);
}

static __always_inline struct session *session_find_outbound(const struct settings *cfg, struct mapping_key internal,
							     addr_t remote, __be16 port)
{
	struct flow_key key = flow_outbound(internal, remote, port);
	struct session *s;

	index_find(cfg, &key, NO_SLOT, &s);
	return s;
}

static __always_inline struct session *session_find_inbound(const struct settings *cfg, u32 mapping, addr_t remote,
							    __be16 port)
{
	struct flow_key key = flow_inbound(mapping, remote, port);
	struct session *s;

	index_find(cfg, &key, NO_SLOT, &s);
	return s;
}

/* Entries change by atomics on 64 bits, the only ones that there are, so two at a time. */
static __always_inline u64 *bucket_pair(struct bucket *bucket, u32 i)
{
	return (u64 *)bucket->entry + i / 2;
}

static __always_inline bool bucket_put(struct bucket *bucket, u32 entry)
{
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < BUCKET_ENTRIES; i++) {
		u64 *pair = bucket_pair(bucket, i);
		u64 seen = *(volatile u64 *)pair, shift = i % 2 * 32;

		if (!(u32)(seen >> shift) &&
		    __sync_val_compare_and_swap(pair, seen, seen | (u64)entry << shift) == seen)
			return true;
	}
	return false;
}

static __always_inline bool bucket_take(struct bucket *bucket, u32 entry)
{
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < BUCKET_ENTRIES; i++) {
		if (bucket->entry[i] != entry)
			continue;
		__sync_fetch_and_and(bucket_pair(bucket, i), i % 2 ? 0xffffffffULL : 0xffffffffULL << 32);
		return true;
	}
	return false;
}

static __always_inline bool entry_put(const struct settings *cfg, struct flow_key *key, u32 slot)
{
	u32 hash = flow_hash(cfg, key);
	struct bucket *bucket = bucket_of(cfg, hash);

	if (!bucket)
		return false;
	if (bucket_put(bucket, entry_of(hash, slot)))
		return true;
	bucket->was_full = 1; /* for ever: it only makes a search longer */
	return !overflow.insert(key, &slot);
}

static __always_inline void entry_take(const struct settings *cfg, struct flow_key *key, u32 slot)
{
	u32 hash = flow_hash(cfg, key), *entry;
	struct bucket *bucket = bucket_of(cfg, hash);

	if (!bucket || bucket_take(bucket, entry_of(hash, slot)))
		return;
	entry = overflow.lookup(key);
	if (entry && *entry == slot)
		overflow.delete(key);
}

static __always_inline void index_leave(const struct settings *cfg, struct flow_keys *keys, u32 slot)
{
	entry_take(cfg, &keys->out, slot);
	if (keys->in.mapping != slot)
		entry_take(cfg, &keys->in, slot);
}

static __always_inline bool index_enter(const struct settings *cfg, struct flow_keys *keys, u32 slot)
{
	if (!entry_put(cfg, &keys->out, slot))
		return false;
	if (keys->in.mapping == slot || entry_put(cfg, &keys->in, slot))
		return true;
	entry_take(cfg, &keys->out, slot);
	return false;
}

/* The slot of another session than that in @slot with the same flow, or NO_SLOT. */
static __always_inline u32 index_other(const struct settings *cfg, const struct flow_key *key, u32 slot)
{
	struct session *other;
	u32 found = index_find(cfg, key, slot, &other);

	return other && (other->life & LIFE_STATE) != LIFE_RESTING ? found : NO_SLOT;
}
