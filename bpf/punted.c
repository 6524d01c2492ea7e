/* What comes back from the agent: to the hook that had sent it there.
 */

/* By the way that the kernel had found for it: another look would miss what rules for marks or interfaces say, and does
 * not lead to broadcast addresses. What the agent has made up, or has no such header, takes the kernel's way of now.
 */
static __always_inline long punt_back_out(struct __sk_buff *skb, u32 ifindex, const struct ethernet_header *eth)
{
	if (!(eth->dst[0] | eth->dst[1] | eth->dst[2]))
		return redirect_neigh(ifindex, NULL, 0, 0);
	return bpf_skb_store_bytes(skb, 0, eth, sizeof(*eth), 0) ? TC_ACT_SHOT : bpf_redirect(ifindex, 0);
}

/* The punt port's ingress: what the agent has had goes back to the hook that sent it there. */
static __always_inline enum verdict punt_back(struct __sk_buff *skb)
{
	struct settings *cfg = settings_get();
	struct ethernet_header eth;
	struct interface *interface;
	struct punt_header header;
	u32 ifindex;

	if (!cfg || skb->ifindex != cfg->punt || bpf_skb_load_bytes(skb, 0, &header, sizeof(header)) ||
	    bpf_skb_load_bytes(skb, sizeof(header), &eth, sizeof(eth)))
		return drop(COUNT_drop_punt_stray);
	ifindex = (u32)bpf_ntohs(header.ifindex[0]) << 16 | bpf_ntohs(header.ifindex[1]);
	interface = interface_at(ifindex);
	if (header.local != 2 || !interface || interface->role != ROLE_WAN ||
	    bpf_skb_adjust_room(skb, -(s32)sizeof(eth), BPF_ADJ_ROOM_MAC, 0))
		return drop(COUNT_drop_punt_stray);
	if (header.reason == PUNT_ALG_OUT || header.reason == PUNT_ALG_IN)
		skb->mark = ALG_MARK | ALG_READ;
	if ((header.reason == PUNT_FRAGMENT_OUT || header.reason == PUNT_ALG_OUT) &&
	    punt_back_out(skb, ifindex, &eth) == TC_ACT_REDIRECT) {
		count(COUNT_punt_return);
		return REDIRECT;
	}
	if ((header.reason == PUNT_FRAGMENT_IN || header.reason == PUNT_ALG_IN) &&
	    !bpf_skb_store_bytes(skb, 0, interface->mac, sizeof(interface->mac), 0) &&
	    bpf_redirect(ifindex, BPF_F_INGRESS) == TC_ACT_REDIRECT) {
		count(COUNT_punt_return);
		return REDIRECT;
	}
	return drop(COUNT_drop_punt_stray);
}
