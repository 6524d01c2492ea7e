/* The punt port: what takes holding or composing a new packet goes to the agent, by a TAP. Bounded for each reason, so
 * that no flood of one starves the others or the agent; with the agent dead nothing is punted.
 */
#define PUNT_A_WINDOW 128 /* punts in an eighth of a second */
#define PUNT_ALG_A_WINDOW 512
#define PUNT_ALIVE_S 10 /* loading programs takes the agent seconds where the CPUs are busy */

static __always_inline bool budget_spend(const struct settings *cfg, u32 reason, u32 now)
{
	u64 key = reason;
	struct budget *budget = budgets.lookup((u32 *)&key);

	if (!budget)
		return false;
	if (idle_longer(now, budget->window, cfg->hz / 8)) {
		budget->window = now;
		budget->used = 0;
	}
	return budget->used++ < (reason < PUNT_ALG_IN ? PUNT_A_WINDOW : PUNT_ALG_A_WINDOW);
}

/* The port goes with the agent: of one that was killed nobody needs to wait for the heartbeat to be missed. */
static __always_inline bool punt_is_attended(const struct settings *cfg, const struct packet *p)
{
	return cfg->punt && !idle_longer(p->now, cfg->heartbeat, PUNT_ALIVE_S * cfg->hz) && device_is_there(p, cfg->punt);
}

/* Sends the packet to the agent; false when that is not possible, and the packet is as it was. */
static __always_inline bool punt_with(const struct settings *cfg, const struct packet *p, enum punt_reason reason, u32 about)
{
	u32 ifindex = p->skb->ifindex;
	struct punt_header header = { .local = 2,
				      .reason = reason,
				      .ifindex = { bpf_htons(ifindex >> 16), bpf_htons(ifindex & 0xffff) },
				      .about = { bpf_htons(about >> 16), bpf_htons(about & 0xffff) },
				      .proto = bpf_htons(ETH_P_IP) };

	if (!punt_is_attended(cfg, p) || !budget_spend(cfg, reason, p->now))
		return false;
	if (bpf_skb_change_head(p->skb, sizeof(header) + (p->l3 ? 0 : ETH_HLEN), 0))
		return false;
	return !bpf_skb_store_bytes(p->skb, 0, &header, sizeof(header), 0) &&
	       bpf_redirect(cfg->punt, 0) == TC_ACT_REDIRECT;
}

static __always_inline bool punt(const struct settings *cfg, const struct packet *p, enum punt_reason reason)
{
	return punt_with(cfg, p, reason, 0);
}

/* RFC 5508 REQ-8: the sender is told that there is no session for it. What is dropped has been counted. */
static __always_inline enum verdict refusal_send(const struct settings *cfg, const struct packet *p, enum verdict verdict)
{
	if (verdict != REFUSE)
		return verdict;
	return punt(cfg, p, PUNT_REFUSED) ? REDIRECT : DROP;
}
