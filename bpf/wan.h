/* Several WANs: by which one a packet leaves is for the kernel's routing to choose, and every WAN has mappings of its own.
 * Only what belongs to a session that a remote opened by another WAN, or has an external address of its own there, may not
 * leave by the chosen one. It is sent on, as it is, to the egress hook of its WAN, and translated there.
 */
static __always_inline u32 external_wan(const struct settings *cfg, u32 external)
{
	return slot_wan(cfg, slot_of(external, 0, 0));
}

/* Of a host with an external address of its own, by either address; or NO_WAN. */
static __always_inline u32 counterpart_wan(addr_t addr)
{
	struct prefix_key key = { .bits = ADDR_BITS, .addr = addr };
	struct counterpart *twin = counterparts.lookup(&key);

	return twin ? twin->wan : NO_WAN;
}

/* The WAN that a hairpin to @addr belongs to, whichever turns it round. */
static __always_inline u32 addr_wan(const struct settings *cfg, addr_t addr)
{
	u32 external = external_of(cfg, addr);

	if (WANS == 1)
		return 0;
	return external != NO_EXTERNAL ? external_wan(cfg, external) : counterpart_wan(addr);
}

/* Whose mappings an outbound packet is a matter of. */
static __always_inline u32 packet_wan(const struct packet *p)
{
	struct interface *here = interface_at(p->skb->ifindex);

	if (WANS == 1 || !here)
		return 0;
	return number_blur(p->hairpin ? hairpin_wan(p) : here->wan, p->now);
}

/* CONTINUE where @p may leave by the WAN that the kernel has chosen; else how it goes on: by @wan, as @source. */
static __always_inline enum verdict choose_wan(struct packet *p, u32 wan, addr_t source)
{
	if (WANS == 1 || p->hairpin || wan == p->wan)
		return CONTINUE;
	p->wan = wan;
	p->elsewhere = source;
	return ELSEWHERE;
}

/* Sends @p to the egress hook of another WAN, by the kernel's route for its source there. */
static __always_inline enum verdict leave_elsewhere(const struct settings *cfg, const struct packet *p)
{
	struct bpf_fib_lookup way = { .family = ADDR_FAMILY,
				      .ipv4_src = p->elsewhere.word[0],
				      .ipv4_dst = p->dst.word[0] };
	struct bpf_redir_neigh next = { .nh_family = ADDR_FAMILY };
	u32 length = packet_length(p);
	u64 wan = p->wan;
	u32 exit;
	long result;

	asm volatile("" : "+r"(wan)); /* or LLVM drops the check that the verifier wants to see */
	exit = wan < WANS ? cfg->exit[wan] : 0;
	way.ifindex = exit;
	way.tot_len = length < 65535 ? length : 65535;
	result = bpf_fib_lookup(p->skb, &way, sizeof(way), BPF_FIB_LOOKUP_OUTPUT);
	if (result == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return drop(COUNT_drop_exit_too_big) == DROP && punt_with(cfg, p, PUNT_TOO_BIG, way.mtu_result) ? REDIRECT : DROP;
	next.ipv4_nh = way.ipv4_dst;
	if ((result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH) || way.ifindex != exit ||
	    !ethernet_put(p) || redirect_neigh(exit, &next, sizeof(next), 0) != TC_ACT_REDIRECT)
		return drop(COUNT_drop_exit_route);
	count(COUNT_exit_other_wan);
	return REDIRECT;
}
