/* How a packet ends: exits count the reason and return the verdict in one call, so nothing leaves
 * uncounted. One vocabulary for both hooks; only the entry points translate it into TC's or XDP's words.
 */
enum verdict {
	CONTINUE, /* not decided yet: the walk goes on */
	PASS,
	DROP,
	REFUSE, /* dropped, but the sender is to be told */
	REDIRECT,
	ELSEWHERE, /* not by this WAN, see wan.h */
};

static __always_inline void count(u32 reason)
{
	u64 key = reason, *counter = counters.lookup((u32 *)&key);
	if (counter)
		(*counter)++;
}

/* Of what is translated, bytes and the WAN are counted, too. What passes no WAN, between LANs or to the gateway itself, is
 * among the first one's.
 */
static __always_inline void carry(enum counter kind, u32 wan, u32 bytes)
{
	u64 place = wan * KINDS_TRANSLATED + kind;
	struct traffic *sum = translations.lookup((u32 *)&place);

	count(kind);
	if (sum) {
		sum->packets++;
		sum->bytes += bytes;
	}
}

static __always_inline enum verdict pass(enum counter reason)
{
	count(reason);
	return PASS;
}

static __always_inline enum verdict drop(enum counter reason)
{
	count(reason);
	return DROP;
}

static __always_inline enum verdict refuse(enum counter reason)
{
	count(reason);
	return REFUSE;
}

/* What was to open a session gets none; those who watch are told why, see event_refused(). */
static __always_inline enum verdict deny(enum counter reason, enum verdict verdict)
{
	struct scratch *scratch = scratch_get();

	if (scratch)
		scratch->refused = reason;
	count(reason);
	return verdict;
}

/* TC_ACT_UNSPEC lets further programs and the stack have the packet, as if we were not there. After TC_ACT_OK on TCX,
 * clsact's filters do not run: so ours take over from each other, see attachment.py.
 */
static __always_inline int tc_verdict(enum verdict verdict)
{
	const struct settings *cfg = settings_get();

	switch (verdict) {
	case DROP:
	case REFUSE:
		return TC_ACT_SHOT;
	case REDIRECT:
		return TC_ACT_REDIRECT;
	default:
		return cfg ? TC_ACT_UNSPEC + cfg->last : TC_ACT_UNSPEC; /* TC_ACT_OK is one more */
	}
}
