/* Fragments: the first one carries the ports and leaves its translation here; later ones have only addresses to
 * translate and follow it, for settings.fragment at most, in a bounded table (RFC 4787 REQ-14).
 */
static __always_inline struct fragment_key fragment_key_of(const struct packet *p)
{
	struct fragment_key key = { .src = p->src, .dst = p->dst, .id = p->fragment_id, .proto = p->proto };
	return key;
}

static __always_inline void fragment_remember(const struct packet *p, enum side side, addr_t new_addr)
{
	struct fragment_key key = fragment_key_of(p);
	struct fragment value = { .seen_at = p->now };

	value.new_addr[side] = new_addr;
	fragments.update(&key, &value);
}

static __always_inline struct fragment *fragment_recall(const struct settings *cfg, const struct packet *p)
{
	struct fragment_key key = fragment_key_of(p);
	struct fragment *first = fragments.lookup(&key);

	return first && !idle_longer(p->now, first->seen_at, cfg->fragment) ? first : NULL;
}

static __always_inline enum verdict fragment_rewrite(const struct packet *p, enum side side,
						     const struct fragment *first, enum counter done)
{
	if (rewrite_addr(p, side, first->new_addr[side]))
		return drop(COUNT_drop_rewrite);
	return pass(done);
}
