/* Port blocks (RFC 6888 REQ-14), compiled in where they are on: a host's ports come from blocks of its own, so that one record
 * for each block tells whose a port was. A block is of one external address, and for all protocols. A host takes another when no
 * port is free in those it has; the agent gives back those in which none is in use or at rest (blocks.py).
 *
 * Blocks change hands by compare-and-swap of their state. A packet claims a port and looks at its block afterwards; the agent
 * calls a block idle and looks at its ports afterwards. So whoever is second sees the other.
 */
#define NO_BLOCK (~0U)

static __always_inline struct tenant *tenant_find(addr_t addr)
{
	return tenants.lookup(&addr);
}

/* NULL when the table is full. */
static __always_inline struct tenant *tenant_get(addr_t addr)
{
	struct scratch *scratch = scratch_get();

	if (scratch && !tenant_find(addr))
		tenants.insert(&addr, &scratch->newcomer);
	return tenant_find(addr);
}

static __always_inline struct block *block_at(u32 number)
{
	u64 key = number;
	return blocks.lookup((u32 *)&key);
}

static __always_inline bool block_swap(u32 number, enum block_state from, enum block_state to)
{
	struct block *block = block_at(number);

	return block && __sync_val_compare_and_swap(&block->state, from, to) == from;
}

/* Is the port in @slot, claimed just now, in a block of @owner's? Then that is idle no more. */
static __always_inline bool block_keep(const struct settings *cfg, u32 slot, addr_t owner)
{
	struct block *block = block_at(slot / (CLASSES * PORTS) * BLOCKS + (slot % PORTS >> (cfg->block_bits & 15)));
	u64 state = block ? __sync_val_compare_and_swap(&block->state, BLOCK_IDLE, BLOCK_TAKEN) : BLOCK_FREE;

	return block && (state == BLOCK_IDLE || state == BLOCK_TAKEN) && addr_equal(block->owner, owner);
}

/* One of @tenant's blocks in which a port is free, of those @fitting, or NO_BLOCK. Every word of them is looked at: limits allow no
 * more (config.py).
 */
static __always_inline u32 block_with_room(const struct settings *cfg, const struct tenant *tenant, u32 external, u32 class,
					   u64 fitting)
{
	u32 shift = (cfg->block_bits - 6) & 7, start = bpf_get_prandom_u32();

#pragma clang loop unroll(disable)
	for (u32 i = 0; i < CLAIM_WORDS; i++) {
		u32 nth = (start + i) % (cfg->host_blocks << shift), number;
		u64 word, *claim;

		number = tenant->block[(nth >> shift) & (HOST_BLOCKS - 1)] - 1;
		if (number / BLOCKS != external)
			continue;
		word = slot_of(external, class, 0) / 64 + (number % BLOCKS << shift) + (nth & ((1 << shift) - 1));
		claim = claims.lookup((u32 *)&word);
		if (claim && ~*claim & fitting)
			return number;
	}
	return NO_BLOCK;
}

/* A place for one more block of @tenant's, or HOST_BLOCKS. */
static __always_inline u32 block_place(const struct settings *cfg, const struct tenant *tenant)
{
	u32 place = HOST_BLOCKS;

#pragma clang loop unroll(full)
	for (u32 i = 0; i < HOST_BLOCKS; i++)
		place = choose(is_equal(place, HOST_BLOCKS) & is_below(i, cfg->host_blocks) & (is_any(tenant->block[i]) ^ 1), i, place);
	return place;
}

/* A free block, nobody else's from now on, or NO_BLOCK. */
static __always_inline u32 block_claim(const struct settings *cfg, u32 external)
{
	u32 start = bpf_get_prandom_u32(), stride = bpf_get_prandom_u32() | 1, mask = (PORTS >> (cfg->block_bits & 15)) - 1;

#pragma clang loop unroll(disable)
	for (u32 i = 0; i < BLOCKS; i++) {
		u32 number = external * BLOCKS + ((start + i * stride) & mask);
		struct block *block = block_at(number);

		if (block && block->state == BLOCK_FREE)
			return block_swap(number, BLOCK_FREE, BLOCK_MOVING) ? number : NO_BLOCK;
	}
	return NO_BLOCK;
}

/* Another block for @tenant; that of another CPU, should that have been first; or NO_BLOCK. */
static __always_inline u32 block_take(const struct settings *cfg, struct tenant *tenant, addr_t owner, u32 external, u32 now)
{
	u32 place = block_place(cfg, tenant), number = place < HOST_BLOCKS ? block_claim(cfg, external) : NO_BLOCK;
	struct block *block = block_at(number);

	if (!block)
		return NO_BLOCK;
	block->owner = owner;
	block->taken_at = now;
	place &= HOST_BLOCKS - 1;
	if (__sync_val_compare_and_swap(&tenant->block[place], 0, number + 1)) {
		block_swap(number, BLOCK_MOVING, BLOCK_FREE);
		return tenant->block[place] - 1;
	}
	block_swap(number, BLOCK_MOVING, BLOCK_TAKEN);
	count(COUNT_block_taken);
	return number;
}

/* Any of @tenant's blocks on @external, or NO_BLOCK. */
static __always_inline u32 block_any(const struct tenant *tenant, u32 external)
{
	u32 start = bpf_get_prandom_u32(), number = NO_BLOCK;

#pragma clang loop unroll(full)
	for (u32 i = 0; i < HOST_BLOCKS; i++) {
		u32 other = tenant->block[(start + i) & (HOST_BLOCKS - 1)] - 1;

		number = choose(is_equal(other / BLOCKS, external), other, number);
	}
	return number;
}

/* What a port for @tenant is chosen from. Where all its ports are taken and there is no other block for it, one of its own: it may
 * have ports at rest.
 */
static __always_inline const struct pool *block_pool(const struct settings *cfg, struct tenant *tenant,
						     const struct packet *p, u32 external, u64 fitting)
{
	struct scratch *scratch = scratch_get();
	u32 number = number_blur(block_with_room(cfg, tenant, external, p->class, fitting), p->now);

	if (number == NO_BLOCK)
		number = number_blur(block_take(cfg, tenant, p->src, external, p->now), p->now);
	if (number == NO_BLOCK)
		number = number_blur(block_any(tenant, external), p->now);
	if (number == NO_BLOCK || !scratch)
		return NULL;
	scratch->pool.first[0] = number % BLOCKS << (cfg->block_bits & 15);
	scratch->pool.count[0] = 1 << (cfg->block_bits & 15);
	scratch->pool.first[1] = scratch->pool.count[1] = 0;
	return &scratch->pool;
}

static __always_inline void block_give_back(u32 number)
{
	struct block *block = block_at(number);
	struct tenant *tenant;

	if (!block || !block_swap(number, BLOCK_IDLE, BLOCK_MOVING))
		return;
	tenant = tenant_find(block->owner);
#pragma clang loop unroll(full)
	for (u32 i = 0; i < HOST_BLOCKS; i++)
		if (tenant)
			__sync_val_compare_and_swap(&tenant->block[i], number + 1, 0);
	block_swap(number, BLOCK_MOVING, BLOCK_FREE);
	count(COUNT_block_freed);
}
