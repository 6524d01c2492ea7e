/* Incremental checksums (RFC 1624, equation 3): arithmetic only. Sums are one's complement in the
 * byte order of the packet.
 */
static __always_inline u16 csum_fold16(u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* What replacing @old by @new adds to a sum. */
static __always_inline u32 csum_delta_addr(addr_t old, addr_t new)
{
	u32 sum = 0;

	for (int i = 0; i < ADDR_WORDS; i++) {
		u32 gone = ~old.word[i], come = new.word[i];

		sum += (gone & 0xffff) + (gone >> 16) + (come & 0xffff) + (come >> 16);
	}
	return csum_fold16(sum);
}

static __always_inline u32 csum_delta_port(__be16 old, __be16 new)
{
	return csum_fold16((u32)(u16)~old + new);
}

static __always_inline u16 csum_apply(u16 check, u32 delta)
{
	return ~csum_fold16((u32)(u16)~check + delta);
}

/* A UDP checksum of 0 means none and stays; a computed 0 is sent as its other form (RFC 768). */
static __always_inline u16 csum_apply_udp(u16 check, u32 delta)
{
	u16 changed;

	if (!check)
		return 0;
	changed = csum_apply(check, delta);
	return changed ?: 0xffff;
}

/* TTL − 1: the word of TTL and protocol falls by 0x0100. */
#define CSUM_DELTA_TTL ((u32)bpf_htons(0xfeff))
