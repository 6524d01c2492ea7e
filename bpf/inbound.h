/* Who may come in uninvited, and what is not translated at all: forwards, and filtering looser than the default (RFC 4787 section 5). What comes in opens
 * a session on the external port, like any other; those that nobody inside has answered yet have a bounded number of
 * places, in which new ones push out old ones (a SYN flood meets itself there, established sessions never).
 */
static __always_inline bool is_exempt(const struct packet *p, addr_t remote, __be16 port)
{
	struct prefix_key key = { .bits = ADDR_BITS, .addr = remote };
	struct exempt *exempt = exempts.lookup(&key);

	if (!exempt || !exempt->count)
		return exempt;
#pragma clang loop unroll(full)
	for (u32 i = 0; i < EXEMPT_PORTS; i++)
		if (i < exempt->count && exempt->ports[i].proto == p->proto && !packet_is_later_fragment(p) &&
		    bpf_ntohs(port) >= exempt->ports[i].first && bpf_ntohs(port) <= exempt->ports[i].last)
			return true;
	return false;
}

/* The most specific rule for the port that @p calls, or FORWARDS. */
static __always_inline u32 forward_index(const struct packet *p, u32 external)
{
	struct forward_key key = { .bits = FORWARD_REMOTE_AT + ADDR_BITS,
				   .external = external,
				   .class = p->class,
				   .port = p->dst_port,
				   .remote_addr = p->src };
	u32 *rule = forwards.lookup(&key);

	return rule ? *rule : FORWARDS;
}

static __always_inline struct forward *forward_at(u32 index)
{
	u64 key = index;
	return forward_rules.lookup((u32 *)&key);
}

/* Some rules have an end, and a triggered one is none before somebody has it. */
static __always_inline bool forward_is_open(const struct forward *f, u32 now)
{
	if (f->flags & FORWARD_TRIGGERED && addr_is_unset(f->target[0].addr))
		return false;
	return !(f->flags & (FORWARD_TRIGGERED | FORWARD_EXPIRES)) || !idle_longer(now, f->expires, 0);
}

static __always_inline struct forward *forward_find(const struct packet *p, u32 external)
{
	struct forward *f = forward_at(forward_index(p, external));

	return f && forward_is_open(f, p->now) ? f : NULL;
}

/* The same remote host meets the same internal one, as long as the weights stay. */
static __always_inline bool forward_target(const struct forward *f, const struct packet *p, struct ends *e)
{
	u32 last = f->targets - 1;
	u32 pick;

	if (last >= TARGETS)
		return false;
	pick = ((u64)addr_hash(p->src) * f->target[last].until) >> 32;
#pragma clang loop unroll(full)
	for (u32 i = 0; i < TARGETS; i++) {
		const struct target *target = &f->target[i];

		if (i > last || pick >= target->until)
			continue;
		e->internal = f->flags & FORWARD_TO_GATEWAY ? p->dst : target->addr;
		e->internal_port = bpf_htons(target->port + bpf_ntohs(p->dst_port) - f->first);
		return true;
	}
	return false;
}

/* Does it claim to come from where nothing from outside can? */
static __always_inline bool source_is_impossible(const struct packet *p)
{
	u32 role = prefix_role(p->src);

	return role == PREFIX_OWN || role == PREFIX_INTERNAL || addr_is_martian(p->src);
}

/* Handed to the gateway's own stack. */
static __always_inline enum verdict own_inbound(const struct packet *p)
{
	if (p->hairpin)
		return drop(COUNT_drop_filtered);
	if (source_is_impossible(p))
		return drop(COUNT_drop_source_martian);
	fragment_begin_own(p);
	return pass(COUNT_own_inbound);
}

static __always_inline bool mapping_is_live(u32 slot)
{
	struct session *mapping = session_at(slot);

	return mapping && (mapping->life & LIFE_STATE) == LIFE_LIVE;
}

/* Has another than the default host the port in @slot? That which slot_adopt() made for an earlier remote is its own. */
static __always_inline bool mapping_is_anothers(const struct forward *f, const struct packet *p, u32 slot)
{
	struct session *m = session_at(slot);

	return mapping_is_live(slot) && m &&
	       (m->in.new_port != p->dst_port || !addr_equal(m->in.new_addr, f->target[0].addr));
}

/* The forward that takes @p, or NULL. The default host gets what nobody else has. */
static __always_inline struct forward *forward_for(const struct packet *p, u32 slot)
{
	struct forward *f = p->class < CLASS_ICMP ? forward_find(p, slot / PORTS / CLASSES) : NULL;

	if (f && f->flags & FORWARD_DEFAULT &&
	    (mapping_is_anothers(f, p, slot) || socket_is_at(p, p->dst, p->dst_port, p->src, p->src_port)))
		return NULL;
	return f;
}

static __always_inline void contact_remember(const struct settings *cfg, const struct packet *p, u32 mapping)
{
	struct contact_key key = { .mapping = mapping, .remote_addr = p->dst };
	struct contact contact = { .seen_at = p->now };

	if (cfg->filtering[p->class & CLASS_MASK] != FILTER_ADDRESS)
		return;
	contact.internal.addr = p->src;
	contact.internal.port = p->src_port;
	contacts.update(&key, &contact);
}

static __always_inline bool contact_is_known(const struct settings *cfg, const struct packet *p, u32 mapping,
					     const struct session *m)
{
	struct contact_key key = { .mapping = mapping, .remote_addr = p->src };
	struct contact *contact = contacts.lookup(&key);
	u32 limit = p->class == CLASS_TCP ? cfg->tcp_established : cfg->udp;

	return contact && contact->internal.port == m->in.new_port &&
	       addr_equal(contact->internal.addr, m->in.new_addr) && !idle_longer(p->now, contact->seen_at, limit);
}

/* Hosts on one LAN reach each other anyway, so there is nothing to filter when they meet in a hairpin. */
static __always_inline bool is_on_same_lan(const struct packet *p, addr_t internal)
{
	return p->hairpin && route_to(p, internal) == hairpin_came_by(p);
}

/* May a stranger speak to the host whose mapping is in @slot? */
static __always_inline bool filter_admits(const struct settings *cfg, const struct packet *p, u32 slot, struct ends *e)
{
	u8 filtering = cfg->filtering[p->class & CLASS_MASK];
	struct session *m = session_at(slot);

	if (!m || !mapping_is_live(slot) || p->class >= CLASS_ICMP)
		return false;
	e->internal = m->in.new_addr;
	e->internal_port = m->in.new_port;
	if (slot_of_internal(endpoint(e->internal, e->internal_port, p->class, slot_wan(cfg, slot))) != slot)
		return false;
	return filtering == FILTER_NONE || is_on_same_lan(p, e->internal) ||
	       (filtering == FILTER_ADDRESS && contact_is_known(cfg, p, slot, m));
}

/* A port for the default host: no mapping has it, so it becomes one here. Its rest is none, nobody else wants it. */
static __always_inline bool slot_adopt(const struct settings *cfg, u32 slot, const struct ends *e, u32 now)
{
	struct mapping_key key = endpoint(e->internal, e->internal_port, slot_class(slot), slot_wan(cfg, slot));
	struct session *s = session_at(slot);
	u64 life;

	if (!s)
		return false;
	life = s->life;
	if ((life & LIFE_STATE) == LIFE_LIVE)
		return true;
	if ((life & LIFE_STATE) == LIFE_OPENING)
		return false;
	if (!(life & LIFE_STATE) && slot_is_of_pool(cfg, slot) && !slot_claim(slot))
		return false;
	mapping_init(cfg, s, slot, e, now);
	if (!life_swap(s, life, ((life & ~LIFE_STATE) + LIFE_CHANGE) | LIFE_OPENING))
		return false;
	count(COUNT_mapping_opened);
	mappings.insert(&key, &slot);
	life_settle(s, 0);
	return true;
}

static __always_inline bool session_is_embryo(const struct session *s)
{
	if (!(s->out.marks & SESSION_FROM_OUTSIDE) || !life_is_session(s->life))
		return false;
	return slot_class(s->mapping) == CLASS_TCP ? !tcp_is_established(s) : !s->sent.packets;
}

static __always_inline bool embryo_is_at(u32 place)
{
	u64 key = place;
	u32 *embryo = embryos.lookup((u32 *)&key);
	struct session *s = embryo ? session_at(*embryo) : NULL;

	return s && session_is_embryo(s);
}

/* A random place: on average every embryo has as long as with a queue, and no counter is shared between CPUs. Another
 * where that is taken: while there are few of them, they seldom meet.
 */
static __always_inline void embryo_admit(const struct settings *cfg, u32 slot, u32 now)
{
	u32 first = random_below(EMBRYOS), *embryo;
	u64 place = embryo_is_at(first) ? random_below(EMBRYOS) : first;
	struct session *old;

	embryo = embryos.lookup((u32 *)&place);
	if (!embryo)
		return;
	old = session_at(*embryo);
	if (*embryo != slot && old && session_is_embryo(old)) {
		slot_reap(cfg, *embryo, CLOSE_EVICTED, now);
		count(COUNT_embryo_evicted);
	}
	*embryo = slot;
}

/* Nothing that was asked for. A port that is mapped stays silent (RFC 5382 REQ-4): an answer from the gateway's stack
 * would end a simultaneous open whose other SYN is still on its way. Other ports are the gateway's own.
 */
static __always_inline enum verdict stranger_inbound(const struct packet *p, u32 slot)
{
	if (!mapping_is_live(slot) || p->class == CLASS_ICMP ||
	    socket_is_at(p, p->dst, p->dst_port, p->src, p->src_port))
		return own_inbound(p);
	return drop(COUNT_drop_filtered);
}

/* May the remote of @p open what it may have opened by another WAN already? Datagrams come by either, and are answered by
 * the WAN of the latest; TCP's host knows one connection, which nobody is to end from outside.
 */
static __always_inline bool may_change_wan(const struct settings *cfg, const struct packet *p, const struct ends *e, u32 wan)
{
	struct session *s = session_by_any(cfg, endpoint(e->internal, e->internal_port, p->class, wan), e->remote,
					   e->remote_port, p->class == CLASS_TCP, p->now);

	if (!s || s->internal.wan == wan)
		return true;
	if (p->class == CLASS_TCP)
		return false;
	session_expire(cfg, s, p->now);
	return true;
}

/* The pinhole that lets @p in, or NULL. */
static __always_inline struct pinhole *pinhole_find(const struct packet *p, u32 slot)
{
	struct scratch *scratch = scratch_get();
	addr_t anybody = {};
	struct pinhole *hole;

	if (!scratch)
		return NULL;
	scratch->pinhole_key.mapping = slot;
	scratch->pinhole_key.remote = p->src;
	hole = pinholes.lookup(&scratch->pinhole_key);
	if (!hole) {
		scratch->pinhole_key.remote = anybody;
		hole = pinholes.lookup(&scratch->pinhole_key);
	}
	if (!hole || idle_longer(p->now, hole->expires, 0) || (hole->remote_port && hole->remote_port != p->src_port))
		return NULL;
	return hole;
}

/* One session less to serve; false when there was none left. */
static __always_inline bool pinhole_use(struct pinhole *hole)
{
	if (hole->counted && (s64)__sync_fetch_and_add(&hole->left, -1) <= 0)
		return false;
	count(COUNT_pinhole_opened);
	return true;
}

static __always_inline bool pinhole_target(const struct pinhole *hole, struct ends *e)
{
	e->internal = hole->internal;
	e->internal_port = hole->internal_port;
	return true;
}

/* The session that @p opens from outside, or NULL with the verdict. @s is the expired one over the same endpoints. */
static __always_inline struct session *session_admit(const struct settings *cfg, struct packet *p, u32 slot,
						     struct session *s, enum verdict *verdict)
{
	struct ends *e = ends_blank();
	struct pinhole *hole;
	struct forward *f;
	bool admitted;

	if (!e) {
		*verdict = DROP;
		return NULL;
	}
	e->marks = SESSION_FROM_OUTSIDE;
	if (!p->hairpin && source_is_impossible(p)) {
		*verdict = drop(COUNT_drop_source_martian);
		return NULL;
	}
	e->remote = p->src;
	e->remote_port = p->src_port;
	f = forward_for(p, slot);
	hole = f ? NULL : pinhole_find(p, slot);
	admitted = f ? forward_target(f, p, e) : hole ? pinhole_target(hole, e) : filter_admits(cfg, p, slot, e);
	if (!admitted) {
		*verdict = stranger_inbound(p, slot);
		return NULL;
	}
	*verdict = may_open(p);
	if (*verdict != CONTINUE)
		return NULL;
	if (hole && !pinhole_use(hole)) {
		*verdict = stranger_inbound(p, slot);
		return NULL;
	}
	e->marks |= alg_mark(p->class, e->internal_port, e->internal);
	if (WANS > 1 && !may_change_wan(cfg, p, e, slot_wan(cfg, slot))) {
		*verdict = drop(COUNT_drop_reply_taken);
		return NULL;
	}
	if (!packet_blur(p)) { /* as in session_open() */
		*verdict = DROP;
		return NULL;
	}
	slot = slot_blur(slot);
	if (s && session_reopen(cfg, s, e, p->now))
		return s;
	if (f && !slot_adopt(cfg, slot, e, p->now)) {
		*verdict = drop(COUNT_drop_session_busy);
		return NULL;
	}
	s = session_join(cfg, e, &slot, p->now, verdict);
	if (!s) {
		event_refused(endpoint(e->internal, e->internal_port, p->class, slot_wan(cfg, slot)), e->remote, e->remote_port,
			      p->now);
		return NULL;
	}
	if (f) {
		__sync_fetch_and_add(&f->opened, 1);
		count(COUNT_forward_opened);
	}
	embryo_admit(cfg, slot, p->now);
	return s;
}
