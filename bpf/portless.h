/* Protocols without ports, or whose ports are not ours to change: address-only mapping, one internal host for each
 * remote and protocol; SCTP's ports stay, and tell its associations apart. The first host to speak has the remote until
 * it has been idle as long as a UDP session may.
 */
static __always_inline bool protocol_is_known(u8 proto)
{
	return proto == IPPROTO_GRE || proto == IPPROTO_ESP || proto == IPPROTO_AH || proto == IPPROTO_IPIP ||
	       proto == IPPROTO_SCTP || proto == IPPROTO_IPV6 || proto == IPPROTO_DCCP || proto == IPPROTO_UDPLITE;
}

static __always_inline long portless_rewrite(const struct packet *p, enum side side, addr_t new)
{
	return rewrite_sums(p, side, new) ?: rewrite_addr(p, side, new);
}

static __always_inline struct binding *binding_find(const struct settings *cfg, const struct binding_key *key, u32 now)
{
	struct binding *b = bindings.lookup((struct binding_key *)key);

	return b && !idle_longer(now, b->last_seen, cfg->udp) ? b : NULL;
}

/* The live binding of @p's remote, made when there is none. */
static __always_inline struct binding *binding_get(const struct settings *cfg, const struct packet *p,
						   struct binding_key *key)
{
	struct binding fresh = { .internal = p->src, .last_seen = p->now };
	struct binding *b = binding_find(cfg, key, p->now);

	if (b)
		return b;
	bindings.delete(key);
	bindings.insert(key, &fresh);
	return bindings.lookup(key);
}

/* Enhanced GRE (RFC 2637 section 4.1): version 1, with a key, of which the lower half is the call. */
struct gre_header {
	__be16 flags;
	__be16 proto;
	__be16 length;
	__be16 call;
};

static __always_inline struct gre_header *gre_of_call(const struct packet *p)
{
	struct gre_header *gre = packet_at(p, p->l4, sizeof(*gre));

	if (p->proto != IPPROTO_GRE || !gre || p->l4_len < sizeof(*gre) || packet_is_later_fragment(p))
		return NULL;
	return (gre->flags & bpf_htons(0x2007)) == bpf_htons(0x2001) && gre->proto == bpf_htons(0x880b) ? gre : NULL;
}

/* When the host last had calls with this remote, that an ALG knows of; or NULL. */
static __always_inline u32 *caller_last_seen(const struct packet *p)
{
	struct caller_key key = { .remote = p->dst, .internal = p->src };

	return p->proto == IPPROTO_GRE ? callers.lookup(&key) : NULL;
}

/* Is it of such a call? Which one it is, is the remote's to know. */
static __always_inline bool call_goes_out(const struct packet *p)
{
	u32 *last_seen = gre_of_call(p) ? caller_last_seen(p) : NULL;

	if (last_seen)
		*last_seen = p->now;
	return last_seen;
}

/* The call that @p is of, whose number it then has as its host knows it; or NULL. */
static __always_inline struct call *call_comes_in(const struct settings *cfg, const struct packet *p)
{
	struct gre_header *gre = gre_of_call(p);
	struct call_key key = { .remote = p->src, .external = external_of(cfg, p->dst) };
	struct call *call;

	if (!gre)
		return NULL;
	key.call = gre->call;
	call = calls.lookup(&key);
	gre = packet_at(p, p->l4, sizeof(*gre));
	if (!call || !gre)
		return NULL;
	call->last_seen = p->now;
	gre->call = call->call;
	return call;
}

/* Of a call only the first fragment has the number: the others follow it, also where they come before it. Of other GRE each
 * goes by its addresses.
 */
static __always_inline bool call_follows_first(const struct packet *p)
{
	return packet_is_later_fragment(p) && caller_last_seen(p);
}

static __always_inline struct fragment *call_fragment(const struct settings *cfg, const struct packet *p)
{
	struct fragment *first = p->proto == IPPROTO_GRE && packet_is_later_fragment(p) ? fragment_recall(cfg, p) : NULL;

	return first && !fragment_is_own(first) ? first : NULL;
}

static __always_inline enum verdict portless_outbound(const struct settings *cfg, const struct packet *p)
{
	u32 external = external_for(p->src, p->wan);
	addr_t external_addr = slot_addr(cfg, slot_of(external, 0, 0));
	struct binding_key key = { .remote_addr = p->dst,
				   .remote_port = p->dst_port,
				   .port = p->src_port,
				   .proto = p->proto,
				   .external = external };
	struct binding *b;

	if (cfg->drop_other && !protocol_is_known(p->proto))
		return drop(COUNT_drop_protocol);
	if (addr_is_unset(external_addr))
		return refuse(COUNT_drop_no_external);
	if (!call_goes_out(p)) {
		b = binding_get(cfg, p, &key);
		if (!b)
			return refuse(COUNT_drop_portless_full);
		if (!addr_equal(b->internal, p->src))
			return refuse(COUNT_drop_portless_taken);
		b->last_seen = p->now;
		b->out_packets++;
		b->out_bytes += packet_bytes(p);
	}
	if (p->more_fragments && (caller_last_seen(p) || p->proto == IPPROTO_SCTP) &&
	    fragment_begin(cfg, p, SOURCE, external_addr) != CONTINUE)
		return DROP;
	if (portless_rewrite(p, SOURCE, external_addr))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_portless_outbound);
}

/* CONTINUE: nobody's inside. */
static __always_inline enum verdict portless_inbound(const struct settings *cfg, const struct packet *p)
{
	struct binding_key key = { .remote_addr = p->src,
				   .remote_port = p->src_port,
				   .port = p->dst_port,
				   .proto = p->proto,
				   .external = external_of(cfg, p->dst) };
	struct fragment *first = call_fragment(cfg, p);
	struct call *call = call_comes_in(cfg, p);
	addr_t internal = {};
	struct binding *b;

	if (first)
		return fragment_rewrite(p, first, COUNT_slow_fragment_inbound);
	if (call) {
		internal = call->internal;
	} else {
		b = binding_find(cfg, &key, p->now);
		if (!b)
			return CONTINUE;
		if (cfg->inbound_refresh)
			b->last_seen = p->now;
		b->in_packets++;
		b->in_bytes += packet_bytes(p);
		internal = b->internal;
	}
	if (p->more_fragments && (call || p->proto == IPPROTO_SCTP) &&
	    fragment_begin(cfg, p, DESTINATION, internal) != CONTINUE)
		return DROP;
	if (portless_rewrite(p, DESTINATION, internal))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_portless_inbound);
}
