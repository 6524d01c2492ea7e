/* What happens to sessions, told as it happens to whoever watches: a ring of events in memory that any number of processes
 * read, each at its own pace. Nobody takes an event out; a new one is written over the oldest, and their numbers tell a
 * reader what it has missed. Nothing is written unless somebody watches, which they go on saying, so nothing has to be put
 * back when they are killed.
 */
#define WATCH_MOST 4096 /* jiffies that a watcher may ask for at once; then a stale word is not taken for a new one */

/* The place of the next event; NULL when nobody watches. */
static __always_inline struct event *event_begin(u32 now, u64 *number)
{
	u64 zero = 0, place;
	struct watch *watcher = watch.lookup((u32 *)&zero);

	if (!watcher || watcher->until - now >= WATCH_MOST)
		return NULL;
	*number = __sync_fetch_and_add(&watcher->next, 1);
	place = *number & (EVENTS - 1);
	return events.lookup((u32 *)&place);
}

static __always_inline void event_note(struct event *e, const struct session *s)
{
	__builtin_memcpy(&e->remote, &s->out, offsetof(struct event, opened_at) - offsetof(struct event, remote));
	e->opened_at = s->opened_at;
	__builtin_memcpy(&e->internal, &s->internal, offsetof(struct event, received) - offsetof(struct event, internal));
	e->received = s->received;
	e->tcp_seen[OUTBOUND] = s->out.tcp_seen;
	e->tcp_seen[INBOUND] = s->in.tcp_seen;
	e->marks = s->out.marks;
}

/* The exchange is a barrier, too: whoever reads the number finds the rest. */
static __always_inline void event_end(struct event *e, u64 number, enum event_kind kind, u32 reason, u32 now)
{
	e->at = now;
	e->reason = reason;
	e->kind = kind;
	__sync_lock_test_and_set(&e->number, number + 1);
}

static __always_inline void event_of_session(const struct session *s, enum event_kind kind, u32 now)
{
	u64 number;
	struct event *e = event_begin(now, &number);

	if (!e)
		return;
	event_note(e, s);
	event_end(e, number, kind, CLOSE_EXPIRED, now);
}

/* Said by a session's first packet, rather than where it was opened: many ways lead from there, which the verifier would all
 * follow through this.
 */
static __always_inline void event_opened(const struct session *s, u32 now)
{
	if (!(s->sent.packets | s->received.packets))
		event_of_session(s, EVENT_OPENED, now);
}

/* @life is what the session's end has left. Should its place be another's by now, what stands there says nothing, and the
 * event is void.
 */
static __always_inline void event_closed(const struct session *s, u64 life, enum close_reason reason, u32 now)
{
	u64 number;
	struct event *e = event_begin(now, &number);

	if (!e)
		return;
	event_note(e, s);
	event_end(e, number, EVENT_CLOSED * is_equal((s->life ^ life) & ~LIFE_FURTHER_MASK, 0), reason, now);
}

/* Of a session that @internal, or the remote, did not get; why is in the scratch, see deny(). It is read twice, as in a
 * register it would keep the verifier's ways apart.
 */
static __always_inline void event_refused(struct mapping_key internal, addr_t remote, __be16 remote_port, u32 now)
{
	struct scratch *scratch = scratch_get();
	struct event none = {};
	struct event *e;
	u64 number;

	if (!scratch || !scratch->refused)
		return;
	e = event_begin(now, &number);
	if (e) {
		__builtin_memcpy(&e->remote, &none.remote, sizeof(*e) - offsetof(struct event, remote));
		e->internal = internal;
		e->remote = remote;
		e->remote_port = remote_port;
		e->opened_at = now;
		event_end(e, number, EVENT_REFUSED, scratch->refused, now);
	}
	scratch->refused = 0;
}
