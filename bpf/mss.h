/* TCP segments no longer than the way: new connections have their MSS option lowered to settings of the WAN's interface,
 * in both directions (RFC 6691; on a PPPoE uplink nobody has to rely on ICMP for that). A SYN without the option is left
 * alone: then 536 is meant.
 */
#define TCP_OPTION_MSS 2
#define MSS_WITHIN 12 /* options: stacks send it first or nearly so */

struct mss_option {
	u8 kind, len;
	u8 value[2];
};

static __always_inline void mss_lower(const struct packet *p, u32 at, struct mss_option *option, u16 most)
{
	u16 old = (u16)option->value[0] << 8 | option->value[1];
	u32 delta = csum_delta_port(bpf_htons(old), bpf_htons(most));

	if (old <= most)
		return;
	option->value[0] = most >> 8;
	option->value[1] = most & 0xff;
	if ((at - p->l4) & 1) /* across two words of the sum */
		delta = csum_fold16(delta << 8);
	bpf_l4_csum_replace(p->skb, p->l4 + offsetof(struct tcp_header, check), 0, delta, 0);
}

static __always_inline void mss_clamp(const struct packet *p)
{
	u32 first = p->l4 + sizeof(struct tcp_header), offset = 0;
	struct interface *wan = interface_at(p->skb->ifindex);
	u16 most;

	if (!(p->tcp_flags & TCP_SYN) || !wan || !wan->mss)
		return;
	most = wan->mss;
#pragma clang loop unroll(disable)
	for (int i = 0; i < MSS_WITHIN; i++) {
		struct mss_option *option = packet_at(p, first + offset, sizeof(*option));

		if (first + offset + sizeof(*option) > p->payload || !option || option->kind == OPTION_END)
			return;
		if (option->kind == TCP_OPTION_MSS && option->len == sizeof(*option))
			return mss_lower(p, first + offset, option, most);
		if (option->kind != OPTION_NOP && option->len < 2)
			return;
		offset = option_next(offset, option->kind, option->len);
	}
}
