/* ALGs: protocols that carry addresses in their payload. What their control sessions say is read and edited by the agent,
 * by way of the punt port; such a session never flies. Where an edit has changed a text's length, TCP's sequence numbers
 * are shifted from there on. That is done here, with or without an agent.
 *
 * A packet whose numbers are to be shifted passes the hook once more for that, marked: what is translated twice would be
 * far too much for the verifier, what is translated or shifted is not. What the program remembers (flow.last_ack) is as
 * the outside sees it: so numbers are shifted before the translation on the way out, and behind it on the way in.
 */
#define ALG_MARK 0x4d600000 /* as with hairpins nobody else's mark is there by then */
#define ALG_MARKED 0xfffffff0
#define ALG_READ 1 /* by the agent, who has put the right sequence number */
#define ALG_SHIFT 2 /* its numbers are to be shifted now */
#define ALG_SHIFTED 4

#define TCP_OPTION_SACK 5
#define SACK_EDGES 8 /* in 40 bytes of options */

static __always_inline u8 alg_marks(const struct __sk_buff *skb)
{
	return (skb->mark & ALG_MARKED) == ALG_MARK ? skb->mark & ~ALG_MARKED : 0;
}

/* Is an edit that ends at @end, the @i-th one, counted from 0, and is @sequence there or beyond? */
static __always_inline u32 shift_applies(const struct shifts *shifts, u32 i, u32 end, u32 sequence)
{
	return is_below(i, shifts->count) & (((sequence - end) >> 31) ^ 1);
}

/* A sequence number as the other side sees it; or @back, what the other side has said of one as the sender sees it. Of an
 * edited text the sender is told nothing before all of it has arrived: what lies within stands for its beginning, or, where
 * a block of SACK @begins, for its end. Without jumps, see bits.h.
 */
static __always_inline u32 sequence_change(const struct shifts *shifts, u32 sequence, u32 back, u32 begins)
{
	u32 found = sequence + choose(back, -shifts->before, shifts->before);

#pragma clang loop unroll(disable)
	for (u32 i = 0; i < SHIFTS; i++) {
		u32 start = shifts->shift[i].start, end = shifts->shift[i].end, by = shifts->shift[i].by;
		u32 beyond = shift_applies(shifts, i, end + (by & -back), sequence);
		u32 within = is_below(i, shifts->count) & back & (beyond ^ 1) & (start - found) >> 31;

		found = choose(beyond, sequence + choose(back, -by, by), choose(within, choose(begins, end, start), found));
	}
	return found;
}

/* The sequence number, the acknowledgement, the edges of SACK (RFC 2018): one after the other. What the agent puts back has
 * the right sequence number already.
 */
static __always_inline long sequences_change(const struct packet *p, const struct control *control, enum direction direction)
{
	u32 sack = option_find(p, p->l4 + sizeof(struct tcp_header), p->payload, TCP_OPTION_SACK, TCP_OPTION_SACK);

#pragma clang loop unroll(disable)
	for (u32 i = 0; i < 2 + SACK_EDGES; i++) { /* from a constant: Linux 6.1 would count on for ever */
		u32 at = i < 2 ? p->l4 + offsetof(struct tcp_header, seq) + i * sizeof(__be32) : sack + 2 + (i - 2) * sizeof(__be32);
		__be32 *place = packet_at(p, at, sizeof(*place));
		addr_t old, new;
		u32 delta;

		if (!i && p->alg & ALG_READ)
			continue;
		if ((i && !(p->tcp_flags & TCP_ACK)) || (i > 1 && (!sack || at + sizeof(*place) > p->payload)))
			break;
		if (!place)
			return -1;
		old.word[0] = *place;
		new.word[0] = bpf_htonl(sequence_change(&control->shifts[(direction ^ is_any(i)) & 1], bpf_ntohl(*place), is_any(i),
						      is_any(i >> 1) & ~i));
		*place = new.word[0];
		delta = csum_delta_addr(old, new);
		if ((at - p->l4) & 1) /* the bytes stand in three words of the sum */
			delta = csum_fold16(delta << 8);
		if (bpf_l4_csum_replace(p->skb, p->l4 + offsetof(struct tcp_header, check), 0, delta, 0))
			return -1;
	}
	return 0;
}

static __always_inline bool packet_has_text(const struct packet *p)
{
	return p->l4 + p->l4_len > p->payload;
}

/* Is there anything to be read? SYN and FIN too, so that the agent knows where texts begin and end; and what is in pieces,
 * whose text may all be in the later ones.
 */
static __always_inline bool alg_wants(const struct packet *p)
{
	if (p->alg || p->hairpin || p->own)
		return false;
	return p->class != CLASS_TCP || p->tcp_flags & (TCP_SYN | TCP_FIN) || p->more_fragments ||
	       packet_has_text(p);
}

/* A packet that comes once more has again the mark that the gateway's rules had given it. */
static __always_inline void control_keep_mark(const struct packet *p, struct control *control)
{
	if (p->alg)
		p->skb->mark = control->mark;
	else
		control->mark = p->skb->mark;
}

/* The first look at a packet of a control session: REDIRECT when the agent is to read it. */
static __always_inline enum verdict alg_read(const struct settings *cfg, const struct packet *p, const struct session *s,
					     enum punt_reason reason)
{
	struct control_key key = control_key_of(s);
	struct control *control;

	if (!alg_wants(p))
		return CONTINUE;
	control = controls.lookup(&key);
	if (control && control->over && !(p->tcp_flags & TCP_SYN))
		return CONTINUE;
	if (control && reason == PUNT_ALG_OUT)
		control_keep_mark(p, control);
	if (punt_with(cfg, p, reason, s->mapping)) {
		count(COUNT_punt_alg);
		return REDIRECT;
	}
	count(COUNT_alg_bypassed);
	return CONTINUE;
}

/* Are there numbers to be shifted? Acknowledgements are noted for the agent, but not those that it makes up itself. */
static __always_inline bool alg_shifts(const struct packet *p, const struct session *s, enum direction direction)
{
	struct control_key key = control_key_of(s);
	struct control *control = controls.lookup(&key);

	if (control && direction == OUTBOUND)
		control_keep_mark(p, control);
	if (!control || p->class != CLASS_TCP || p->alg & ALG_SHIFTED)
		return false;
	/* A new connection over the same endpoints. */
	if (p->tcp_flags & TCP_SYN && !tcp_is_established(s))
		__builtin_memset(&control->over, 0, sizeof(*control) - offsetof(struct control, over));
	if (p->tcp_flags & TCP_ACK && (!p->alg || packet_has_text(p)))
		control->acked[!direction] = bpf_ntohl(p->ack);
	return control->shifts[OUTBOUND].count | control->shifts[INBOUND].count | control->shifts[OUTBOUND].before |
	       control->shifts[INBOUND].before;
}

/* Once more by the same hook. */
static __always_inline enum verdict alg_again(const struct packet *p, u8 marks, u64 hook)
{
	if (!ethernet_put(p))
		return drop(COUNT_drop_rewrite);
	p->skb->mark = ALG_MARK | marks;
	return bpf_redirect(p->skb->ifindex, hook) == TC_ACT_REDIRECT ? REDIRECT : drop(COUNT_drop_rewrite);
}

static __always_inline enum verdict alg_shift(const struct settings *cfg, struct packet *p, enum direction direction)
{
	struct control_key key;
	struct session *s;
	struct control *control;

	s = direction == OUTBOUND ?
		    session_find_outbound(cfg, endpoint(p->src, p->src_port, p->class, p->wan), p->dst, p->dst_port) :
		    session_find_outbound(cfg, endpoint(p->dst, p->dst_port, p->class, p->wan), p->src, p->src_port);
	if (!s)
		return drop(COUNT_drop_rewrite);
	key = control_key_of(s);
	control = controls.lookup(&key);
	if (!control || sequences_change(p, control, direction))
		return drop(COUNT_drop_rewrite);
	return direction == OUTBOUND ? alg_again(p, (p->alg & ALG_READ) | ALG_SHIFTED, 0) : PASS;
}
