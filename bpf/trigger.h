/* Port triggering (autofw of old): an internal host that calls a certain remote port has other ports opened to it for a
 * while. Such a rule is a forward whose target is filled in here; the first host has it until it falls silent, then
 * another may.
 */
static __always_inline struct forward *trigger_find(const struct packet *p, u32 opens)
{
	struct forward *f = forward_at(forward_index(p, FORWARD_TRIGGER + opens));

	return f && f->flags & FORWARD_TRIGGERED ? f : NULL;
}

/* Asked once a session, so that other packets need no look. */
static __always_inline u8 trigger_mark(const struct packet *p)
{
	u64 zero = 0;
	u32 *count = triggers.lookup((u32 *)&zero);

	if (!count || !*count)
		return 0;
	return trigger_find(p, CLASS_TCP) || trigger_find(p, CLASS_UDP) ? SESSION_TRIGGERS : 0;
}

/* Of two hosts at the very same moment the one that writes last has it. */
static __always_inline void trigger_pull_one(const struct packet *p, u32 opens)
{
	struct forward *f = trigger_find(p, opens);

	if (!f)
		return;
	if (!forward_is_open(f, p->now)) {
		f->target[0].addr = p->src;
		count(COUNT_trigger_pulled);
	}
	if (addr_equal(f->target[0].addr, p->src))
		f->expires = p->now + f->lasts;
}

static __always_inline void trigger_pull(const struct packet *p)
{
	trigger_pull_one(p, CLASS_TCP);
	trigger_pull_one(p, CLASS_UDP);
}
