/* Ports and places: whose a slot may be. It belongs to whoever set its bit in `claims`, which an atomic does. */
#define CLAIM_WORDS 64
#define FURTHER_WORDS 64

static __always_inline bool slot_claim(u32 slot)
{
	u64 bit = 1ULL << (slot % 64), word = slot / 64;
	u64 *claim = claims.lookup((u32 *)&word);

	/* Look before the atomic: most tries on a full pool then cost no locked access. */
	return claim && !(*claim & bit) && !(__sync_fetch_and_or(claim, bit) & bit);
}

static __always_inline void slot_release(u32 slot)
{
	u64 word = slot / 64, *claim = claims.lookup((u32 *)&word);

	if (claim)
		__sync_fetch_and_and(claim, ~(1ULL << (slot % 64)));
}

static __always_inline u32 slot_claim_in(u32 word, u64 free)
{
	u32 slot = word * 64 + lowest_bit(free);

	return free && slot_claim(slot) ? slot : NO_SLOT;
}

/* A free slot among CLAIM_WORDS words of the pool's two ranges (ports counted from slot @base), from a random word round,
 * or NO_SLOT; @fitting has the bits that will do. With one port in a hundred free that finds one, and a small pool is
 * looked through whole; when it does not, the sender's next packet looks elsewhere. Words at the edges of the pool hold
 * foreign ports too, but those are claimed. The loop only finds the word: what stands inside it is paid as many times over
 * in the verifier's time at attach.
 */
static __always_inline u32 slot_claim_scan(u32 base, const struct pool *pool, u64 fitting)
{
	u32 low = (base + pool->first[0]) / 64, high = (base + pool->first[1]) / 64;
	u32 low_words = (pool->first[0] % 64 + pool->count[0] + 63) / 64;
	u32 words = low_words + (pool->first[1] % 64 + pool->count[1] + 63) / 64;
	u32 start = bpf_get_prandom_u32(), gap = high - low - low_words;
	u64 word = 0, free = 0;

	if (!words)
		return NO_SLOT;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < CLAIM_WORDS; i++) {
		u32 nth = (start + i) % words;
		u64 *claim;

		word = low + nth + ((is_below(nth, low_words) - 1) & gap);
		claim = claims.lookup((u32 *)&word);
		if (!claim)
			return NO_SLOT;
		free = ~*claim & fitting;
		if (free)
			break;
	}
	return slot_claim_in(word, free);
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
	u32 nth = random_below(pool_size(pool)), gap = pool->first[1] - pool->first[0] - pool->count[0];

	return pool->first[0] + nth + ((is_below(nth, pool->count[0]) - 1) & gap);
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

/* The same for a further session: @place, beside it, or anywhere behind the mappings. Not in a row: words fill up one by one, and in a
 * table that is 95 % full neighbours would be full all together.
 */
static __always_inline u32 slot_claim_further(const struct settings *cfg, u32 place)
{
	u32 first = further_base(cfg) / 64, mask = cfg->further / 64 - 1; /* their number is a power of two */
	u32 start = bpf_get_prandom_u32(), stride = bpf_get_prandom_u32() | 1; /* odd: it meets every word */
	u64 word = 0, free = 0;

	if (slot_claim(place))
		return place;
	if (slot_claim(place ^ 1))
		return place ^ 1;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < FURTHER_WORDS && !free; i++) {
		u64 *claim;

		word = first + ((start + i * stride) & mask);
		claim = claims.lookup((u32 *)&word);
		if (!claim)
			return NO_SLOT;
		free = ~*claim;
	}
	return slot_claim_in(word, free);
}
