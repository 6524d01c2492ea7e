/* The index: from the wire 5-tuple of a flow to its session. Two entries a session, one for each direction, of four bytes:
 * the slot and a tag, a few bits of the 5-tuple's hash. A packet thus touches the line of one bucket and the line of its
 * half of a session, and whether that is the right one is decided there, by the whole 5-tuple. So it does no harm that an
 * entry is read without a lock and may lead to a slot that has been given to another session by then.
 *
 * The hash is the multilinear one of Dietzfelbinger and Thorup, keyed at attach: for whoever does not know the key, two
 * 5-tuples meet no more often than by chance. An entry stands in its bucket or, when that was full, in another one.
 */
enum direction { OUTBOUND, INBOUND };

struct flow_key {
	struct mapping_key internal; /* outbound flows start there */
	u32 mapping; /* inbound ones end there: the slot of the external endpoint */
	addr_t remote;
	__be16 remote_port;
};

#define BUCKET_CHOICES 2
#define SLOT_BITS 24
#define SLOT_MASK ((1 << SLOT_BITS) - 1)

_Static_assert(SLOTS <= 1 << SLOT_BITS, "a slot fits an entry");

static __always_inline struct mapping_key endpoint(addr_t addr, __be16 port, u32 class, u32 wan)
{
	struct mapping_key key = { .addr = addr, .port = port, .class = class, .wan = wan };
	return key;
}

static __always_inline struct flow_key session_key(const struct session *s)
{
	struct flow_key key = { .internal = s->internal,
				.mapping = s->mapping,
				.remote = s->out.remote_addr,
				.remote_port = s->out.remote_port };
	return key;
}

static __always_inline u32 flow_hash(const struct settings *cfg, const struct flow_key *key, enum direction direction)
{
	const u64 *seed = cfg->seed;
	u32 rest = key->internal.port | (u32)key->internal.class << 16 | (u32)key->internal.wan << 24;
	u64 sum = seed[0] + seed[1] * key->remote_port;

	for (int i = 0; i < ADDR_WORDS; i++)
		sum += seed[2 + i] * key->remote.word[i];
	if (direction == INBOUND)
		return (sum + seed[2 + ADDR_WORDS] * key->mapping) >> 32;
	for (int i = 0; i < ADDR_WORDS; i++)
		sum += seed[3 + ADDR_WORDS + i] * key->internal.addr.word[i];
	return (sum + seed[3 + 2 * ADDR_WORDS] * rest) >> 32;
}

static __always_inline struct bucket *bucket_of(u32 hash)
{
	u32 nth = (u64)hash * BUCKETS >> 32;
	return buckets.lookup(&nth);
}

/* Where an entry stands that found its bucket full. */
static __always_inline u32 hash_other(u32 hash)
{
	return hash * 0x9e3779b1;
}

/* Never 0, which is no entry. */
static __always_inline u32 entry_of(u32 hash, u32 slot)
{
	return ((hash & 0xff) ?: 1) << SLOT_BITS | slot;
}

static __always_inline bool session_has(const struct session *s, const struct flow_key *key, enum direction direction)
{
	const struct flow *flow = direction == OUTBOUND ? &s->out : &s->in;

	if (flow->remote_port != key->remote_port || !addr_equal(flow->remote_addr, key->remote))
		return false;
	if (direction == INBOUND)
		return s->mapping == key->mapping;
	return addr_equal(s->internal.addr, key->internal.addr) && s->internal.port == key->internal.port &&
	       s->internal.class == key->internal.class && s->internal.wan == key->internal.wan;
}

static __always_inline u32 bucket_find(const struct bucket *bucket, const struct flow_key *key, enum direction direction,
				       u32 tag, u32 except, struct session **found)
{
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < BUCKET_ENTRIES; i++) {
		u32 entry = *(const volatile u32 *)&bucket->entry[i], slot = entry & SLOT_MASK;
		struct session *s;

		if (entry >> SLOT_BITS != tag || slot == except)
			continue;
		s = session_at(slot);
		if (s && session_has(s, key, direction)) {
			*found = s;
			return slot;
		}
	}
	return NO_SLOT;
}

/* The slot of the session to which the flow @key belongs, dead or alive, but for @except; or NO_SLOT. Looks at the half of
 * @direction only, so that an accelerated packet stays within one cache line of it.
 */
static __always_inline u32 index_find(const struct settings *cfg, const struct flow_key *key, enum direction direction,
				      u32 except, struct session **found)
{
	u32 hash = flow_hash(cfg, key, direction), tag = entry_of(hash, 0) >> SLOT_BITS;

	*found = NULL;
#pragma clang loop unroll(disable)
	for (int i = 0; i < BUCKET_CHOICES; i++) {
		struct bucket *bucket = bucket_of(hash);
		u32 slot = bucket ? bucket_find(bucket, key, direction, tag, except, found) : NO_SLOT;

		if (*found || !bucket || !bucket->was_full)
			return slot;
		hash = hash_other(hash);
	}
	return NO_SLOT;
}

static __always_inline struct session *session_find_outbound(const struct settings *cfg, struct mapping_key internal,
							     addr_t remote, __be16 port)
{
	struct flow_key key = { .internal = internal, .remote = remote, .remote_port = port };
	struct session *s;

	index_find(cfg, &key, OUTBOUND, NO_SLOT, &s);
	return s;
}

static __always_inline struct session *session_find_inbound(const struct settings *cfg, u32 mapping, addr_t remote,
							    __be16 port)
{
	struct flow_key key = { .mapping = mapping, .remote = remote, .remote_port = port };
	struct session *s;

	index_find(cfg, &key, INBOUND, NO_SLOT, &s);
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

static __always_inline bool entry_put(u32 hash, u32 slot)
{
	u32 entry = entry_of(hash, slot);

#pragma clang loop unroll(disable)
	for (int i = 0; i < BUCKET_CHOICES; i++) {
		struct bucket *bucket = bucket_of(hash);

		if (bucket && bucket_put(bucket, entry))
			return true;
		if (bucket)
			bucket->was_full = 1; /* for ever: it only makes a search longer */
		hash = hash_other(hash);
	}
	return false;
}

static __always_inline void entry_take(u32 hash, u32 slot)
{
	u32 entry = entry_of(hash, slot);

#pragma clang loop unroll(disable)
	for (int i = 0; i < BUCKET_CHOICES; i++) {
		struct bucket *bucket = bucket_of(hash);

		if (bucket && bucket_take(bucket, entry))
			return;
		hash = hash_other(hash);
	}
}

static __always_inline struct hashes session_hashes(const struct settings *cfg, const struct session *s)
{
	struct flow_key key = session_key(s);
	struct hashes hashes = { .out = flow_hash(cfg, &key, OUTBOUND), .in = flow_hash(cfg, &key, INBOUND) };

	return hashes;
}

static __always_inline void index_leave(struct hashes hashes, u32 slot)
{
	entry_take(hashes.out, slot);
	entry_take(hashes.in, slot);
}

static __always_inline bool index_enter(struct hashes hashes, u32 slot)
{
	if (!entry_put(hashes.out, slot))
		return false;
	if (entry_put(hashes.in, slot))
		return true;
	entry_take(hashes.out, slot);
	return false;
}

/* The slot of another session than that in @slot with the same flow, or NO_SLOT. */
static __always_inline u32 index_other(const struct settings *cfg, const struct session *s, u32 slot,
				       enum direction direction)
{
	struct flow_key key = session_key(s);
	struct session *other;
	u32 found = index_find(cfg, &key, direction, slot, &other);

	return other && (other->life & LIFE_STATE) != LIFE_RESTING ? found : NO_SLOT;
}
