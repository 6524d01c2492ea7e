/* Run by the agent with BPF_PROG_TEST_RUN, never by a packet: changes slots on its behalf, because only the
 * kernel can do so atomically among packets. The "packet" is a list of slots behind a made-up Ethernet header.
 */
#define REAP_MAX 16
#define REAP_SLOTS 24 /* offset of the list */

enum reap_order {
	REAP_EXPIRED, /* close what is expired */
	REAP_FORCED, /* close what is there */
	REAP_RESTED, /* return closed slots to the pool */
	REAP_CLAIM, /* take slots out of the pool */
	REAP_KEEP, /* make them static: forwarded ports */
	REAP_YIELD, /* static no more; running sessions go on */
	REAP_HOLD, /* make a mapping static as it is, with its sessions */
	REAP_TAKE, /* make a port static that is nobody's, for an internal endpoint: a struct reap_taken in place of slots */
	REAP_OPEN, /* return to the pool what another configuration had kept out of it */
	REAP_BLOCK_IDLE, /* say of port blocks, in place of slots, that nothing seems to be in them */
	REAP_BLOCK_FREE, /* give back those that are idle still */
	REAP_BLOCK_CLOSE, /* keep free ones from being taken */
	REAP_BLOCK_OPEN, /* no more */
	REAP_BLOCK_TAKE, /* another one for an internal host: an external address's index and the host, in place of slots */
};

struct reap_request {
	u32 order;
	u32 count;
};

struct reap_taken {
	u32 slot;
	addr_t internal;
	__be16 port;
	u16 pad;
};

static __always_inline void slot_return(const struct settings *cfg, u32 slot)
{
	struct session *s = session_at(slot);
	u64 life;

	if (!s)
		return;
	life = s->life;
	if ((life & LIFE_STATE) == LIFE_RESTING && life_swap(s, life, 0) &&
	    (slot >= further_base(cfg) || slot_is_of_pool(cfg, slot)))
		slot_release(slot);
}

static __always_inline void slot_keep(const struct settings *cfg, u32 slot, u32 now)
{
	struct session *s = session_at(slot);
	u64 life;

	if (!s || slot >= further_base(cfg))
		return;
	slot_claim(slot);
	slot_reap(cfg, slot, CLOSE_FORCED, now);
	life = s->life;
	s->mapping = slot;
	life_swap(s, life, (life & ~LIFE_STATE) | LIFE_LIVE | LIFE_STATIC);
}

/* Whose the mapping is, the agent looks afterwards, when it can no longer end; and takes it out of `mappings` one day. */
static __always_inline void slot_hold(const struct settings *cfg, u32 slot)
{
	struct session *s = session_at(slot);
	u64 life;

	if (!s || slot >= further_base(cfg))
		return;
	life = s->life;
	if ((life & LIFE_STATE) != LIFE_LIVE || !life_swap(s, life, (life & ~LIFE_COUNTED) | LIFE_STATIC))
		return;
	front_take(cfg, endpoint(s->in.new_addr, s->in.new_port, slot_class(slot), slot_wan(cfg, slot)), slot);
	if (life & LIFE_COUNTED)
		host_mapping_ended(s->in.new_addr, slot_class(slot));
}

/* Whose it is stands there before a packet can meet it, which would else be led to whoever had the port last. */
static __always_inline bool slot_take(const struct settings *cfg, const struct reap_taken *taken, u32 now)
{
	struct ends e = { .internal = taken->internal, .internal_port = taken->port };
	struct session *s = session_at(taken->slot);
	u64 life;

	if (!s || taken->slot >= further_base(cfg))
		return false;
	life = s->life;
	if (life & LIFE_LIVE || (!(life & LIFE_STATE) && slot_is_of_pool(cfg, taken->slot) && !slot_claim(taken->slot)))
		return false;
	if (!life_swap(s, life, ((life & ~LIFE_STATE) + LIFE_CHANGE) | LIFE_OPENING | LIFE_STATIC))
		return false;
	mapping_init(cfg, s, taken->slot, &e, now);
	life_settle(s, 0);
	return true;
}

static __always_inline void slot_yield(u32 slot)
{
	struct session *s = session_at(slot);
	u64 life;

	if (!s)
		return;
	life = s->life;
	s->out.last_seen = jiffies_now();
	life_swap(s, life, life & ~LIFE_STATIC);
}

static __always_inline void block_take_for(const struct settings *cfg, struct __sk_buff *skb, u32 now)
{
	struct {
		u32 external;
		addr_t addr;
	} who;
	struct tenant *tenant;

	if (bpf_skb_load_bytes(skb, REAP_SLOTS, &who, sizeof(who)))
		return;
	tenant = tenant_get(who.addr);
	if (tenant)
		block_take(cfg, tenant, who.addr, who.external, now);
}

/* Nobody can claim it meanwhile: its bit is set. */
static __always_inline void slot_open(u32 slot)
{
	struct session *s = session_at(slot);

	if (s && !(s->life & LIFE_STATE))
		slot_release(slot);
}

int masq_reap(struct __sk_buff *skb)
{
	struct settings *cfg = settings_get();
	struct reap_request request;
	struct reap_taken taken;
	u32 now = jiffies_now();

	if (!cfg || bpf_skb_load_bytes(skb, REAP_SLOTS - sizeof(request), &request, sizeof(request)))
		return 0;
	if (request.order == REAP_TAKE)
		return !bpf_skb_load_bytes(skb, REAP_SLOTS, &taken, sizeof(taken)) && slot_take(cfg, &taken, now);
	if (request.order == REAP_BLOCK_TAKE) {
		block_take_for(cfg, skb, now);
		return now;
	}
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < REAP_MAX; i++) {
		u32 slot;

		if (i >= request.count ||
		    bpf_skb_load_bytes(skb, REAP_SLOTS + i * sizeof(slot), &slot, sizeof(slot)))
			break;
		switch (request.order) {
		case REAP_EXPIRED:
		case REAP_FORCED:
			slot_reap(cfg, slot, request.order == REAP_FORCED ? CLOSE_FORCED : CLOSE_EXPIRED, now);
			break;
		case REAP_RESTED:
			slot_return(cfg, slot);
			break;
		case REAP_CLAIM:
			slot_claim(slot);
			break;
		case REAP_KEEP:
			slot_keep(cfg, slot, now);
			break;
		case REAP_YIELD:
			slot_yield(slot);
			break;
		case REAP_HOLD:
			slot_hold(cfg, slot);
			break;
		case REAP_OPEN:
			slot_open(slot);
			break;
		case REAP_BLOCK_IDLE:
			block_swap(slot, BLOCK_TAKEN, BLOCK_IDLE);
			break;
		case REAP_BLOCK_FREE:
			block_give_back(slot);
			break;
		case REAP_BLOCK_CLOSE:
			block_swap(slot, BLOCK_FREE, BLOCK_OUTSIDE);
			break;
		case REAP_BLOCK_OPEN:
			block_swap(slot, BLOCK_OUTSIDE, BLOCK_FREE);
			break;
		}
	}
	return now;
}
