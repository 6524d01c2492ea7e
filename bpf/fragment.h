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

/* Two hosts may have chosen one identification towards the same remote, which would mix up their pieces (RFC 7857 section
 * 10, RFC 6864 section 5.3): so what is in pieces when it leaves gets another, by chance.
 */
static __always_inline __be16 fragment_new_id(const struct packet *p, enum side side)
{
	return side == SOURCE && !p->hairpin ? (__be16)bpf_get_prandom_u32() ?: 1 : 0;
}

static __always_inline bool fragment_rename(const struct packet *p, __be16 new_id)
{
	struct ip_header *ip = packet_at(p, p->l3, sizeof(*ip));

	if (!ip)
		return false;
	if (new_id) {
		ip->check = csum_apply(ip->check, csum_delta_port(ip->id, new_id));
		ip->id = new_id;
	}
	return true;
}

/* Of a first fragment: CONTINUE, or the verdict on one that contradicts what has come. */
static __always_inline enum verdict fragment_begin(const struct settings *cfg, const struct packet *p, enum side side,
						   addr_t new_addr)
{
	struct fragment_key key = fragment_key_of(p);
	struct fragment *known = fragment_recall(cfg, p), *first = fragment_blank(p);

	if (known) {
		/* Another datagram's, perhaps, with the same identification, and a redirect of the other address. */
		known->new_addr[side == SOURCE ? DESTINATION : SOURCE] = (addr_t){};
		known->new_addr[side] = new_addr;
		known->wan = p->wan;
		if (!fragment_fits(known, p))
			return drop(COUNT_drop_fragment_overlap);
		return fragment_rename(p, known->new_id) ? CONTINUE : drop(COUNT_drop_rewrite);
	}
	if (first) {
		first->new_id = fragment_new_id(p, side);
		first->new_addr[side] = new_addr;
		first->wan = p->wan;
		first->spans = 1;
		first->covered = p->l4_len;
		first->span[0] = span_of(p);
		fragments.update(&key, first);
		if (!fragment_rename(p, first->new_id))
			return drop(COUNT_drop_rewrite);
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

/* Translates a later fragment as its first was. */
static __always_inline enum verdict fragment_rewrite(const struct packet *p, struct fragment *first, enum counter done)
{
	struct fragment_key key = fragment_key_of(p);
	addr_t source = first->new_addr[SOURCE], destination = first->new_addr[DESTINATION];
	__be16 new_id = first->new_id;

	if (!fragment_fits(first, p))
		return drop(COUNT_drop_fragment_overlap);
	if (first->covered == first->total)
		fragments.delete(&key);
	if (!fragment_rename(p, new_id) || (!addr_is_unset(source) && rewrite_addr(p, SOURCE, source)) ||
	    (!addr_is_unset(destination) && rewrite_addr(p, DESTINATION, destination)))
		return drop(COUNT_drop_rewrite);
	return translated(p, done);
}
