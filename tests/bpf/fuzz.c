/* Runs the programs on mutated packets, millions of them, and holds each run against the rules that no packet may break:
 * those of harness.Gateway, written a second time and without our headers. fuzzing.py tells it, by lines on standard input,
 * of the programs and the packets to start from, and looks after the tables before and after:
 *
 *     counters FD COUNT            an array that can be mapped, in place of the one for each CPU
 *     counter INDEX NAME
 *     internal NETWORK MASK        hexadecimal
 *     external ADDRESS
 *     hook NAME PROGRAM-FD KIND INGRESS IFINDEX MARK
 *     frame HOOK BYTES             from the Ethernet header on, or for a KIND of *_l3 from the IP header on
 *     run SEED COUNT
 *
 * Ends with 0 and a count of each ending, or with 1 and the packet that broke a rule.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROOM 4096 /* of a frame, with what the programs put before it */
#define LONGEST 1800 /* that a mutation may make one */
#define SHORTEST 15 /* that the kernel runs a program on */
#define HEADERS 54 /* Ethernet's and, of what its type may be, the longer: IPv6's */
#define HOOKS 24
#define FRAMES 64 /* of a hook */
#define COUNTERS 256
#define ADDRESSES 8
#define PUNT_HEADER 14

enum kind { WAN_OUT, WAN_IN, LAN_OUT, LAN_IN, LO_OUT, PUNT_IN, XDP_OUT, XDP_IN, WAN_OUT_L3, WAN_IN_L3, KINDS };
static const char *const kinds[KINDS] = { "wan_out", "wan_in",	"lan_out", "lan_in",	 "lo_out",
					  "punt_in", "xdp_out", "xdp_in",  "wan_out_l3", "wan_in_l3" };

enum verdict { PASS, DROP, REDIRECT };
enum reason { FRAGMENT_IN, FRAGMENT_OUT, REFUSED, TTL, TOO_BIG, ALG_IN, ALG_OUT }; /* of a punt */

struct frame {
	uint32_t len;
	uint8_t data[ROOM];
};

struct hook {
	char name[48];
	enum kind kind;
	int program;
	uint32_t ingress, ifindex, mark;
	uint32_t l3; /* where the IP header is */
	struct frame frame[FRAMES];
	uint32_t frames;
};

struct result {
	enum verdict verdict;
	int ended; /* a counter; -1: the packet goes on uncounted */
	uint32_t mark;
	struct frame after;
};

static struct hook hooks[HOOKS];
static uint32_t hook_count;
static char counters[COUNTERS][48];
static uint64_t ends[COUNTERS], packets, runs;
static const volatile uint64_t *counted;
static uint64_t counted_before[COUNTERS];
static uint32_t counter_count;
static uint32_t internal[ADDRESSES][2], internals, external[ADDRESSES], externals;

/* --- what broke a rule ------------------------------------------------------------------------- */

static const struct hook *at;
static const struct frame *given;
static const struct result *came;

static void print_bytes(const char *what, const struct frame *frame)
{
	printf("%s ", what);
	for (uint32_t i = 0; i < frame->len; i++)
		printf("%02x", frame->data[i]);
	printf("\n");
}

static void fault(const char *what)
{
	printf("packet %lu at %s: %s\n", (unsigned long)packets, at->name, what);
	printf("verdict %d, ended %s, counted", came->verdict, came->ended < 0 ? "nowhere" : counters[came->ended]);
	for (uint32_t i = 0; i < counter_count; i++)
		if (counted[i] != counted_before[i])
			printf(" %s %+ld", counters[i], (long)(counted[i] - counted_before[i]));
	print_bytes("\nbefore", given);
	print_bytes("after", &came->after);
	exit(1);
}

static void check(bool holds, const char *what)
{
	if (!holds)
		fault(what);
}

/* --- numbers by chance ------------------------------------------------------------------------- */

static uint64_t seed;

static uint64_t chance(void) /* splitmix64 */
{
	uint64_t mixed = seed += 0x9e3779b97f4a7c15;

	mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9;
	mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
	return mixed ^ mixed >> 31;
}

static uint32_t below(uint32_t bound)
{
	return (chance() >> 32) * bound >> 32;
}

static bool percent(uint32_t share)
{
	return below(100) < share;
}

/* --- packets ----------------------------------------------------------------------------------- */

static uint32_t get16(const uint8_t *data)
{
	return data[0] << 8 | data[1];
}

static uint32_t get32(const uint8_t *data)
{
	return get16(data) << 16 | get16(data + 2);
}

static void put16(uint8_t *data, uint32_t value)
{
	data[0] = value >> 8;
	data[1] = value;
}

static uint64_t sum(const uint8_t *data, uint32_t len)
{
	uint64_t total = 0;
	uint32_t i;

	for (i = 0; i + 1 < len; i += 2)
		total += get16(data + i);
	return len % 2 ? total + (data[i] << 8) : total;
}

static uint32_t header_length(const uint8_t *ip)
{
	return (ip[0] & 15) * 4;
}

static bool is_later_fragment(const uint8_t *ip)
{
	return get16(ip + 6) & 0x1fff;
}

/* Where in its transport header a protocol has its checksum; 0: none that we know. */
static uint32_t check_at(uint8_t protocol)
{
	return protocol == 1 ? 2 : protocol == 6 ? 16 : protocol == 17 ? 6 : 0;
}

/* An error, or a redirect. */
static bool has_quote(const uint8_t *ip, const uint8_t *l4)
{
	return ip[9] == 1 && (l4[0] == 3 || l4[0] == 5 || l4[0] == 11 || l4[0] == 12);
}

static uint64_t pseudo_header(const uint8_t *ip, uint32_t l4_len)
{
	return sum(ip + 12, 8) + ip[9] + l4_len;
}

/* What the checksums of a packet cover, summed up: 0 where one is right. Translation has to leave each as it was. */
struct sums {
	int32_t value[4]; /* of the IP header, of the transport, of a quote the same; NONE: there is none, or UDP's 0 */
};
#define NONE -1

static void sums_add(struct sums *found, const uint8_t *ip, uint32_t len, bool quoted)
{
	uint32_t header = header_length(ip), total = quoted || get16(ip + 2) > len ? len : get16(ip + 2), l4_len;
	const uint8_t *l4 = ip + header;
	uint32_t where = check_at(ip[9]);

	found->value[2 * quoted] = sum(ip, header < len ? header : len) % 0xffff;
	if (!where || is_later_fragment(ip) || total < header + where + 2)
		return;
	l4_len = total - header;
	if (ip[9] != 17 || get16(l4 + where))
		found->value[2 * quoted + 1] = (sum(l4, l4_len) + (ip[9] == 1 ? 0 : pseudo_header(ip, l4_len))) % 0xffff;
	if (!quoted && has_quote(ip, l4) && l4_len >= 36)
		sums_add(found, l4 + 8, l4_len - 8, true);
}

static struct sums sums_of(const uint8_t *ip, uint32_t len)
{
	struct sums found = { { NONE, NONE, NONE, NONE } };

	sums_add(&found, ip, len, false);
	return found;
}

/* Where the IP header of a frame is behind its VLAN tags; 0: it is not IP. */
static uint32_t ip_at(const struct hook *hook, const struct frame *frame)
{
	uint32_t type = hook->l3 - 2;

	if (!hook->l3)
		return 0;
	while (type + 6 <= frame->len && (get16(frame->data + type) == 0x8100 || get16(frame->data + type) == 0x88a8))
		type += 4;
	return type + 2 + 20 <= frame->len && get16(frame->data + type) == 0x0800 ? type + 2 : 0;
}

static bool is_internal(uint32_t address)
{
	for (uint32_t i = 0; i < internals; i++)
		if ((address & internal[i][1]) == internal[i][0])
			return true;
	return false;
}

static bool is_private(uint32_t address)
{
	return is_internal(address) || address >> 24 == 10 || address >> 20 == 0xac1 || address >> 16 == 0xc0a8;
}

static bool is_external(uint32_t address)
{
	for (uint32_t i = 0; i < externals; i++)
		if (external[i] == address)
			return true;
	return false;
}

/* --- the rules --------------------------------------------------------------------------------- */

static bool begins(const char *name, const char *word)
{
	return !strncmp(name, word, strlen(word));
}

static bool is_ending(const char *name)
{
	static const char *const first[] = { "fast_", "slow_", "exit_", "punt_", "up_", "own_", "drop_" };

	for (uint32_t i = 0; i < sizeof(first) / sizeof(*first); i++)
		if (begins(name, first[i]))
			return true;
	return false;
}

static void check_unchanged(const struct frame *before, const struct frame *after, uint32_t ahead, const char *what)
{
	check(after->len == before->len + ahead && !memcmp(after->data + ahead, before->data, before->len), what);
}

/* Marks what a translation may change in a packet, with the direction's address and port or, as a hairpin does, both's. */
static void may_change(uint8_t *mask, const uint8_t *ip, uint32_t len, bool source, bool destination, bool quoted)
{
	uint32_t header = header_length(ip), where = check_at(ip[9]);
	uint8_t *l4 = mask + header;

	memset(mask + 4, 1, 2); /* identification, of fragments; and of their like for the next receiver */
	mask[8] = 1;
	memset(mask + 10, 1, 2);
	memset(mask + 12, source, 4);
	memset(mask + 16, destination, 4);
	if (is_later_fragment(ip) || len < header + 8)
		return;
	memset(l4, source, 2);
	memset(l4 + 2, destination, 2);
	if (ip[9] == 1) { /* type and code stay; what stands for a port is the identifier */
		memset(l4, 0, 4);
		memset(l4 + 4, !has_quote(ip, ip + header), 2);
	}
	if (ip[9] == 33 || ip[9] == 136 || ip[9] == 47) /* the checksum of DCCP and UDP-Lite, a PPTP call's number */
		where = 6;
	if (where && where + 2 <= len - header)
		memset(l4 + where, 1, 2);
	if (ip[9] == 6 && len >= header + 20 && !quoted && ip[header + 13] & 2) /* the largest segment that SYN offers */
		memset(l4 + 20, 1, len - header - 20 < 40 ? len - header - 20 : 40);
	if (!quoted && has_quote(ip, ip + header) && len >= header + 8 + 20)
		may_change(l4 + 8, ip + header + 8, len - header - 8, destination, source, true);
}

static void check_translated(const uint8_t *old, const uint8_t *new, uint32_t len, const char *name, uint32_t hops)
{
	struct sums before = sums_of(old, len), after = sums_of(new, len);
	bool outbound = strstr(name, "outbound"), inbound = strstr(name, "inbound"), both = !outbound && !inbound;
	uint8_t mask[2 * ROOM] = {};

	check(!memcmp(&before, &after, sizeof(before)), "a checksum is not what it was");
	check((uint32_t)(old[8] - new[8]) == hops, "TTL");
	may_change(mask, old, len, outbound || both, inbound || both, false);
	for (uint32_t i = 0; i < len; i++)
		check(old[i] == new[i] || mask[i], "more is changed than a translation may");
	check(!outbound || is_external(get32(new + 12)), "the new source is not an external address");
	/* The gateway's own, where it asked by ICMP, which is a session as others have. */
	check(!inbound || is_private(get32(new + 16)) || is_external(get32(new + 16)),
	      "the new destination is not an internal address");
}

static void check_source(const uint8_t *ip)
{
	check(!is_private(get32(ip + 12)), "a private source on the WAN");
}

/* Of what leaves. Of a translated quote the source is the session's remote: where the kernel routes that to the WAN, it
 * stands there, whatever its address. Any other may have a private address, as a modem has, but none of a host inside.
 */
static void check_quote(const uint8_t *ip, uint32_t len, bool translated)
{
	const uint8_t *l4 = ip + header_length(ip);

	if (is_later_fragment(ip) || len < header_length(ip) + 28u || !has_quote(ip, l4))
		return;
	check(!is_private(get32(l4 + 8 + 16)), "a private address quoted on the WAN");
	check(translated || !is_internal(get32(l4 + 8 + 12)), "an internal address quoted on the WAN");
}

static void check_punted(const struct hook *hook, const struct frame *before, const struct frame *after)
{
	uint8_t reason = after->data[1];
	const char *name = counters[came->ended];
	uint32_t told = hook->kind == LAN_IN ? hook->ifindex : hooks[0].ifindex;
	uint32_t header = hook->l3 ? PUNT_HEADER : PUNT_HEADER + 14;

	check(after->data[0] == 2 && get32(after->data + 2) == told, "the agent is told another interface");
	check(begins(name, "punt_fragment") ? reason <= FRAGMENT_OUT :
	      begins(name, "drop_ttl")	    ? reason == TTL :
					      reason == REFUSED,
	      "the agent is told another reason");
	check_unchanged(before, after, header, "the agent gets it changed");
}

static void judge(const struct hook *hook, const struct frame *before, const struct result *result)
{
	const struct frame *after = &result->after;
	const char *name = result->ended < 0 ? "" : counters[result->ended];
	bool fast = begins(name, "fast_"), drop = begins(name, "drop_");
	bool hairpin = begins(name, "slow_hairpin"), out = hook->kind == WAN_OUT || hook->kind == WAN_OUT_L3;
	uint32_t old = hook->l3, new = hook->l3, hops;
	enum verdict expected;

	at = hook;
	given = before;
	came = result;
	if (result->ended < 0) { /* nothing was done to it, or a hairpin is turned round, which ends elsewhere */
		check(hook->kind == LAN_OUT	  ? result->verdict == PASS :
		      hook->kind == WAN_OUT	  ? result->verdict == REDIRECT :
		      hook->kind == LAN_IN || hook->kind == LO_OUT ? result->verdict != DROP :
						    false,
		      "it goes on uncounted");
		if (hook->kind != WAN_OUT) {
			check_unchanged(before, after, 0, "it goes on uncounted and changed");
			return;
		}
		check(after->len == before->len, "another length");
		check_translated(before->data + old, after->data + new, before->len - old, "", 0);
		check_source(after->data + new); /* the second leg leads inside */
		return;
	}
	if (result->verdict == REDIRECT && (drop || !strcmp(name, "punt_fragment"))) {
		check_punted(hook, before, after);
		return;
	}
	expected = drop ? DROP : fast || hairpin || begins(name, "punt_") || begins(name, "exit_") ? REDIRECT : PASS;
	check(result->verdict == expected, "the verdict is another one than the counter says");
	if (drop)
		return;
	if (begins(name, "exit_") || begins(name, "own_") || begins(name, "up_")) {
		check_unchanged(before, after, 0, "it is not ours, but changed");
	} else if (!strcmp(name, "punt_return")) {
		check(after->len + PUNT_HEADER == before->len &&
			      !memcmp(after->data + 14, before->data + PUNT_HEADER + 14, after->len - 14),
		      "what the agent has written comes back changed");
		return;
	} else if (!strcmp(name, "punt_alg")) {
		check_unchanged(before, after, hook->l3 ? PUNT_HEADER : PUNT_HEADER + 14, "the agent gets it changed");
		return;
	} else {
		if (fast) {
			old = ip_at(hook, before);
			new = ip_at(hook, after);
		}
		hops = fast || (hairpin && hook->kind == WAN_IN);
		check(before->len - old == after->len - new, "another length");
		check_translated(before->data + old, after->data + new, before->len - old, name, hops);
	}
	if (hairpin && hook->kind == WAN_IN && is_private(get32(before->data + old + 12)))
		return; /* a first leg does not leave it so: the mark is ours alone, and here it is made up */
	if (begins(name, "exit_") || (strcmp(name, "fast_outbound") && !hairpin && !out))
		return;
	if (!strcmp(name, "own_not_ip") || (hook->l3 && !ip_at(hook, after)))
		return;
	check_source(after->data + new);
	if (!hairpin) /* which leads inside */
		check_quote(after->data + new, after->len - new, !strcmp(name, "slow_icmp_error_outbound"));
}

/* --- running ----------------------------------------------------------------------------------- */

static enum verdict verdict_of(const struct hook *hook, uint32_t value)
{
	if (hook->kind == XDP_OUT || hook->kind == XDP_IN)
		return value == XDP_PASS ? PASS : value == XDP_REDIRECT ? REDIRECT : DROP;
	return value == (uint32_t)-1 || !value ? PASS : value == 7 ? REDIRECT : DROP;
}

static void run(const struct hook *hook, const struct frame *frame, uint32_t mark, struct result *result)
{
	bool xdp = hook->kind == XDP_OUT || hook->kind == XDP_IN;
	struct __sk_buff skb = { .mark = mark, .ingress_ifindex = hook->ingress, .ifindex = hook->ifindex };
	struct xdp_md md = { .data_end = frame->len, .ingress_ifindex = hook->ingress };
	union bpf_attr attr = { .test = {
		.prog_fd = hook->program,
		.data_size_in = frame->len,
		.data_in = (uintptr_t)frame->data,
		.data_size_out = ROOM,
		.data_out = (uintptr_t)result->after.data,
		.ctx_size_in = xdp ? sizeof(md) : sizeof(skb),
		.ctx_in = xdp ? (uintptr_t)&md : (uintptr_t)&skb,
		.ctx_size_out = xdp ? sizeof(md) : sizeof(skb),
		.ctx_out = xdp ? (uintptr_t)&md : (uintptr_t)&skb,
		.repeat = 1,
	} };
	uint32_t ways = 0;

	result->ended = -1;
	result->verdict = DROP;
	result->after.len = 0;
	if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof(attr))) {
		if (errno == EINVAL && frame->len < HEADERS) /* the kernel, which reads them for itself, misses some */
			return;
		printf("%s refuses %u bytes: %s\n", hook->name, frame->len, strerror(errno));
		print_bytes("frame", frame);
		exit(1);
	}
	runs++;
	result->after.len = attr.test.data_size_out;
	result->mark = skb.mark;
	result->verdict = verdict_of(hook, attr.test.retval);
	at = hook;
	given = frame;
	came = result;
	for (uint32_t i = 0; i < counter_count; i++) {
		if (counted[i] == counted_before[i] || !is_ending(counters[i]))
			continue;
		result->ended = i;
		ways += counted[i] - counted_before[i];
	}
	check(ways <= 1, "more than one way to end");
	judge(hook, frame, result);
	if (result->ended >= 0)
		ends[result->ended]++;
	memcpy(counted_before, (const void *)counted, counter_count * sizeof(*counted));
}

static const struct hook *hook_of(enum kind kind)
{
	for (uint32_t i = 0; i < hook_count; i++)
		if (hooks[i].kind == kind)
			return &hooks[i];
	return NULL;
}

/* TC, on the same packet right after, makes of it what XDP made, but for TTL and IP checksum. */
static void check_agreement(const struct hook *hook, const struct frame *frame, const struct result *fast)
{
	static struct frame bare;
	static struct result slow;
	const struct hook *other = hook_of(hook->kind == XDP_OUT ? WAN_OUT : WAN_IN);
	uint32_t old = ip_at(hook, frame), new = ip_at(hook, &fast->after);
	uint8_t *ip;

	bare.len = frame->len - old + 14;
	memcpy(bare.data, frame->data, 12);
	memcpy(bare.data + 12, frame->data + old - 2, frame->len - old + 2);
	run(other, &bare, 0, &slow);
	check(slow.ended >= 0 && !strcmp(counters[slow.ended] + 5, counters[fast->ended] + 5), "XDP has translated it");
	ip = slow.after.data + 14;
	ip[8] = fast->after.data[new + 8];
	memcpy(ip + 10, fast->after.data + new + 10, 2);
	check(!memcmp(ip, fast->after.data + new, bare.len - 14), "XDP has made something else of it");
}

/* Ways of a packet on from the hook, as a gateway's own. */
static void follow(const struct hook *hook, const struct frame *frame, struct result *result)
{
	static struct frame next;
	const char *name = result->ended < 0 ? "" : counters[result->ended];
	const struct hook *port = hook_of(PUNT_IN), *back;
	static struct result second;

	if (begins(name, "fast_")) {
		check_agreement(hook, frame, result);
	} else if (result->verdict == REDIRECT && result->ended < 0) { /* a hairpin: to the WAN's egress, and round */
		next = result->after;
		back = hook_of(hook->kind == LAN_IN ? WAN_OUT : WAN_IN);
		run(back, &next, result->mark, &second);
		if (back->kind == WAN_OUT && second.verdict == REDIRECT && second.ended < 0) {
			next = second.after;
			run(hook_of(WAN_IN), &next, second.mark, result);
		}
	} else if (port && result->verdict == REDIRECT && (!strcmp(name, "punt_fragment") || !strcmp(name, "punt_alg"))) {
		next = result->after; /* as the agent got it, or with another header */
		if (percent(30))
			next.data[below(PUNT_HEADER + 14)] = chance();
		run(port, &next, 0, &second);
		if (second.ended < 0 || strcmp(counters[second.ended], "punt_return"))
			return;
		back = hook_of(next.data[1] == FRAGMENT_IN || next.data[1] == ALG_IN ? WAN_IN : WAN_OUT);
		next = second.after;
		run(back, &next, second.mark, result);
	}
}

/* --- mutations --------------------------------------------------------------------------------- */

static void checksum_fix(uint8_t *check, uint64_t total)
{
	total -= get16(check);
	put16(check, 0xffff - total % 0xffff);
}

static void checksums_fix(uint8_t *ip, uint32_t len, uint32_t share)
{
	uint32_t header = header_length(ip), where = check_at(ip[9]), total = get16(ip + 2) < len ? get16(ip + 2) : len;
	uint8_t *l4 = ip + header;

	if (header < 20 || header > len)
		return;
	if (percent(share))
		checksum_fix(ip + 10, sum(ip, header));
	if (!where || is_later_fragment(ip) || total < header + where + 2 || !percent(share))
		return;
	if (has_quote(ip, l4) && total >= header + 8 + 20)
		checksums_fix(l4 + 8, total - header - 8, share);
	checksum_fix(l4 + where, sum(l4, total - header) + (ip[9] == 1 ? 0 : pseudo_header(ip, total - header)));
}

/* A byte that a parser looks at: of the IP header, the transport's, or those of a quote. */
static uint32_t telling_place(const uint8_t *ip, uint32_t len)
{
	static const uint8_t of_ip[] = { 0, 0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 9, 10, 12, 15, 16, 19, 20, 21, 22 };
	static const uint8_t of_l4[] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 13, 16, 20, 21, 22, 24 };
	uint32_t base = percent(50) ? 0 : header_length(ip), place;

	if (percent(30))
		base = header_length(ip) + 8 + (percent(50) ? 0 : 20);
	place = base + (percent(50) ? of_ip[below(sizeof(of_ip))] : of_l4[below(sizeof(of_l4))]);
	return place < len ? place : below(len);
}

static void mutate(const struct hook *hook, struct frame *frame)
{
	static const uint8_t telling[] = { 0x00, 0x01, 0x04, 0x06, 0x08, 0x11, 0x14, 0x20, 0x2f,
					   0x3f, 0x40, 0x45, 0x46, 0x4f, 0x7f, 0x80, 0x84, 0xff };
	static const uint8_t times[] = { 0, 1, 1, 1, 1, 2, 2, 3, 6 };
	uint8_t *ip = frame->data + hook->l3;
	uint32_t least = hook->l3 ? hook->l3 + 1 : SHORTEST, more;

	for (uint32_t i = times[below(sizeof(times))]; i; i--) {
		uint32_t len = frame->len - hook->l3, place = percent(60) ? telling_place(ip, len) : below(len);
		uint32_t what = below(100);

		if (what < 35) {
			ip[place] = telling[below(sizeof(telling))];
		} else if (what < 60) {
			ip[place] ^= 1 << below(8);
		} else if (what < 75) {
			ip[place] = chance();
		} else if (what < 83) { /* truncated, anywhere */
			frame->len = hook->l3 + place < least ? least : hook->l3 + place;
		} else if (what < 91 && len >= 4) {
			put16(ip + 2, len + below(17) - 8);
		} else if (what < 97 && frame->len < LONGEST - 40) {
			for (more = 1 + below(39); more; more--)
				frame->data[frame->len++] = chance();
		} else if (what < 99 && hook->l3) {
			frame->data[below(hook->l3)] = percent(50) ? chance() : telling[below(sizeof(telling))];
		} else if (frame->len < LONGEST - 40) { /* another VLAN tag, or options that were not there */
			more = 4;
			memmove(ip + 20 + more, ip + 20, frame->len - hook->l3 > 20 ? frame->len - hook->l3 - 20 : 0);
			frame->len += more;
			ip[0]++;
			put16(ip + 2, get16(ip + 2) + more);
		}
	}
	if (frame->len >= hook->l3 + 20)
		checksums_fix(ip, frame->len - hook->l3, 60);
}

/* --- what fuzzing.py says ------------------------------------------------------------------------- */

static uint32_t unhex(const char *text, uint8_t *data)
{
	uint32_t len = 0;

	for (unsigned byte; len < LONGEST && sscanf(text + 2 * len, "%2x", &byte) == 1; len++)
		data[len] = byte;
	return len;
}

static void map_counters(int fd, uint32_t count)
{
	counter_count = count;
	counted = mmap(NULL, count * sizeof(*counted), PROT_READ, MAP_SHARED, fd, 0);
	if (counted == MAP_FAILED || count > COUNTERS) {
		perror("counters");
		exit(2);
	}
	memcpy(counted_before, (const void *)counted, count * sizeof(*counted));
}

static void add_hook(const char *name, int program, const char *kind, uint32_t ingress, uint32_t ifindex, uint32_t mark)
{
	struct hook *hook = &hooks[hook_count++];

	strcpy(hook->name, name);
	while (hook->kind < KINDS && strcmp(kinds[hook->kind], kind))
		hook->kind++;
	hook->program = program;
	hook->ingress = ingress;
	hook->ifindex = ifindex;
	hook->mark = mark;
	hook->l3 = strstr(kind, "_l3") ? 0 : 14;
}

static void add_frame(const char *name, const char *bytes)
{
	for (uint32_t i = 0; i < hook_count; i++)
		if (!strcmp(hooks[i].name, name) && hooks[i].frames < FRAMES) {
			struct frame *frame = &hooks[i].frame[hooks[i].frames++];

			frame->len = unhex(bytes, frame->data);
		}
}

static void fuzz(uint64_t from, uint64_t count)
{
	static struct frame frame;
	static struct result result;

	seed = from;
	for (packets = 0; packets < count; packets++) {
		const struct hook *hook = &hooks[below(hook_count)];

		if (!hook->frames)
			continue;
		frame = hook->frame[below(hook->frames)];
		mutate(hook, &frame);
		run(hook, &frame, hook->mark, &result);
		follow(hook, &frame, &result);
	}
}

int main(void)
{
	static char line[2 * ROOM + 100], bytes[2 * ROOM + 1];
	char name[48], kind[32];
	unsigned long a, b;
	unsigned x, y, z;
	int fd;

	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "counters %d %u", &fd, &x) == 2)
			map_counters(fd, x);
		else if (sscanf(line, "counter %u %47s", &x, name) == 2 && x < COUNTERS)
			strcpy(counters[x], name);
		else if (sscanf(line, "internal %x %x", &x, &y) == 2 && internals < ADDRESSES)
			memcpy(internal[internals++], (uint32_t[]){ x, y }, sizeof(*internal));
		else if (sscanf(line, "external %x", &x) == 1 && externals < ADDRESSES)
			external[externals++] = x;
		else if (sscanf(line, "hook %31s %d %31s %u %u %u", name, &fd, kind, &x, &y, &z) == 6 && hook_count < HOOKS)
			add_hook(name, fd, kind, x, y, z);
		else if (sscanf(line, "frame %47s %8192s", name, bytes) == 2)
			add_frame(name, bytes);
		else if (sscanf(line, "run %lu %lu", &a, &b) == 2)
			fuzz(a, b);
		else {
			fprintf(stderr, "not understood: %s", line);
			return 2;
		}
	}
	printf("runs %lu\n", (unsigned long)runs);
	for (uint32_t i = 0; i < counter_count; i++)
		if (ends[i])
			printf("%s %lu\n", counters[i], (unsigned long)ends[i]);
	return 0;
}
