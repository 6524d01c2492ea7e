/* What becomes of each packet of one internal host, told to whoever traces it: how it came to a TC hook, how it left it, and
 * which counters grew in between, that is, why. Begin and end stand in the hooks, around everything, so that no way through
 * them can be forgotten, and the verifier walks them once. As of events nothing is written when nobody reads.
 */
_Static_assert(COUNTER_MAX <= 64 * TRACE_WORDS, "a bit for each counter");

static __always_inline struct tracing *tracing_get(void)
{
	u64 zero = 0;
	return tracing.lookup((u32 *)&zero);
}

static __always_inline struct sight *sight_get(void)
{
	u64 zero = 0;
	return sights.lookup((u32 *)&zero);
}

static __always_inline bool is_traced_now(const struct tracing *t, u32 now)
{
	return t && t->until - now < WATCH_MOST;
}

/* Flows of the traced host are kept off XDP, where nothing is told. */
static __always_inline bool trace_keeps_off(const struct packet *p)
{
	struct tracing *t = tracing_get();

	return is_traced_now(t, p->now) && (addr_equal(p->src, t->internal) || addr_equal(p->dst, t->internal));
}

/* As much of the transport header as there is, behind whatever options. */
static __always_inline void look_at(struct __sk_buff *skb, u32 l3, struct look *look)
{
	u32 header;

	if (bpf_skb_load_bytes(skb, l3, &look->ip, sizeof(look->ip)))
		__builtin_memset(&look->ip, 0, sizeof(look->ip));
	header = (look->ip.version_ihl & 0xf) * 4;
	__builtin_memset(look->l4, 0, sizeof(look->l4));
	if (bpf_skb_load_bytes(skb, l3 + header, look->l4, sizeof(look->l4)) &&
	    bpf_skb_load_bytes(skb, l3 + header, look->l4, sizeof(struct tcp_header)))
		bpf_skb_load_bytes(skb, l3 + header, look->l4, sizeof(struct udp_header));
}

static __always_inline void trace_begin(const struct packet *p)
{
	struct sight *sight;

	if (!is_traced_now(tracing_get(), p->now))
		return;
	sight = sight_get();
	if (!sight)
		return;
	look_at(p->skb, p->l3, &sight->before);
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < COUNTER_MAX; i++) {
		u64 reason = i, *counter = counters.lookup((u32 *)&reason);

		if (!counter)
			return;
		sight->counts[i] = *counter;
	}
	sight->l3 = p->l3;
	sight->len = p->skb->len;
	sight->is_open = 1;
}

/* Is it a matter of the traced host? Of what came from outside and is not translated, only the reader can tell whose it is. */
static __always_inline bool sight_fits(const struct sight *sight, const struct tracing *t, enum trace_hook hook)
{
	if (addr_equal(sight->before.ip.src, t->internal) || addr_equal(sight->before.ip.dst, t->internal) ||
	    addr_equal(sight->after.ip.src, t->internal) || addr_equal(sight->after.ip.dst, t->internal))
		return true;
	return hook == TRACE_WAN_IN && addr_equal(sight->before.ip.dst, sight->after.ip.dst);
}

static __always_inline void trace_write(struct __sk_buff *skb, struct tracing *t, const struct sight *sight,
					enum trace_hook hook, u32 verdict)
{
	u64 number = __sync_fetch_and_add(&t->next, 1);
	u64 place = number & (TRACES - 1);
	struct traced *told = traces.lookup((u32 *)&place);

	if (!told)
		return;
	told->before = sight->before;
	told->after = sight->after;
	__builtin_memset(told->counted, 0, sizeof(told->counted));
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < COUNTER_MAX; i++) {
		u64 reason = i, *counter = counters.lookup((u32 *)&reason);

		if (!counter)
			return;
		told->counted[i >> 6 & (TRACE_WORDS - 1)] |= (u64)is_any(*counter ^ sight->counts[i]) << (i & 63);
	}
	told->at = jiffies_now();
	told->ifindex = skb->ifindex;
	told->mark = skb->mark;
	told->hook = hook;
	told->verdict = verdict;
	__sync_lock_test_and_set(&told->number, number + 1);
}

/* How a hook ends. */
static __always_inline int trace_end(const struct packet *p, enum trace_hook hook, enum verdict verdict)
{
	struct tracing *t = tracing_get();
	struct __sk_buff *skb = p->skb;
	struct sight *sight;

	verdict = number_blur(verdict, p->now);
	if (is_traced_now(t, p->now)) {
		sight = sight_get();
		if (sight && sight->is_open) {
			sight->is_open = 0;
			look_at(skb, sight->l3 + skb->len - sight->len, &sight->after); /* headers may have been put before it */
			if (sight_fits(sight, t, hook))
				trace_write(skb, t, sight, hook, verdict);
		}
	}
	return tc_verdict(verdict);
}
