/* The control sessions of ALGs: which they are, and what is remembered of each as long as it lives. See alg.h. */
#define ALG_ANY 32 /* bits of struct alg_key before the address */

/* SESSION_ALG, if there is an ALG for this server's port and this internal host. */
static __always_inline u8 alg_mark(u32 class, __be16 server_port, addr_t internal)
{
	struct scratch *scratch = scratch_get();
	u64 zero = 0;
	u32 *some = alg_count.lookup((u32 *)&zero);

	if (!some || !*some || !scratch)
		return 0;
	scratch->alg_key.bits = ALG_ANY + ADDR_BITS;
	scratch->alg_key.class = class;
	scratch->alg_key.port = server_port;
	scratch->alg_key.addr = internal;
	return algs.lookup(&scratch->alg_key) ? SESSION_ALG : 0;
}

static __always_inline struct control_key control_key_of(const struct session *s)
{
	struct control_key key = { .mapping = s->mapping,
				   .remote = s->out.remote_addr,
				   .remote_port = s->out.remote_port };
	return key;
}

/* Of a new session. Without a place for it the session does without the ALG. */
static __always_inline void control_open(struct session *s, u32 now)
{
	struct scratch *scratch = scratch_get();
	struct control *fresh;

	if (!(s->out.marks & SESSION_ALG) || !scratch)
		return;
	scratch->control_key = control_key_of(s);
	fresh = &scratch->control;
	__builtin_memset(fresh, 0, sizeof(*fresh));
	fresh->internal = s->internal;
	fresh->opened_at = now;
	fresh->from_outside = is_any(s->out.marks & SESSION_FROM_OUTSIDE);
	if (!controls.update(&scratch->control_key, fresh))
		return;
	s->out.marks &= ~SESSION_ALG;
	count(COUNT_alg_full);
}

static __always_inline void control_close(const struct flow_key *inbound)
{
	struct control_key key = { .mapping = inbound->mapping,
				   .remote = inbound->remote,
				   .remote_port = inbound->remote_port };

	controls.delete(&key);
}
