/* From the wire 5-tuple of a flow to its session; what that costs is the cold cache lines it touches.
 *
 * Most sessions stand in an *expected place*: in the slot of their mapping, which a packet from outside names and one from
 * inside looks up by its internal endpoint; or, where that has one already, in the slot that the hash of mapping and remote
 * endpoint says. Whether it is the right one is decided there, by the whole 5-tuple, on the line of the packet's direction.
 *
 * The index is for sessions that found their place taken, or are not of their internal endpoint's mapping. An entry is four
 * bytes: the slot and a tag, a few bits of the 5-tuple's hash. It does no harm that it is read without a lock and may lead
 * to a slot that has been given to another session by then.
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

/* The first slot for further sessions. A constant where there is one external address: the verifier walks less then. */
static __always_inline u32 further_base(const struct settings *cfg)
{
	return EXTERNALS == 1 ? CLASSES * PORTS : cfg->further_base;
}

static __always_inline u32 slot_of_internal(struct mapping_key key)
{
	u32 *slot = mappings.lookup(&key);
	return slot ? *slot : NO_SLOT;
}

static __always_inline u64 remote_hash(const struct settings *cfg, addr_t remote, __be16 port)
{
	u64 sum = cfg->seed[0] + cfg->seed[1] * port;

	for (int i = 0; i < ADDR_WORDS; i++)
		sum += cfg->seed[2 + i] * remote.word[i];
	return sum;
}

static __always_inline u32 flow_hash_inbound(const struct settings *cfg, u32 mapping, addr_t remote, __be16 port)
{
	return (remote_hash(cfg, remote, port) + cfg->seed[2 + ADDR_WORDS] * mapping) >> 32;
}

static __always_inline u64 endpoint_hash(const struct settings *cfg, struct mapping_key internal)
{
	u32 rest = internal.port | (u32)internal.class << 16 | (u32)internal.wan << 24;
	const u64 *seed = &cfg->seed[3 + ADDR_WORDS];
	u64 sum = seed[ADDR_WORDS] * rest;

	for (int i = 0; i < ADDR_WORDS; i++)
		sum += seed[i] * internal.addr.word[i];
	return sum;
}

static __always_inline u32 flow_hash(const struct settings *cfg, const struct flow_key *key)
{
	if (key->direction == INBOUND)
		return flow_hash_inbound(cfg, key->mapping, key->remote, key->remote_port);
	return (remote_hash(cfg, key->remote, key->remote_port) + endpoint_hash(cfg, key->internal)) >> 32;
}

/* In front of `mappings` stand the slots of most of them, for XDP, in few enough cache lines to stay warm: the hash table takes
 * one cold line or two more. An entry has 40 bits of the endpoint's hash; where a line is full, or those bits are there,
 * `mappings` alone has the endpoint. So what is found here is a hint: at worst another's slot, and the packet goes up.
 */
static __always_inline struct front *front_of(const struct settings *cfg, u64 hash)
{
	u64 nth = (hash >> 32) * cfg->fronts >> 32;
	return fronts.lookup((u32 *)&nth);
}

static __always_inline u64 front_entry(u64 hash, u32 slot)
{
	return (hash & ~(u64)SLOT_MASK) | slot;
}

/* Without jumps; see bits.h. */
static __always_inline u32 front_find(const struct front *front, u64 hash)
{
	u64 found = 0;

#pragma clang loop unroll(disable)
	for (u32 i = 0; i < FRONT_ENTRIES; i++) {
		u64 entry = *(const volatile u64 *)&front->entry[i];

		found |= entry & -(u64)is_equal(entry | SLOT_MASK, hash | SLOT_MASK);
	}
	return found ? found & SLOT_MASK : NO_SLOT;
}

static __always_inline void front_put(const struct settings *cfg, struct mapping_key internal, u32 slot)
{
	u64 hash = endpoint_hash(cfg, internal);
	struct front *front = front_of(cfg, hash);
	u32 free = FRONT_ENTRIES;

	if (!front || front_find(front, hash) != NO_SLOT)
		return;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < FRONT_ENTRIES; i++)
		free = choose(is_any(front->entry[i]), free, i);
	if (free < FRONT_ENTRIES)
		__sync_val_compare_and_swap(&front->entry[free], 0, front_entry(hash, slot));
}

static __always_inline void front_take(const struct settings *cfg, struct mapping_key internal, u32 slot)
{
	u64 hash = endpoint_hash(cfg, internal);
	struct front *front = front_of(cfg, hash);

	if (!front)
		return;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < FRONT_ENTRIES; i++)
		if (front->entry[i] == front_entry(hash, slot))
			front->entry[i] = 0;
}

static __always_inline u32 mapping_hint(const struct settings *cfg, struct mapping_key internal)
{
	u64 hash = endpoint_hash(cfg, internal);
	struct front *front = front_of(cfg, hash);
	u32 slot = front ? front_find(front, hash) : NO_SLOT;

	return slot == NO_SLOT ? slot_of_internal(internal) : slot;
}

#define PLACES 3 /* where a session is expected: its mapping's slot, and two in a row for a further one */

/* Where a further session of the mapping in slot @mapping stands when there is room; or else beside that, in the same page. */
static __always_inline u32 further_place(const struct settings *cfg, u32 mapping, addr_t remote, __be16 port)
{
	return further_base(cfg) + ((u64)flow_hash_inbound(cfg, mapping, remote, port) * cfg->further >> 32);
}

static __always_inline struct bucket *bucket_of(const struct settings *cfg, u32 hash)
{
	u64 nth = (u64)hash * cfg->buckets >> 32;
	return buckets.lookup((u32 *)&nth);
}

/* How many entries the buckets near that of a hash have. Mostly none, and then no cold line of theirs need be read. */
static __always_inline u64 *group_of(u32 hash)
{
	u64 nth = hash >> (32 - GROUP_BITS);
	return groups.lookup((u32 *)&nth);
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

static __always_inline u32 entry_find(const struct settings *cfg, const struct flow_key *key, u32 except,
				      struct session **found)
{
	u32 hash = flow_hash(cfg, key), slot;
	u64 *group = group_of(hash);
	struct bucket *bucket;

	*found = NULL;
	if (!group || !*group)
		return NO_SLOT;
	bucket = bucket_of(cfg, hash);
	if (!bucket)
		return NO_SLOT;
	slot = bucket_find(bucket, key, entry_of(hash, 0) >> SLOT_BITS, except, found);
	return *found || !bucket->was_full ? slot : overflow_find(key, except, found);
}

/* The slot of the session to which the flow @key of the mapping in slot @mapping belongs, dead or alive, but for @except; or
 * NO_SLOT.
 */
static __always_inline u32 index_find(const struct settings *cfg, const struct flow_key *key, u32 mapping, u32 except,
				      struct session **found)
{
	u32 place = mapping;

#pragma clang loop unroll(disable)
	for (u32 i = 0; i < PLACES; i++) {
		struct session *s = session_at(place);

		if (!s)
			break;
		if (place != except && session_has(s, key) && life_is_taken(s->life)) {
			*found = s;
			return place;
		}
		if (!i && !(s->life & LIFE_FURTHER_MASK)) /* the mapping has no further sessions */
			break;
		place = further_place(cfg, mapping, key->remote, key->remote_port) ^ i;
	}
	return entry_find(cfg, key, except, found);
}

/* With the mapping of @internal, or NO_SLOT. */
static __always_inline struct session *session_find_mapped(const struct settings *cfg, struct mapping_key internal,
							   u32 mapping, addr_t remote, __be16 port)
{
	struct flow_key key = flow_outbound(internal, remote, port);
	struct session *s;

	index_find(cfg, &key, mapping, NO_SLOT, &s);
	return s;
}

static __always_inline struct session *session_find_outbound(const struct settings *cfg, struct mapping_key internal,
							     addr_t remote, __be16 port)
{
	return session_find_mapped(cfg, internal, slot_of_internal(internal), remote, port);
}

static __always_inline struct session *session_find_inbound(const struct settings *cfg, u32 mapping, addr_t remote,
							    __be16 port)
{
	struct flow_key key = flow_inbound(mapping, remote, port);
	struct session *s;

	index_find(cfg, &key, mapping, NO_SLOT, &s);
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
	u64 *group = group_of(hash);

	if (!bucket || !group)
		return false;
	__sync_fetch_and_add(group, 1); /* before anybody can miss it */
	if (bucket_put(bucket, entry_of(hash, slot)))
		return true;
	bucket->was_full = 1; /* for ever: it only makes a search longer */
	if (!overflow.insert(key, &slot))
		return true;
	__sync_fetch_and_add(group, -1);
	return false;
}

static __always_inline void entry_take(const struct settings *cfg, struct flow_key *key, u32 slot)
{
	u32 hash = flow_hash(cfg, key), *entry;
	struct bucket *bucket = bucket_of(cfg, hash);
	u64 *group = group_of(hash);

	if (!bucket || !group)
		return;
	if (!bucket_take(bucket, entry_of(hash, slot))) {
		entry = overflow.lookup(key);
		if (!entry || *entry != slot || overflow.delete(key))
			return;
	}
	__sync_fetch_and_add(group, -1);
}

static __always_inline bool place_is_expected(const struct settings *cfg, const struct flow_keys *keys, u32 place)
{
	u32 mapping = keys->in.mapping;

	return place == mapping || (place ^ further_place(cfg, mapping, keys->in.remote, keys->in.remote_port)) <= 1;
}

static __always_inline void index_leave(const struct settings *cfg, struct flow_keys *keys, u32 slot)
{
	entry_take(cfg, &keys->out, slot);
	entry_take(cfg, &keys->in, slot);
}

static __always_inline bool index_enter(const struct settings *cfg, struct flow_keys *keys, u32 slot)
{
	if (!entry_put(cfg, &keys->out, slot))
		return false;
	if (entry_put(cfg, &keys->in, slot))
		return true;
	entry_take(cfg, &keys->out, slot);
	return false;
}

/* The slot of another session than that in @slot with the same flow, or NO_SLOT. */
static __always_inline u32 index_other(const struct settings *cfg, const struct flow_key *key, u32 mapping, u32 slot)
{
	struct session *other;
	u32 found = index_find(cfg, key, mapping, slot, &other);

	return other && (other->life & LIFE_STATE) != LIFE_RESTING ? found : NO_SLOT;
}
