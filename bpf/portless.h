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
	b = binding_get(cfg, p, &key);
	if (!b)
		return refuse(COUNT_drop_portless_full);
	if (!addr_equal(b->internal, p->src))
		return refuse(COUNT_drop_portless_taken);
	b->last_seen = p->now;
	b->out_packets++;
	b->out_bytes += p->l4 - p->l3 + p->l4_len;
	if (p->more_fragments && p->proto == IPPROTO_SCTP &&
	    fragment_begin(cfg, p, SOURCE, external_addr) != CONTINUE)
		return DROP;
	if (portless_rewrite(p, SOURCE, external_addr))
		return drop(COUNT_drop_rewrite);
	return pass(COUNT_slow_portless_outbound);
}

/* CONTINUE: nobody's inside. */
static __always_inline enum verdict portless_inbound(const struct settings *cfg, const struct packet *p)
{
	struct binding_key key = { .remote_addr = p->src,
				   .remote_port = p->src_port,
				   .port = p->dst_port,
				   .proto = p->proto,
				   .external = external_of(cfg, p->dst) };
	struct binding *b = binding_find(cfg, &key, p->now);

	if (!b)
		return CONTINUE;
	if (cfg->inbound_refresh)
		b->last_seen = p->now;
	b->in_packets++;
	b->in_bytes += p->l4 - p->l3 + p->l4_len;
	if (p->more_fragments && p->proto == IPPROTO_SCTP &&
	    fragment_begin(cfg, p, DESTINATION, b->internal) != CONTINUE)
		return DROP;
	if (portless_rewrite(p, DESTINATION, b->internal))
		return drop(COUNT_drop_rewrite);
	return translated(p, COUNT_slow_portless_inbound);
}
