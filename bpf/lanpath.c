/* TC on LANs and lo: what must not go to the WAN as the kernel would have it, and what is to be learned from what it delivers.
 */

/* Is what @p quotes of a mapping, so that the error goes to an internal host? */
static __always_inline bool error_leads_inside(const struct settings *cfg, const struct packet *p)
{
	struct quote q = {};

	return quote_parse(p, &q) && q.inner.class < CLASSES && addr_equal(p->dst, q.inner.src) &&
	       mapping_is_live(slot_of_external(cfg, q.inner.src, q.inner.class, q.inner.src_port));
}

/* Does @p, from inside to an external address, lead to another internal host? Else it is the gateway's. */
static __always_inline bool leads_inside(const struct settings *cfg, const struct packet *p)
{
	u32 slot = slot_of_external(cfg, p->dst, p->class, p->dst_port);
	struct fragment *first;
	struct forward *forward;

	if (leads_to_counterpart(cfg, p->dst))
		return true;
	if (packet_follows_first(p)) {
		first = fragment_recall(cfg, p);
		return first && !addr_is_unset(first->new_addr[SOURCE]);
	}
	if (packet_is_icmp_error(p))
		return error_leads_inside(cfg, p);
	if (p->class >= CLASS_ICMP)
		return false;
	forward = forward_for(p, slot);
	return forward ? !(forward->flags & FORWARD_TO_GATEWAY) : mapping_is_live(slot);
}

/* Is @p the answer of a forward's host to the gateway itself? It may have asked from one WAN's address for another's. */
static __always_inline bool answers_gateway(const struct settings *cfg, struct packet *p)
{
	struct session *s;

	if (p->class >= CLASS_ICMP || packet_is_later_fragment(p))
		return false;
	s = session_by_any(cfg, endpoint(p->src, p->src_port, p->class, NO_WAN), p->dst, p->dst_port, true, p->now);
	if (s)
		p->wan = s->internal.wan;
	return s;
}

/* Source and destination before parse(): of most packets nothing else is asked. False: not IP. */
static __always_inline bool addresses_read(struct packet *p)
{
	struct ip_header *ip, copy;

	if (p->skb->protocol != bpf_htons(ETH_P_IP))
		return false;
	ip = packet_at(p, p->l3, sizeof(*ip));
	if (!ip && bpf_skb_load_bytes(p->skb, p->l3, &copy, sizeof(copy)))
		return false;
	p->src = ip ? ip->src : copy.src;
	p->dst = ip ? ip->dst : copy.dst;
	return true;
}

static __always_inline bool goes_to_external(const struct settings *cfg, const struct packet *p)
{
	return external_of(cfg, p->dst) != NO_EXTERNAL || leads_to_counterpart(cfg, p->dst);
}

/* Hairpinning (RFC 4787 REQ-9): a packet from inside to an external endpoint is sent out of the WAN, and from its egress
 * hook back in at its ingress hook: translated both ways by the same sessions as everything else, so that the other host
 * sees the external endpoint as its source. It never reaches the device.
 */
static __always_inline enum verdict slow_hairpin(const struct settings *cfg, struct packet *p)
{
	bool inside = leads_inside(cfg, p);

	if (prefix_role(p->src) != PREFIX_INTERNAL || !(inside || answers_gateway(cfg, p)))
		return PASS;
	if (p->ttl <= 1)
		return drop(COUNT_drop_ttl) == DROP && punt(cfg, p, PUNT_TTL) ? REDIRECT : DROP;
	if (inside)
		p->wan = addr_wan(cfg, p->dst);
	return hairpin_go_out(cfg, p, inside);
}

/* LAN ingress: what must not be forwarded, or not simply by the kernel to the WAN. Without redirects the program is a
 * shorter one, which the kernel verifies in a fifth of the time.
 */
static __always_inline enum verdict slow_lan(struct packet *p, bool may_redirect)
{
	struct interface *here = interface_at(p->skb->ifindex);
	struct settings *cfg = settings_get();
	bool to_external, redirects;
	enum verdict verdict;

	if (!cfg || !addresses_read(p))
		return PASS;
	verdict = guard(cfg, p, here);
	if (verdict != CONTINUE)
		return verdict;
	to_external = goes_to_external(cfg, p);
	redirects = may_redirect && here && !addr_is_unset(here->redirect_to);
	if (!to_external && !redirects)
		return PASS;
	verdict = parse(p);
	if (verdict != CONTINUE)
		return verdict;
	if (to_external)
		return slow_hairpin(cfg, p);
	return redirects && here ? redirect(cfg, p, here->redirect_to) : PASS;
}

/* lo egress: the gateway itself, asking for a forward by its external address, comes in like everybody. */
static __always_inline enum verdict slow_loopback(struct packet *p)
{
	struct settings *cfg = settings_get();
	enum verdict verdict;
	struct forward *f;

	if (!cfg || !addresses_read(p) || !goes_to_external(cfg, p))
		return PASS;
	verdict = parse(p);
	if (verdict != CONTINUE)
		return verdict;
	if (external_of(cfg, p->src) == NO_EXTERNAL || p->class >= CLASS_ICMP || packet_is_later_fragment(p))
		return PASS;
	f = forward_find(p, external_of(cfg, p->dst));
	return f && !(f->flags & (FORWARD_DEFAULT | FORWARD_TO_GATEWAY)) ? hairpin_come_in(cfg, p) : PASS;
}

/* The translated packet as the kernel delivers it. Changes nothing. */
static __always_inline void learn_inbound(const struct settings *cfg, const struct packet *p)
{
	struct interface *from = interface_at(p->skb->ingress_ifindex);
	struct session *s;

	if (!from || from->role != ROLE_WAN || packet_is_later_fragment(p) || p->class == CLASS_NONE)
		return;
	s = session_find_outbound(cfg, endpoint(p->dst, p->dst_port, p->class, from->wan), p->src, p->src_port);
	/* From an external address is a hairpin's; at the WAN's XDP hook nothing tells that from a forgery. */
	if (s && session_is_alive(cfg, s, p->now) && session_may_fly(cfg, s) &&
	    external_of(cfg, p->src) == NO_EXTERNAL)
		flow_arm(cfg, p, &s->in);
}

/* LAN egress, in XDP mode, and where there are redirects. */
static __always_inline enum verdict slow_lan_out(struct packet *p)
{
	struct settings *cfg = settings_get();
	bool own = !p->skb->ingress_ifindex;
	enum verdict verdict;

	/* Other protocols have been counted where they came in. */
	if (!cfg || !(own || cfg->accelerate) || p->skb->protocol != bpf_htons(ETH_P_IP))
		return PASS;
	verdict = parse(p);
	if (verdict != CONTINUE)
		return verdict;
	if (own)
		return redirect_answer(cfg, p);
	learn_inbound(cfg, p);
	return PASS;
}
