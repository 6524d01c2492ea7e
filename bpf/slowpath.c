/* TC on the WAN: a complete NAT by itself, and the only place where anything is decided. It sees every packet
 * that leaves or enters the WAN through the stack: all of them in TC mode, what XDP passed up in XDP mode.
 *
 * The hooks' suffix _l3 is for interfaces without Ethernet header (tun, ppp).
 */

/* RFC 793 has no segment with none of SYN, ACK, RST, nor with two of SYN, FIN, RST. */
static __always_inline bool tcp_flags_are_sane(u8 flags)
{
	u8 kind = flags & (TCP_SYN | TCP_FIN | TCP_RST);

	return flags & (TCP_SYN | TCP_ACK | TCP_RST) && !(kind & (kind - 1));
}

/* TCP opens a session with SYN; in the middle of a connection (the gateway was restarted) also with a plain ACK,
 * so that the other side can answer and both learn. FIN and RST open nothing.
 */
static __always_inline enum verdict may_open(const struct packet *p)
{
	u8 flags = p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK);

	if (p->class != CLASS_TCP || flags == TCP_SYN || flags == TCP_ACK)
		return CONTINUE;
	return drop(tcp_flags_are_sane(p->tcp_flags) ? COUNT_drop_tcp_no_session : COUNT_drop_tcp_flags);
}

/* Whose packet is it? CONTINUE: an internal host's, to be translated. */
static __always_inline enum verdict source_policy(const struct packet *p)
{
	struct interface *from = interface_at(p->skb->ingress_ifindex);
	bool local = !p->skb->ingress_ifindex;

	switch (prefix_role(p->src)) {
	case PREFIX_INTERNAL:
		return CONTINUE;
	case PREFIX_OWN:
		return pass(COUNT_own_outbound);
	case PREFIX_PRIVATE:
		if (local && addr_is_unset(p->src)) /* a DHCP client on the WAN */
			return pass(COUNT_own_outbound);
		return drop(COUNT_drop_source_private);
	}
	if (from && from->role == ROLE_LAN)
		return drop(COUNT_drop_source_foreign);
	/* Translated on its way in, but its LAN is gone and the default route leads back out. */
	if (from && from->role == ROLE_WAN && prefix_role(p->dst) >= PREFIX_INTERNAL)
		return drop(COUNT_drop_turned_round);
	return pass(COUNT_own_outbound);
}

/* A socket of the gateway's own may have taken an external port that is mapped, towards the same remote: then its
 * packets are translated like any other host's, as are its ICMP queries, whose identifiers nobody reserves.
 */
static __always_inline bool own_needs_translation(const struct settings *cfg, const struct packet *p)
{
	struct session *s;

	if (p->class == CLASS_ICMP)
		return true;
	s = session_find(slot_of_external(cfg, p->src, p->class, p->src_port), p->dst, p->dst_port, INBOUND);
	if (s && session_is_alive(cfg, s, p->now))
		return true;
	/* Once translated it stays so, when the other session ends too: the remote must not see its port change. */
	s = session_find(slot_of_internal(p->src, p->class, p->src_port), p->dst, p->dst_port, OUTBOUND);
	return s && session_is_alive(cfg, s, p->now);
}

/* A new session for @p, or NULL with the reason in @verdict. @s is the expired session over the same endpoints, if any. */
static __always_inline struct session *session_open(const struct settings *cfg, const struct packet *p, bool own,
						    u32 slot, struct session *s, enum verdict *verdict)
{
	*verdict = own ? CONTINUE : source_policy(p);
	if (*verdict == CONTINUE)
		*verdict = may_open(p);
	if (*verdict != CONTINUE)
		return NULL;
	if (addr_is_unset(cfg->external[0])) {
		*verdict = drop(COUNT_drop_no_external);
		return NULL;
	}
	if (s && session_reopen(cfg, s, p))
		return s;
	if (slot == NO_SLOT) {
		s = mapping_open(cfg, p, own, &slot, verdict);
		if (s || *verdict != CONTINUE)
			return s;
	}
	return session_join(cfg, p, slot, verdict);
}

/* The session is looked for first: of an established flow nothing else needs to be asked. */
static __always_inline enum verdict translate_outbound(const struct settings *cfg, const struct packet *p, bool own)
{
	u32 slot = slot_of_internal(p->src, p->class, p->src_port);
	struct session *s = session_find(slot, p->dst, p->dst_port, OUTBOUND);
	enum verdict verdict;

	if (!s || !session_is_alive(cfg, s, p->now)) {
		s = session_open(cfg, p, own, slot, s, &verdict);
		if (!s)
			return verdict;
	}
	if (p->class == CLASS_TCP) {
		if (!tcp_flags_are_sane(p->tcp_flags))
			return drop(COUNT_drop_tcp_flags);
		tcp_track(cfg, s, &s->out, &s->in, p);
	}
	flow_touch(&s->out, p->now, p->l4 - p->l3 + p->l4_len);
	if (session_may_fly(cfg, s))
		flow_arm(cfg, p, &s->out, p->src, p->src_port);
	if (p->more_fragments)
		fragment_remember(p, SOURCE, s->out.new_addr);
	return rewrite(p, SOURCE, s->out.new_addr, s->out.new_port, COUNT_slow_outbound);
}

static __always_inline enum verdict fragment_outbound(const struct settings *cfg, const struct packet *p)
{
	struct fragment *first = fragment_recall(cfg, p);
	enum verdict verdict;

	if (first)
		return fragment_rewrite(p, SOURCE, first, COUNT_slow_fragment_outbound);
	verdict = source_policy(p);
	return verdict == CONTINUE ? drop(COUNT_drop_fragment_orphan) : verdict;
}

/* What has no endpoint of its own, from whoever it is. */
static __always_inline enum verdict other_outbound(const struct settings *cfg, const struct packet *p)
{
	u32 role = prefix_role(p->src);
	/* Redirects quote a packet too; of those only the gateway's own may leave. */
	bool error = packet_is_icmp_error(p) ||
		     (role == PREFIX_OWN && p->proto == IPPROTO_ICMP && p->icmp_type == ICMP_REDIRECT);
	enum verdict verdict;

	if (error && (role == PREFIX_OWN || role == PREFIX_INTERNAL))
		return icmp_error_outbound(cfg, p, role == PREFIX_OWN);
	verdict = source_policy(p);
	if (verdict != CONTINUE)
		return verdict;
	return drop(p->proto == IPPROTO_ICMP ? COUNT_drop_icmp_type : COUNT_drop_protocol);
}

static __always_inline enum verdict slow_outbound(struct packet *p)
{
	struct settings *cfg = settings_get();
	enum verdict verdict = parse(p);
	bool own;

	if (verdict != CONTINUE || !cfg)
		return verdict;
	if (packet_is_later_fragment(p))
		return fragment_outbound(cfg, p);
	if (p->class == CLASS_NONE || (p->class == CLASS_ICMP && p->icmp_type != ICMP_ECHO))
		return other_outbound(cfg, p);
	own = external_of(cfg, p->src) != NO_EXTERNAL;
	if (own && !own_needs_translation(cfg, p))
		return pass(COUNT_own_outbound);
	return translate_outbound(cfg, p, own);
}

static __always_inline enum verdict fragment_inbound(const struct settings *cfg, const struct packet *p)
{
	struct fragment *first = fragment_recall(cfg, p);

	if (first)
		return fragment_rewrite(p, DESTINATION, first, COUNT_slow_fragment_inbound);
	return pass(COUNT_own_inbound);
}

/* Nothing that was asked for. A port that is mapped stays silent (RFC 5382 REQ-4): an answer from the gateway's stack
 * would end a simultaneous open whose other SYN is still on its way. Other ports are the gateway's own.
 */
static __always_inline enum verdict stranger_inbound(const struct packet *p, u32 slot)
{
	struct session *mapping = session_at(slot);

	if (!mapping || (mapping->life & LIFE_STATE) != LIFE_LIVE || p->class == CLASS_ICMP ||
	    socket_is_at(p, p->dst, p->dst_port, p->src, p->src_port))
		return pass(COUNT_own_inbound);
	return drop(COUNT_drop_filtered);
}

static __always_inline enum verdict translate_inbound(const struct settings *cfg, const struct packet *p, u32 slot)
{
	struct session *s = session_find(slot, p->src, p->src_port, INBOUND);

	if (!s || !session_is_alive(cfg, s, p->now))
		return stranger_inbound(p, slot);
	if (p->class == CLASS_TCP && !tcp_flags_are_sane(p->tcp_flags))
		return drop(COUNT_drop_tcp_flags);
	if (p->class == CLASS_TCP)
		tcp_track(cfg, s, &s->in, &s->out, p);
	flow_touch(&s->in, p->now, p->l4 - p->l3 + p->l4_len);
	if (p->more_fragments)
		fragment_remember(p, DESTINATION, s->in.new_addr);
	return rewrite(p, DESTINATION, s->in.new_addr, s->in.new_port, COUNT_slow_inbound);
}

static __always_inline enum verdict slow_inbound(struct packet *p)
{
	struct settings *cfg = settings_get();
	enum verdict verdict = parse(p);
	u32 slot;

	if (verdict != CONTINUE || !cfg)
		return verdict;
	/* Before anything else: no kind of packet may name an internal host from outside. */
	if (external_of(cfg, p->dst) == NO_EXTERNAL)
		return prefix_role(p->dst) == PREFIX_INTERNAL ? drop(COUNT_drop_destination_internal) :
								 pass(COUNT_own_inbound);
	if (packet_is_later_fragment(p))
		return fragment_inbound(cfg, p);
	if (packet_is_icmp_error(p))
		return icmp_error_inbound(cfg, p);
	if (p->proto == IPPROTO_ICMP && p->icmp_type != ICMP_ECHO_REPLY)
		return pass(COUNT_own_inbound);
	if (p->class == CLASS_NONE)
		return pass(COUNT_own_inbound);
	slot = slot_of_external(cfg, p->dst, p->class, p->dst_port);
	return translate_inbound(cfg, p, slot);
}

/* LAN egress, in XDP mode only: the translated packet as the kernel delivers it. Changes nothing. */
static __always_inline void learn_inbound(struct packet *p)
{
	struct interface *from = interface_at(p->skb->ingress_ifindex);
	struct settings *cfg = settings_get();
	struct session *s;

	/* What parse() would count has been counted where it came in; of that only other protocols get here. */
	if (!cfg || !from || from->role != ROLE_WAN || p->skb->protocol != bpf_htons(ETH_P_IP) || parse(p) != CONTINUE ||
	    packet_is_later_fragment(p) || p->class == CLASS_NONE)
		return;
	s = session_find(slot_of_internal(p->dst, p->class, p->dst_port), p->src, p->src_port, OUTBOUND);
	if (s && session_is_alive(cfg, s, p->now) && session_may_fly(cfg, s))
		flow_arm(cfg, p, &s->in, s->out.new_addr, s->out.new_port);
}

int masq_wan_out(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };
	return tc_verdict(slow_outbound(&p));
}

int masq_wan_out_l3(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now() };
	return tc_verdict(slow_outbound(&p));
}

int masq_wan_in(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };
	return tc_verdict(slow_inbound(&p));
}

int masq_wan_in_l3(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now() };
	return tc_verdict(slow_inbound(&p));
}

int masq_lan_learn(struct __sk_buff *skb)
{
	struct packet p = { .skb = skb, .now = jiffies_now(), .l3 = sizeof(struct ethernet_header) };
	learn_inbound(&p);
	return TC_ACT_UNSPEC;
}

/* Stand-in: swallows what is put back on the punt port. */
int masq_punt_in(struct __sk_buff *skb)
{
	return TC_ACT_SHOT;
}
