/* At the LAN's ingress, what must not be forwarded at all, whatever the WAN's hooks would say: they see nothing of what
 * goes from one LAN to another, and they are gone with their device when a WAN is deleted and made anew (as a ppp0 is at
 * each dial). Until the agent, which may be dead, has attached to the new one, a packet must not get out by it.
 */
static __always_inline bool wans_are_there(const struct settings *cfg, const struct packet *p)
{
#pragma clang loop unroll(full)
	for (u32 wan = 0; wan < WANS; wan++)
		if (!cfg->exit[wan] || !device_is_there(p, cfg->exit[wan]))
			return false;
	return true;
}

/* Of most packets nothing else needs to be asked. */
static __always_inline bool source_is_at_home(const struct interface *here, const struct packet *p)
{
	if (!here || addr_is_unset(here->mask))
		return false;
	for (int i = 0; i < ADDR_WORDS; i++)
		if ((p->src.word[i] & here->mask.word[i]) != here->network.word[i])
			return false;
	return true;
}

/* From an internal host or claiming to be from elsewhere (BCP 38), to an internal host: no WAN will look at it. */
static __always_inline bool source_is_foreign(const struct packet *p)
{
	return prefix_role(p->dst) == PREFIX_INTERNAL && prefix_role(p->src) != PREFIX_INTERNAL && !addr_is_unset(p->src);
}

static __always_inline enum verdict guard(const struct settings *cfg, const struct packet *p, const struct interface *here)
{
	struct interface *to;

	if (!source_is_at_home(here, p) && source_is_foreign(p))
		return drop(COUNT_drop_source_foreign);
	if (wans_are_there(cfg, p))
		return CONTINUE;
	to = interface_at(route_to(p, p->dst));
	return to && to->role == ROLE_NONE ? drop(COUNT_drop_unguarded) : CONTINUE;
}
