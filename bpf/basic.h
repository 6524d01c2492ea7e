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

/* The external address of a host inside. Asked without its role, the table would lead from that back to the host, and a
 * packet that claims to be from there out with an internal source.
 */
static __always_inline bool counterpart_outside(addr_t addr, addr_t *twin)
{
	return prefix_role(addr) == PREFIX_INTERNAL && counterpart_of(addr, twin);
}

/* Is @dst the external address of a host inside? */
static __always_inline bool leads_to_counterpart(const struct settings *cfg, addr_t dst)
{
	addr_t twin;

	return cfg->basic && prefix_role(dst) != PREFIX_INTERNAL && counterpart_of(dst, &twin);
}

/* Of the packet that an ICMP error quotes, the end on this side; on the way out nothing else internal may stand there. */
static __always_inline enum verdict basic_translate_quote(const struct packet *p, enum side side)
{
	bool outbound = side == DESTINATION;
	struct quote q = {};
	addr_t old, twin;

	if (!quote_parse(p, &q))
		return outbound ? drop(COUNT_drop_icmp_error_leak) : CONTINUE;
	old = packet_addr(&q.inner, side);
	if (outbound && prefix_role(q.inner.src) == PREFIX_INTERNAL)
		return drop(COUNT_drop_icmp_error_leak);
	if (outbound ? counterpart_outside(old, &twin) : counterpart_of(old, &twin))
		return quote_rewrite(p, &q, side, twin, packet_port(&q.inner, side)) ? drop(COUNT_drop_rewrite) : CONTINUE;
	return outbound && prefix_role(old) >= PREFIX_INTERNAL ? drop(COUNT_drop_icmp_error_leak) : CONTINUE;
}

static __always_inline enum verdict basic_translate(const struct packet *p, enum side side, addr_t twin,
						    enum counter done)
{
	enum side quoted = side == SOURCE ? DESTINATION : SOURCE;
	enum verdict verdict = CONTINUE;

	if (side == SOURCE && packet_is_redirect(p) && !packet_is_later_fragment(p))
		return drop(COUNT_drop_icmp_type);
	if (packet_is_icmp_error(p) && !packet_is_later_fragment(p))
		verdict = basic_translate_quote(p, quoted);
	if (verdict != CONTINUE)
		return verdict;
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
