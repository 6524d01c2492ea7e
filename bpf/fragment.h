/* Fragments: the first one carries the ports and leaves its translation here; later ones have only addresses to
 * translate and follow it, for settings.fragment at most, in a bounded table (RFC 4787 REQ-14). A datagram's entry goes
 * with its last byte, so that an identifier may come again soon. What overlaps is an attack on whoever puts it together
 * (RFC 1858, RFC 3128): that piece and all after it are dropped. Mere repetitions are not.
 */
static __always_inline struct fragment_key fragment_key_of(const struct packet *p)
{
	struct fragment_key key = { .src = p->src, .dst = p->dst, .id = p->fragment_id, .proto = p->proto };
	return key;
}

static __always_inline struct span span_of(const struct packet *p)
{
	struct span span = { .from = p->fragment_offset, .to = p->fragment_offset + p->l4_len };
	return span;
}

static __always_inline bool fragment_fits(struct fragment *f, const struct packet *p)
{
	struct span new = span_of(p);

	if (f->bad)
		return false;
#pragma clang loop unroll(full)
	for (int i = 0; i < FRAGMENT_SPANS; i++) {
		const struct span *old = &f->span[i];

		if (new.from >= old->to || old->from >= new.to)
			continue;
		if (new.from == old->from && new.to == old->to)
			return true;
		f->bad = 1;
		return false;
	}
	f->span[f->spans % FRAGMENT_SPANS] = new;
	f->spans++;
	f->covered += new.to - new.from;
	if (!p->more_fragments)
		f->total = new.to;
	return true;
}

static __always_inline struct fragment *fragment_recall(const struct settings *cfg, const struct packet *p)
{
	struct fragment_key key = fragment_key_of(p);
	struct fragment *first = fragments.lookup(&key);

	return first && !idle_longer(p->now, first->seen_at, cfg->fragment) ? first : NULL;
}

static __always_inline struct fragment *fragment_blank(const struct packet *p)
{
	struct scratch *scratch = scratch_get();

	if (!scratch)
		return NULL;
	__builtin_memset(&scratch->fragment, 0, sizeof(scratch->fragment));
	scratch->fragment.seen_at = p->now;
	return &scratch->fragment;
}

/* Of a first fragment: CONTINUE, or the verdict on one that contradicts what has come. */
static __always_inline enum verdict fragment_begin(const struct settings *cfg, const struct packet *p, enum side side,
						   addr_t new_addr)
{
	struct fragment_key key = fragment_key_of(p);
	struct fragment *known = fragment_recall(cfg, p), *first = fragment_blank(p);

	if (known) {
		known->new_addr[side] = new_addr;
		known->wan = p->wan;
		return fragment_fits(known, p) ? CONTINUE : drop(COUNT_drop_fragment_overlap);
	}
	if (first) {
		first->new_addr[side] = new_addr;
		first->wan = p->wan;
		first->spans = 1;
		first->covered = p->l4_len;
		first->span[0] = span_of(p);
		fragments.update(&key, first);
	}
	return CONTINUE;
}

/* The gateway's own, or exempt: later ones need no translation, and are not to wait for one. */
static __always_inline void fragment_begin_own(const struct packet *p)
{
	struct fragment_key key = fragment_key_of(p);
	struct fragment *untouched = fragment_blank(p);

	if (p->more_fragments && !packet_is_later_fragment(p) && untouched)
		fragments.update(&key, untouched);
}

static __always_inline bool fragment_is_own(const struct fragment *first)
{
	return addr_is_unset(first->new_addr[SOURCE]) && addr_is_unset(first->new_addr[DESTINATION]);
}

/* Translates a later fragment as its first was: one address, or in a hairpin both. */
static __always_inline enum verdict fragment_rewrite(const struct packet *p, struct fragment *first, enum counter done)
{
	struct fragment_key key = fragment_key_of(p);
	addr_t source = first->new_addr[SOURCE], destination = first->new_addr[DESTINATION];

	if (!fragment_fits(first, p))
		return drop(COUNT_drop_fragment_overlap);
	if (first->covered == first->total)
		fragments.delete(&key);
	if ((!addr_is_unset(source) && rewrite_addr(p, SOURCE, source)) ||
	    (!addr_is_unset(destination) && rewrite_addr(p, DESTINATION, destination)))
		return drop(COUNT_drop_rewrite);
	return translated(p, done);
}
