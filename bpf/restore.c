/* Run by `sessions load` with BPF_PROG_TEST_RUN, never by a packet: opens one saved session among those that are there, of
 * which it takes nothing away. The "packet" is a struct saved behind a made-up Ethernet header.
 */
#define SAVED_AT 16

struct saved {
	struct ends ends;
	u32 mapping; /* slot of the external endpoint */
	u32 shared; /* another's port: of an overloaded pool */
	u32 opened_at;
	u32 last_seen[2]; /* by enum direction, as what follows */
	__be32 last_ack[2];
	u8 tcp_seen[2];
	u8 pad[2];
	struct traffic traffic[2];
};

enum restored {
	RESTORED,
	RESTORE_PORT_TAKEN,
	RESTORE_NOT_OF_POOL,
	RESTORE_ENDPOINT_TAKEN, /* the internal endpoint has another mapping by now */
	RESTORE_SESSION_TAKEN,
	RESTORE_HOST_LIMIT,
	RESTORE_FAILED,
};

/* Makes the mapping in @slot that of the internal endpoint, unless it is, or the port is a forward's. A port at rest is its
 * last host's.
 */
static __always_inline enum restored mapping_restore(const struct settings *cfg, const struct ends *e, u32 slot,
						     struct host *host, u32 now)
{
	struct mapping_key key = endpoint(e->internal, e->internal_port, slot_class(slot), slot_wan(cfg, slot));
	u32 present = slot_of_internal(key);
	struct session *s = session_at(slot);
	u64 life = s ? s->life : 0, state = life & LIFE_STATE;
	u32 class = slot_class(slot);

	asm volatile("" : "+r"(class)); /* or LLVM drops the mask that the verifier wants to see */
	class &= CLASS_MASK;
	if (!s || slot >= further_base(cfg))
		return RESTORE_FAILED;
	if (present == slot || (state == LIFE_LIVE && life & LIFE_STATIC))
		return RESTORED;
	if (present != NO_SLOT)
		return RESTORE_ENDPOINT_TAKEN;
	if (!slot_is_of_pool(cfg, slot))
		return RESTORE_NOT_OF_POOL;
	if (host && host->mappings[class] >= cfg->host_mappings)
		return RESTORE_HOST_LIMIT;
	if (state == LIFE_RESTING ? !addr_equal(s->in.new_addr, e->internal) : state || !slot_claim(slot))
		return RESTORE_PORT_TAKEN;
	if (!life_swap(s, life, ((life & ~LIFE_STATE) + LIFE_CHANGE) | LIFE_OPENING | (host ? LIFE_COUNTED : 0)))
		return RESTORE_PORT_TAKEN;
	mapping_init(cfg, s, slot, e, now);
	if (mappings.insert(&key, &slot)) {
		s->life = 0;
		slot_release(slot);
		return RESTORE_ENDPOINT_TAKEN;
	}
	front_put(cfg, key, slot);
	if (host)
		__sync_fetch_and_add(&host->mappings[class], 1);
	life_settle(s, 0);
	count(COUNT_mapping_opened);
	return RESTORED;
}

static __always_inline enum restored session_restore(const struct settings *cfg, struct ends *e, const struct saved *saved,
						     u32 now)
{
	struct host *host = e->marks & SESSION_COUNTED ? host_get(cfg, e->internal, now) : NULL;
	u32 slot = slot_blur(saved->mapping);
	enum restored restored = RESTORED;
	enum verdict verdict = CONTINUE;
	struct session *s;

	if (host && host->sessions >= cfg->host_sessions)
		return RESTORE_HOST_LIMIT;
	if (!host)
		e->marks &= ~SESSION_COUNTED;
	if (!saved->shared)
		restored = mapping_restore(cfg, e, slot, host, now);
	else if (!cfg->overload)
		restored = RESTORE_PORT_TAKEN;
	if (restored != RESTORED)
		return restored;
	if (host)
		__sync_fetch_and_add(&host->sessions, 1);
	s = session_join(cfg, e, &slot, now, &verdict);
	if (!s) {
		if (host)
			__sync_fetch_and_add(&host->sessions, -1);
		return RESTORE_SESSION_TAKEN;
	}
	/* It is alive, and a packet may have come already: that one is of now, what was saved is older. */
	s->opened_at = saved->opened_at;
	s->out.tcp_seen |= saved->tcp_seen[OUTBOUND];
	s->in.tcp_seen |= saved->tcp_seen[INBOUND];
	if (!s->out.last_ack)
		s->out.last_ack = saved->last_ack[OUTBOUND];
	if (!s->in.last_ack)
		s->in.last_ack = saved->last_ack[INBOUND];
	s->sent = saved->traffic[OUTBOUND];
	s->received = saved->traffic[INBOUND];
	s->out.last_seen = saved->last_seen[OUTBOUND];
	s->in.last_seen = saved->last_seen[INBOUND];
	event_of_session(s, EVENT_OPENED, now);
	return RESTORED;
}

int masq_restore(struct __sk_buff *skb)
{
	struct settings *cfg = settings_get();
	struct ends *e = ends_blank();
	struct saved saved;

	if (!cfg || !e || bpf_skb_load_bytes(skb, SAVED_AT, &saved, sizeof(saved)))
		return RESTORE_FAILED;
	*e = saved.ends;
	e->marks &= SESSION_COUNTED | SESSION_FROM_OUTSIDE;
	return session_restore(cfg, e, &saved, jiffies_now());
}
