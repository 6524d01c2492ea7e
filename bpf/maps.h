/* Every map with a line of purpose, and its small accessors. Map methods work only in the main text and never
 * through a macro or an argument (bcc), hence one accessor for each.
 *
 * A number that is a key is written as a whole word of the stack. Of one that is written by half the verifier believes that
 * what stood there before is still wanted, and tells ways apart by it. The kernel reads the half (of a little-endian word).
 *
 * How large those are that are SIZED is a setting: the control plane, which creates the maps, knows (programs.py).
 */
#define SIZED 64

BPF_F_TABLE("array", u32, struct session, sessions, SIZED, BPF_F_MMAPABLE); /* slot → both flows */
BPF_F_TABLE("array", u32, u64, claims, SIZED, BPF_F_MMAPABLE); /* a bit per slot: taken */
BPF_TABLE("hash", struct mapping_key, u32, mappings, SIZED); /* → slot */
BPF_F_TABLE("array", u32, struct front, fronts, SIZED, BPF_F_MMAPABLE); /* of `mappings`, each a cache line */
BPF_F_TABLE("array", u32, struct bucket, buckets, SIZED, BPF_F_MMAPABLE); /* of the index, each a cache line */
BPF_F_TABLE("array", u32, u64, groups, 1 << GROUP_BITS, BPF_F_MMAPABLE); /* of buckets → how many entries */
BPF_TABLE("hash", struct flow_key, u32, overflow, SIZED); /* of the index → slot */
BPF_F_TABLE("lpm_trie", struct forward_key, u32, forwards, 262144, BPF_F_NO_PREALLOC); /* → index of forward_rules */
BPF_F_TABLE("array", u32, struct forward, forward_rules, FORWARDS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct lease, leases, FORWARDS, BPF_F_MMAPABLE); /* by index of the rule */
BPF_TABLE("array", u32, u32, triggers, 1); /* how many rules are triggered */
BPF_TABLE("hash", struct redirected_key, struct redirected, redirects, REDIRECTED);
BPF_TABLE("hash", struct redirected_key, struct redirected_key, answers, REDIRECTED); /* the gateway's view → the client's */
BPF_F_TABLE("lpm_trie", struct spared_key, u32, spared, 8192, BPF_F_NO_PREALLOC); /* destinations not to be redirected */
BPF_TABLE("array", u32, u32, embryos, EMBRYOS); /* ring of slots opened from outside and not yet answered */
BPF_TABLE("hash", addr_t, struct host, hosts, 16384); /* internal hosts */
BPF_TABLE("hash", addr_t, struct tenant, tenants, SIZED); /* internal hosts with port blocks */
BPF_F_TABLE("array", u32, struct block, blocks, SIZED, BPF_F_MMAPABLE); /* by external * BLOCKS + its number there */
BPF_TABLE("hash", struct binding_key, struct binding, bindings, 16384);
BPF_TABLE("hash", struct call_key, struct call, calls, 4096);
BPF_TABLE("hash", struct caller_key, u32, callers, 4096); /* → jiffies of its last packet */
BPF_TABLE("lru_hash", struct contact_key, struct contact, contacts, 65536);
BPF_TABLE("lru_hash", struct fragment_key, struct fragment, fragments, 16384);
BPF_TABLE("array", u32, struct budget, budgets, PUNT_REASONS);
BPF_F_TABLE("lpm_trie", struct alg_key, struct alg, algs, 4096, BPF_F_NO_PREALLOC);
BPF_TABLE("array", u32, u32, alg_count, 1);
BPF_TABLE("hash", struct control_key, struct control, controls, 8192);
BPF_TABLE("hash", struct pinhole_key, struct pinhole, pinholes, 16384);
BPF_F_TABLE("lpm_trie", struct prefix_key, u32, prefixes, 1024, BPF_F_NO_PREALLOC); /* → prefix_role */
BPF_TABLE("hash", addr_t, u32, externals, 2 * EXTERNAL_ROOM); /* address → its index, where there are several */
BPF_F_TABLE("lpm_trie", struct choice_key, struct choice, choices, 256 * WANS, BPF_F_NO_PREALLOC); /* by internal prefix */
BPF_F_TABLE("lpm_trie", struct prefix_key, struct counterpart, counterparts, 512, BPF_F_NO_PREALLOC); /* both ways */
BPF_F_TABLE("lpm_trie", struct prefix_key, struct exempt, exempts, 256, BPF_F_NO_PREALLOC); /* by remote prefix */
BPF_TABLE("array", u32, struct interface, interfaces, INTERFACES); /* by interface index */
BPF_TABLE("hash", struct vlan_key, u32, vlans, 4096); /* → interface index; those on XDP */
BPF_TABLE("array", u32, struct settings, settings, 1);
BPF_F_TABLE("array", u32, struct event, events, EVENTS, BPF_F_MMAPABLE); /* by number, modulo their count */
BPF_F_TABLE("array", u32, struct watch, watch, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct traced, traces, TRACES, BPF_F_MMAPABLE); /* by number, modulo their count */
BPF_F_TABLE("array", u32, struct tracing, tracing, 1, BPF_F_MMAPABLE);
BPF_TABLE("percpu_array", u32, struct sight, sights, 1);
BPF_DEVMAP(transmitters, INTERFACES); /* interface index → device that takes its frames from XDP */
BPF_TABLE("percpu_array", u32, u64, counters, COUNTER_MAX);
BPF_TABLE("percpu_array", u32, struct traffic, translations, WANS * KINDS_TRANSLATED); /* by WAN and enum counter */
BPF_TABLE("percpu_array", u32, struct scratch, scratches, 1);
BPF_TABLE("array", u32, struct manifest, manifest, 1);

static __always_inline struct scratch *scratch_get(void)
{
	u64 zero = 0;
	return scratches.lookup((u32 *)&zero);
}

static __always_inline u32 jiffies_now(void)
{
	return bpf_jiffies64();
}

static __always_inline struct session *session_at(u32 slot)
{
	u64 key = slot;
	return sessions.lookup((u32 *)&key);
}

static __always_inline struct settings *settings_get(void)
{
	u64 zero = 0;
	return settings.lookup((u32 *)&zero);
}

static __always_inline struct interface *interface_at(u32 ifindex)
{
	u64 key = ifindex;
	return interfaces.lookup((u32 *)&key);
}

static __always_inline struct ends *ends_blank(void)
{
	struct scratch *scratch = scratch_get();

	if (!scratch)
		return NULL;
	__builtin_memset(&scratch->ends, 0, sizeof(scratch->ends));
	return &scratch->ends;
}

/* Makes the verifier forget what it has concluded about a packet. It would otherwise follow the long way of opening a
 * session once for every way in which a packet may have been parsed, and give up. Only for cold paths. What does not heed
 * that it failed, which never happens, is walked once more with all that was to be forgotten.
 */
static __always_inline bool packet_blur(struct packet *p)
{
	struct scratch *scratch = scratch_get();
	struct packet *blur;

	if (!scratch)
		return false;
	blur = &scratch->blurred;
	__builtin_memcpy(&blur->now, &p->now, sizeof(*p) - offsetof(struct packet, now));
	asm volatile("" : : "r"(blur) : "memory");
	__builtin_memcpy(&p->now, &blur->now, sizeof(*p) - offsetof(struct packet, now));
	return true;
}

static __always_inline u32 slot_blur(u32 slot)
{
	struct scratch *scratch = scratch_get();

	if (!scratch)
		return NO_SLOT;
	scratch->blurred.l3 = slot;
	asm volatile("" : : "r"(scratch) : "memory");
	return scratch->blurred.l3;
}

static __always_inline u32 prefix_role(addr_t addr)
{
	struct prefix_key key = { .bits = ADDR_BITS, .addr = addr };
	u32 *role = prefixes.lookup(&key);
	return role ? *role : PREFIX_FOREIGN;
}

static __always_inline bool addr_equal(addr_t a, addr_t b)
{
	for (int i = 0; i < ADDR_WORDS; i++)
		if (a.word[i] != b.word[i])
			return false;
	return true;
}

static __always_inline bool addr_is_unset(addr_t a)
{
	addr_t unset = {};
	return addr_equal(a, unset);
}
