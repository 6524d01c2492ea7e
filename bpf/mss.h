/* TCP segments no longer than the way: new connections have their MSS option lowered to settings of the WAN's interface,
 * in both directions (RFC 6691; on a PPPoE uplink nobody has to rely on ICMP for that). A SYN without the option is left
 * alone: then 536 is meant.
 */
#define TCP_OPTION_MSS 2

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
	struct interface *wan = interface_at(p->skb->ifindex);
	struct mss_option *option;
	u32 at;

	if (!(p->tcp_flags & TCP_SYN) || !wan || !wan->mss)
		return;
	at = option_find(p, p->l4 + sizeof(struct tcp_header), p->payload, TCP_OPTION_MSS, TCP_OPTION_MSS);
	option = packet_at(p, at, sizeof(*option));
	if (at && option && option->len == sizeof(*option) && at + sizeof(*option) <= p->payload)
		mss_lower(p, at, option, wan->mss);
}
