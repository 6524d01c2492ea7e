/* Basic NAT: hosts with an external address of their own. Nothing is remembered: an address gives its counterpart, ports
 * and identifiers stay, every protocol passes, fragments in any order too. Who may come in is for the firewall to say.
 */
static __always_inline bool counterpart_of(addr_t addr, addr_t *twin)
{
	struct prefix_key key = { .bits = ADDR_BITS, .addr = addr };
	struct counterpart *other = counterparts.lookup(&key);

	if (!other)
		return false;
	for (int i = 0; i < ADDR_WORDS; i++)
		twin->word[i] = other->network.word[i] | (addr.word[i] & ~other->mask.word[i]);
	return true;
}

/* Is @dst the external address of a host inside? */
static __always_inline bool leads_to_counterpart(const struct settings *cfg, addr_t dst)
{
	addr_t twin;

	return cfg->basic && prefix_role(dst) != PREFIX_INTERNAL && counterpart_of(dst, &twin);
}

/* Of the packet that an ICMP error quotes, the end on this side. */
static __always_inline long basic_translate_quote(const struct packet *p, enum side side)
{
	struct quote q = {};
	addr_t old, twin;

	if (!quote_parse(p, &q))
		return 0;
	old = packet_addr(&q.inner, side);
	if (!counterpart_of(old, &twin))
		return 0;
	return quote_rewrite(p, &q, side, twin, packet_port(&q.inner, side));
}

static __always_inline enum verdict basic_translate(const struct packet *p, enum side side, addr_t twin,
						    enum counter done)
{
	enum side quoted = side == SOURCE ? DESTINATION : SOURCE;

	if (packet_is_icmp_error(p) && !packet_is_later_fragment(p) && basic_translate_quote(p, quoted))
		return drop(COUNT_drop_rewrite);
	if (rewrite_sums(p, side, twin) || rewrite_addr(p, side, twin))
		return drop(COUNT_drop_rewrite);
	return translated(p, done);
}

static __always_inline enum verdict basic_inbound(const struct packet *p, addr_t twin)
{
	if (!p->hairpin && source_is_impossible(p))
		return drop(COUNT_drop_source_martian);
	return basic_translate(p, DESTINATION, twin, COUNT_slow_basic_inbound);
}
