/* The benchmark's traffic: generators that write every frame whole, sinks that check what arrives and drop it, and
 * the two gateways that need no kernel (drop, bare redirect). All of it runs on one core, so counters need no
 * atomics. Nothing here is shared with the datapath under test: headers and checksums are its own reading of
 * RFC 768, 791 and 1071. One packet of flow i is
 *
 *	inside:  HOST_BASE + e % HOSTS : HOST_PORT + e / HOSTS  <->  REMOTE_BASE + i % REMOTES : REMOTE_PORT
 *	outside: PUBLIC_ADDR + whatever of EXTERNALS : whatever port the gateway gave i
 *
 * with e = i % ENDPOINTS, as the public addresses have no more ports; each further round of endpoints has REMOTES of its own,
 * and carries i in its payload, behind MAGIC.
 */
#include <uapi/linux/if_ether.h>
#include <linux/in.h>
#include <linux/types.h>

#define MAGIC 0x6d617371 /* "masq" */
#define BROADEST_FRAME 1514

enum direction { OUT, IN };

struct ethernet {
	u16 dst[3], src[3];
	__be16 proto;
};

struct ip {
	__be16 version_ihl_tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	u8 ttl, proto;
	u16 check;
	__be32 src, dst;
};

struct udp {
	__be16 src, dst;
	__be16 length;
	u16 check;
};

struct payload {
	__be32 magic;
	__be32 flow;
};

struct frame {
	struct ethernet *eth;
	struct ip *ip;
	struct udp *udp;
	struct payload *payload;
};

/* Set from Python before each pass. */
struct pass {
	u16 mac_dst[3];
	u16 mac_src[3]; /* what the generator writes */
	__be16 ip_length;
	__be16 udp_length;
	u32 flows;
	u32 turn; /* of a contestant, from 1: ports learned in another turn are forgotten */
	u32 sample_every; /* one packet in so many is checked whole; 1: all, and ports are learned */
	u8 translated; /* does the contestant translate */
	u8 hops; /* by how much it lowers the TTL */
	u16 pad;
};
BPF_ARRAY(passes, struct pass, 1);

/* The generator's place in the round of flows, for each direction. */
BPF_ARRAY(places, u32, 2);

/* What can be wrong with a packet; Python reads the words from here. */
#define REASONS(X)                     \
	X(flow, "flow number")         \
	X(length, "length")            \
	X(address, "address")          \
	X(ttl, "TTL")                  \
	X(port, "port")                \
	X(ip_checksum, "IP checksum")  \
	X(udp_checksum, "UDP checksum")
#define REASON_ENUM(name, words) WRONG_##name,
enum reason { REASONS(REASON_ENUM) WRONG_REASONS, RIGHT = WRONG_REASONS };

struct tally {
	u64 seen; /* packets of ours, right or wrong */
	u64 checked; /* of these, in full */
	u64 strange; /* packets not of ours */
	u64 wrong[WRONG_REASONS];
	u64 since; /* packets since the last full check */
};
BPF_ARRAY(tallies, struct tally, 2);

/* The endpoint outside, by flow, learned from the first outbound packet of the contestant's turn. */
struct learned {
	u32 turn;
	__be16 port;
	u16 external; /* which of the public addresses */
};
BPF_F_TABLE("array", u32, struct learned, ports, MOST_FLOWS, BPF_F_MMAPABLE);

/* Where generators send (lan0, wan0 of the outer namespaces) and where the bare redirect does (gate's). */
BPF_DEVMAP(outlets, 2);
BPF_DEVMAP(gate_outlets, 2);

struct mac_pair {
	u16 dst[3], src[3];
};
BPF_ARRAY(gate_macs, struct mac_pair, 2);

/* ---- the plan of addresses ---- */

static __always_inline __be32 host_of(u32 flow)
{
	return bpf_htonl(HOST_BASE + flow % ENDPOINTS % HOSTS);
}

static __always_inline __be16 host_port_of(u32 flow)
{
	return bpf_htons(HOST_PORT + flow % ENDPOINTS / HOSTS);
}

static __always_inline __be32 remote_of(u32 flow)
{
	return bpf_htonl(REMOTE_BASE + flow / ENDPOINTS * REMOTES + flow % REMOTES);
}

static __always_inline struct learned *learned_of(u32 flow)
{
	return ports.lookup(&flow);
}

/* ---- checksums, RFC 1071, not incremental ---- */

static __always_inline u32 sum_addr(__be32 addr)
{
	return (addr & 0xffff) + (addr >> 16);
}

static __always_inline u16 sum_fold(u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static __always_inline u32 sum_ip(const struct ip *ip)
{
	const u16 *ttl_proto = (const u16 *)&ip->ttl;

	return ip->version_ihl_tos + ip->length + ip->id + ip->fragment + *ttl_proto + ip->check + sum_addr(ip->src) +
	       sum_addr(ip->dst);
}

static __always_inline u32 sum_pseudo_header(const struct ip *ip, const struct udp *udp)
{
	return sum_addr(ip->src) + sum_addr(ip->dst) + bpf_htons(IPPROTO_UDP) + udp->length;
}

static __always_inline u32 sum_udp_header(const struct udp *udp)
{
	return udp->src + udp->dst + udp->length + udp->check;
}

/* ---- generators ---- */

static __always_inline bool frame_at(struct xdp_md *ctx, struct frame *f)
{
	f->eth = (void *)(long)ctx->data;
	f->ip = (void *)(f->eth + 1);
	f->udp = (void *)(f->ip + 1);
	f->payload = (void *)(f->udp + 1);
	return (void *)(f->payload + 1) <= (void *)(long)ctx->data_end;
}

static __always_inline u32 place_advance(enum direction direction, u32 flows)
{
	u32 key = direction;
	u32 *place = places.lookup(&key);
	u32 flow;

	if (!place)
		return 0;
	flow = *place;
	*place = flow + 1 >= flows ? 0 : flow + 1;
	return flow;
}

/* Who sends to whom, in this direction, on the generator's side of the gateway. */
static __always_inline void endpoints_write(struct frame *f, const struct pass *pass, enum direction direction,
					    u32 flow)
{
	struct learned *learned;

	if (direction == OUT) {
		f->ip->src = host_of(flow);
		f->ip->dst = remote_of(flow);
		f->udp->src = host_port_of(flow);
		f->udp->dst = bpf_htons(REMOTE_PORT);
		return;
	}
	f->ip->src = remote_of(flow);
	f->udp->src = bpf_htons(REMOTE_PORT);
	if (!pass->translated) {
		f->ip->dst = host_of(flow);
		f->udp->dst = host_port_of(flow);
		return;
	}
	learned = learned_of(flow);
	f->ip->dst = bpf_htonl(PUBLIC_ADDR + (learned ? learned->external : 0));
	f->udp->dst = learned && learned->turn == pass->turn ? learned->port : 0;
}

/* Live frames come back as their last user left them: all of the header and the mark are written each time.
 * The rest of the payload is zero, and nobody on the way writes it.
 */
static __always_inline int generate(struct xdp_md *ctx, enum direction direction)
{
	int zero = 0;
	struct pass *pass = passes.lookup(&zero);
	struct frame f;
	u32 flow, sum;

	if (!pass || !frame_at(ctx, &f))
		return XDP_ABORTED;
	flow = place_advance(direction, pass->flows);
	__builtin_memcpy(f.eth->dst, pass->mac_dst, sizeof(f.eth->dst));
	__builtin_memcpy(f.eth->src, pass->mac_src, sizeof(f.eth->src));
	f.eth->proto = bpf_htons(ETH_P_IP);
	f.ip->version_ihl_tos = bpf_htons(0x4500);
	f.ip->length = pass->ip_length;
	f.ip->id = 0;
	f.ip->fragment = bpf_htons(0x4000); /* don't fragment */
	f.ip->ttl = TTL;
	f.ip->proto = IPPROTO_UDP;
	f.ip->check = 0;
	f.udp->length = pass->udp_length;
	f.udp->check = 0;
	f.payload->magic = bpf_htonl(MAGIC);
	f.payload->flow = bpf_htonl(flow);
	endpoints_write(&f, pass, direction, flow);
	f.ip->check = ~sum_fold(sum_ip(f.ip));
	sum = sum_pseudo_header(f.ip, f.udp) + sum_udp_header(f.udp) + sum_addr(f.payload->magic) +
	      sum_addr(f.payload->flow);
	f.udp->check = (u16)~sum_fold(sum) ?: 0xffff;
	return outlets.redirect_map(direction, 0);
}

int generate_out(struct xdp_md *ctx)
{
	return generate(ctx, OUT);
}

int generate_in(struct xdp_md *ctx)
{
	return generate(ctx, IN);
}

/* ---- sinks ---- */

/* What every packet is checked for: lengths, addresses, TTL. */
static __always_inline enum reason headers_judge(const struct frame *f, const struct pass *pass, u32 frame_length,
						 enum direction direction, u32 flow)
{
	__be32 inside = host_of(flow), remote = remote_of(flow);

	if (flow >= pass->flows)
		return WRONG_flow;
	if (f->ip->length != pass->ip_length || f->udp->length != pass->udp_length ||
	    frame_length != sizeof(struct ethernet) + bpf_ntohs(pass->ip_length))
		return WRONG_length;
	if (direction == OUT && pass->translated) /* any of the public addresses; port_expected() knows which */
		inside = bpf_ntohl(f->ip->src) - PUBLIC_ADDR < EXTERNALS ? f->ip->src : bpf_htonl(PUBLIC_ADDR);
	if (direction == OUT ? f->ip->src != inside || f->ip->dst != remote :
			       f->ip->src != remote || f->ip->dst != inside)
		return WRONG_address;
	if (f->ip->ttl != TTL - pass->hops)
		return WRONG_ttl;
	return RIGHT;
}

/* The port that stands for the flow on this side: the host's own, or the one the gateway chose, which is
 * learned with its address when it is first seen, and must stay.
 */
static __always_inline __be16 port_expected(const struct frame *f, const struct pass *pass, enum direction direction,
					    u32 flow)
{
	struct learned *learned;

	if (direction == IN || !pass->translated)
		return host_port_of(flow);
	learned = learned_of(flow);
	if (!learned)
		return 0;
	if (learned->turn != pass->turn) {
		learned->turn = pass->turn;
		learned->port = f->udp->src;
		learned->external = bpf_ntohl(f->ip->src) - PUBLIC_ADDR;
	}
	if (learned->external != bpf_ntohl(f->ip->src) - PUBLIC_ADDR)
		return 0;
	return learned->port;
}

/* Ports and both checksums, these over the whole packet. */
static __always_inline enum reason packet_judge(struct xdp_md *ctx, const struct frame *f, const struct pass *pass,
						enum direction direction, u32 flow)
{
	__be16 port = port_expected(f, pass, direction, flow), remote_port = bpf_htons(REMOTE_PORT);
	void *end = (void *)(long)ctx->data_end;
	const u16 *word = (const u16 *)f->udp;
	u32 sum = sum_pseudo_header(f->ip, f->udp);

	if (direction == OUT ? f->udp->src != port || f->udp->dst != remote_port :
			       f->udp->src != remote_port || f->udp->dst != port)
		return WRONG_port;
	if (sum_fold(sum_ip(f->ip)) != 0xffff)
		return WRONG_ip_checksum;
	for (int i = 0; i < BROADEST_FRAME / 2; i++, word++) {
		/* Else clang counts the words first, and the verifier loses the comparison with the end. */
		asm volatile("" : "+r"(word));
		if ((void *)(word + 1) > end)
			break;
		sum += *word;
	}
	return f->udp->check && sum_fold(sum) == 0xffff ? RIGHT : WRONG_udp_checksum;
}

static __always_inline bool is_sampled(struct tally *tally, const struct pass *pass)
{
	if (++tally->since < pass->sample_every)
		return false;
	tally->since = 0;
	tally->checked++;
	return true;
}

static __always_inline int sink(struct xdp_md *ctx, enum direction direction)
{
	int zero = 0;
	u32 key = direction, flow;
	struct pass *pass = passes.lookup(&zero);
	struct tally *tally = tallies.lookup(&key);
	enum reason reason;
	struct frame f;

	if (!pass || !tally)
		return XDP_ABORTED;
	if (!frame_at(ctx, &f) || f.payload->magic != bpf_htonl(MAGIC)) {
		tally->strange++;
		return XDP_DROP;
	}
	tally->seen++;
	flow = bpf_ntohl(f.payload->flow);
	reason = headers_judge(&f, pass, ctx->data_end - ctx->data, direction, flow);
	if (reason == RIGHT && is_sampled(tally, pass))
		reason = packet_judge(ctx, &f, pass, direction, flow);
	if (reason < WRONG_REASONS)
		tally->wrong[reason]++;
	return XDP_DROP;
}

int sink_out(struct xdp_md *ctx)
{
	return sink(ctx, OUT);
}

int sink_in(struct xdp_md *ctx)
{
	return sink(ctx, IN);
}

/* ---- one program in isolation ---- */

/* A test run leaves the packet to the next repetition as the program made it, so each one begins with writing the
 * frame anew; what that costs is measured with an empty program.
 */
#define WRITTEN 64

struct written {
	u64 word[WRITTEN / 8];
};
BPF_ARRAY(frame_written, struct written, 1);
BPF_PROG_ARRAY(xdp_alone, 1);
BPF_PROG_ARRAY(tc_alone, 1);

static __always_inline bool frame_rewrite(void *data, void *end)
{
	int zero = 0;
	struct written *written = frame_written.lookup(&zero);

	if (!written || data + sizeof(*written) > end)
		return false;
	__builtin_memcpy(data, written, sizeof(*written));
	return true;
}

int alone_xdp(struct xdp_md *ctx)
{
	if (frame_rewrite((void *)(long)ctx->data, (void *)(long)ctx->data_end))
		xdp_alone.call(ctx, 0);
	return XDP_ABORTED;
}

int alone_tc(struct __sk_buff *skb)
{
	if (frame_rewrite((void *)(long)skb->data, (void *)(long)skb->data_end))
		tc_alone.call(skb, 0);
	return -2; /* nothing that a program answers */
}

int empty_xdp(struct xdp_md *ctx)
{
	return XDP_PASS;
}

int empty_tc(struct __sk_buff *skb)
{
	return 0;
}

/* ---- gateways that need no kernel ---- */

/* Counts, so that a loss before the gateway shows, and drops: the base that every other cost is measured from. */
static __always_inline int drop(enum direction direction)
{
	u32 key = direction;
	struct tally *tally = tallies.lookup(&key);

	if (tally)
		tally->seen++;
	return XDP_DROP;
}

int drop_out(struct xdp_md *ctx)
{
	return drop(OUT);
}

int drop_in(struct xdp_md *ctx)
{
	return drop(IN);
}

static __always_inline int redirect(struct xdp_md *ctx, enum direction direction)
{
	u32 key = direction;
	struct mac_pair *macs = gate_macs.lookup(&key);
	struct frame f;

	if (!macs || !frame_at(ctx, &f))
		return XDP_ABORTED;
	__builtin_memcpy(f.eth->dst, macs->dst, sizeof(f.eth->dst));
	__builtin_memcpy(f.eth->src, macs->src, sizeof(f.eth->src));
	return gate_outlets.redirect_map(direction, 0);
}

int redirect_out(struct xdp_md *ctx)
{
	return redirect(ctx, OUT);
}

int redirect_in(struct xdp_md *ctx)
{
	return redirect(ctx, IN);
}
