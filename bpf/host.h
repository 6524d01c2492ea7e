/* Limits for each internal host (RFC 6888 REQ-4): how many sessions and external ports it has, and how fast it may open
 * more (a token bucket). Who opens is asked first and counted after; on several CPUs at once one too many may slip
 * through, which no limit minds. The gateway itself, and what comes from outside, is not limited here.
 */
static __always_inline struct host *host_find(addr_t addr)
{
	return hosts.lookup(&addr);
}

/* NULL when the table is full: then nobody new is counted. */
static __always_inline struct host *host_get(const struct settings *cfg, addr_t addr, u32 now)
{
	struct host fresh = { .tokens = cfg->host_burst, .refilled_at = now };

	if (!host_find(addr))
		hosts.insert(&addr, &fresh);
	return host_find(addr);
}

static __always_inline void host_refill(const struct settings *cfg, struct host *host, u32 now)
{
	u64 come = (u64)(now - host->refilled_at) * cfg->host_rate / (cfg->hz ?: 1);

	if (!come)
		return;
	come += host->tokens;
	host->tokens = come < cfg->host_burst ? come : cfg->host_burst;
	host->refilled_at = now;
}

static __always_inline enum verdict host_refuse(struct host *host, enum counter reason)
{
	host->refused++;
	return deny(reason, REFUSE);
}

/* May @host open a session, and for it a mapping when @mapping? */
static __always_inline enum verdict host_may_open(const struct settings *cfg, struct host *host, u32 class, bool mapping,
						  u32 now)
{
	if (host->sessions >= cfg->host_sessions ||
	    (mapping && host->mappings[class & CLASS_MASK] >= cfg->host_mappings))
		return host_refuse(host, COUNT_drop_host_limit);
	host_refill(cfg, host, now);
	if (!host->tokens)
		return host_refuse(host, COUNT_drop_host_rate);
	host->tokens--;
	return CONTINUE;
}

static __always_inline void host_session_ended(addr_t addr)
{
	struct host *host = host_find(addr);

	if (host && host->sessions)
		__sync_fetch_and_add(&host->sessions, -1);
}

static __always_inline void host_mapping_ended(addr_t addr, u32 class)
{
	struct host *host = host_find(addr);
	u32 i = class;

	asm volatile("" : "+r"(i)); /* or LLVM drops the mask that the verifier wants to see */
	i &= CLASS_MASK;
	if (host && host->mappings[i])
		__sync_fetch_and_add(&host->mappings[i], -1);
}
