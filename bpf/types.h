/* Keys and values of the maps, and the struct that carries a packet through the slow path. Layouts live
 * here only: Python derives its own from what bcc read. Addresses are addr_t, so that the same source
 * compiled with -DIP_VERSION=6 becomes the IPv6 instance.
 */
#include <uapi/linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>

#ifndef IP_VERSION
#define IP_VERSION 4
#endif
#define ADDR_WORDS (IP_VERSION == 4 ? 1 : 4)
#define ADDR_BITS (IP_VERSION == 4 ? 32 : 128)
#define ADDR_FAMILY (IP_VERSION == 4 ? 2 : 10) /* AF_INET, AF_INET6 */

typedef struct {
	__be32 word[ADDR_WORDS];
} addr_t;

/* Protocols that share a space of ports. An ICMP query's identifier is its port (RFC 5508). */
enum proto_class { CLASS_TCP, CLASS_UDP, CLASS_ICMP, CLASSES, CLASS_NONE = CLASSES };

#define CLASS_ROOM 4 /* of arrays indexed by class & CLASS_MASK: a comparison would be one way more for the verifier */
#define CLASS_MASK (CLASS_ROOM - 1)

/* A slot is a place in `sessions`. The first session of a mapping lives in the slot of its external
 * endpoint; further sessions of the same mapping live behind all of those, from settings.further_base on.
 */
#define PORTS 65536
#define NO_SLOT (~0U)
#define NO_EXTERNAL (~0U)
#define EXTERNAL_ROOM 64 /* of an array indexed by external & EXTERNAL_MASK: a comparison would be one way more */
#define EXTERNAL_MASK (EXTERNAL_ROOM - 1)

/* WANs, external addresses and mappings are numbered; the first WANS addresses are one of each WAN. */
#ifndef WANS
#define WANS 1
#endif
#define NO_WAN 0xff

/* One direction of a session as seen on the wire. */
struct flow {
	addr_t remote_addr;
	addr_t new_addr; /* outbound: the external source; inbound: the internal destination */
	__be16 remote_port;
	__be16 new_port;
	u16 next_hop[3]; /* MAC */
	u16 egress; /* interface index; XDP serves indices below INTERFACES */
	u32 armed_at; /* jiffies at which the slow path last confirmed this flow for XDP */
	u32 last_seen; /* jiffies */
	__be32 last_ack; /* TCP: the last acknowledgement this side sent */
	u16 longest; /* IP length that the kernel has let pass since the flow was armed */
	u8 tcp_seen; /* TCP_* flags this side has sent */
	u8 marks; /* SESSION_*, in the outbound flow */
};

struct traffic {
	u64 packets;
	u64 bytes; /* IP lengths */
};

#define SESSION_INDEXED 1 /* the index has entries for its flows */
#define SESSION_COUNTED 2 /* among its internal host's sessions */
#define SESSION_KEPT (SESSION_INDEXED | SESSION_COUNTED) /* where it starts anew in place */
#define SESSION_FROM_OUTSIDE 4 /* the remote opened it */
#define SESSION_TRIGGERS 8 /* keeps a trigger's ports open to its host */
#define SESSION_ALG 16 /* its texts are the agent's to read, see alg.h */

/* `life` changes by compare-and-swap only. In the slot of an external endpoint it is the life of the
 * mapping; LIFE_SESSION says that the slot's own session is in use; LIFE_FURTHER counts the further sessions.
 */
#define LIFE_LIVE 1ULL
#define LIFE_RESTING 2ULL /* closed at out.last_seen; the agent frees the slot after the rest (RFC 6888 REQ-8) */
#define LIFE_OPENING 3ULL /* the session in it is being exchanged; becomes LIFE_LIVE by the loss of one bit */
#define LIFE_STATE 3ULL
#define LIFE_SESSION 4ULL
#define LIFE_STATIC 8ULL /* a forwarded port: live with and without sessions */
#define LIFE_COUNTED 16ULL /* among its internal host's mappings */
#define LIFE_FURTHER (1ULL << 8)
#define LIFE_FURTHER_MASK (0xffffffULL << 8)
#define LIFE_CHANGE (1ULL << 32) /* grows with every reopening, so that no swap succeeds on an old reading */

struct mapping_key { /* internal endpoint */
	addr_t addr;
	__be16 port;
	u8 class;
	u8 wan; /* see struct interface */
};

/* Two halves of one cache line each; an accelerated packet touches its own only. */
struct session {
	struct flow out;
	u32 opened_at; /* jiffies */
	struct mapping_key internal;
	struct traffic sent;
	struct flow in;
	u32 mapping; /* slot of the mapping: this one, or another for a further session */
	u64 life;
	struct traffic received;
};

/* One cache line of the index. */
#define BUCKET_ENTRIES 15
#define GROUP_BITS 12 /* of the hash: counters of 32 kB, which stay warm */

/* Where mappings are looked up first: entries of a hash of the internal endpoint and the slot; see index.h. */
#define FRONT_ENTRIES 8

struct front {
	u64 entry[FRONT_ENTRIES];
};

struct bucket {
	u32 entry[BUCKET_ENTRIES];
	u32 was_full; /* an entry that belongs here may stand in `overflow` */
};

enum direction { OUTBOUND, INBOUND };

/* The wire 5-tuple of a flow, by which it is looked for. Outbound ones start at an internal endpoint, inbound ones end at
 * an external one, which is the slot of a mapping; the other of the two is zero.
 */
struct flow_key {
	struct mapping_key internal;
	u32 mapping;
	addr_t remote;
	__be16 remote_port;
	u16 direction;
};

/* A forward (static mapping) is a rule; `forwards` finds the most specific one for a port and a remote. The default
 * host's is that of all ports.
 */
#define FORWARDS 1024
#define TARGETS 8

struct forward_key {
	u32 bits; /* FORWARD_KEY_BITS of external, class, port and remote_addr */
	u8 external;
	u8 class;
	__be16 port;
	addr_t remote_addr;
};

#define FORWARD_PORT_AT 16 /* bits before the port */
#define FORWARD_REMOTE_AT 32 /* bits before the remote address */

struct target {
	addr_t addr;
	u16 port; /* host order; stands for the rule's first port */
	u16 until; /* weights added up to here */
};

struct forward {
	struct target target[TARGETS];
	addr_t source; /* remote prefix it is for */
	u8 source_bits;
	u8 class;
	u8 targets; /* 0: no rule here */
	u8 flags; /* FORWARD_* */
	u16 first, last; /* external ports, host order */
	u32 expires; /* jiffies; with FORWARD_EXPIRES, and of a triggered rule */
	u32 lasts; /* jiffies that its trigger opens it for */
	u16 trigger_first, trigger_last; /* remote ports, host order */
	u32 trigger_class;
	u64 opened; /* sessions */
};

/* Of a rule that an internal host has asked for (RFC 6887): what its server must know after a restart. By index of the
 * rule; no packet reads it.
 */
struct lease {
	u8 nonce[12]; /* who may renew and end it */
	u32 external; /* the only one that it is on */
};

#define EMBRYOS 4096 /* sessions from outside that may wait for their answer at once */

#define FORWARD_DEFAULT 1 /* the default host: ports without a rule, a mapping or a socket */
#define FORWARD_TO_GATEWAY 2 /* a redirect: the target's port is the gateway's own, its address unset */
#define FORWARD_TRIGGERED 4 /* there while open to the host in target[0] */
#define FORWARD_FROM_INSIDE 8 /* a redirect of what a LAN sends */
#define FORWARD_EXPIRES 16 /* absent once it is over; the agent takes it out */
#define FORWARD_LEASED 32 /* there is a lease */

/* Rules about what comes from inside have these in place of an external address's index. */
#define FORWARD_ON_LAN 255 /* redirects; the "remote" address is the internal one */
#define FORWARD_TRIGGER 253 /* plus the class of the ports to be opened */

#define REDIRECTED 65536 /* connections at once */

/* A redirected connection from a LAN, as its client knows it. */
struct redirected_key {
	addr_t client, server;
	__be16 client_port, server_port;
	u32 class;
};

struct redirected { /* as the gateway's socket knows it */
	addr_t local;
	__be16 local_port;
	__be16 client_port; /* 0: being opened */
	u32 last_seen; /* jiffies */
	u8 tcp_seen[2]; /* TCP_* flags, of the client and of the gateway */
	u16 rule;
	u64 packets, bytes; /* of the client */
};

/* Destinations that a redirect leaves alone; the gateway's own addresses, that all do. */
struct spared_key {
	u32 bits; /* of rule and addr */
	u32 rule; /* FORWARDS: all */
	addr_t addr;
};

#ifndef PORT_BLOCKS
#define PORT_BLOCKS 0 /* ports are given out in blocks */
#endif
#define BLOCKS 256 /* room for port blocks on one external address: the smallest have 256 ports */
#define HOST_BLOCKS 8 /* of one host at most; a power of two */

enum block_state { BLOCK_FREE, BLOCK_MOVING, BLOCK_TAKEN, BLOCK_IDLE, BLOCK_OUTSIDE };

struct block {
	u64 state; /* changes by compare-and-swap only; BLOCK_OUTSIDE: not whole in the pool, or ports in it are others' */
	addr_t owner;
	u32 taken_at; /* jiffies */
};

struct tenant { /* an internal host's blocks: number and one, 0: none */
	u64 block[HOST_BLOCKS];
};

/* What one internal host has open (RFC 6888 REQ-4). Counts change atomically, hence 64 bits. */
struct host {
	u64 sessions;
	u64 mappings[CLASS_ROOM];
	u64 refused;
	u32 tokens; /* new sessions it may open at once, as of refilled_at */
	u32 refilled_at; /* jiffies */
};

struct fragment_key {
	addr_t src, dst;
	u32 id;
	u32 proto;
};

#define FRAGMENT_SPANS 16

struct span {
	u16 from, to; /* bytes of the datagram's payload */
};

/* What the first fragment found out, for the later ones to follow; and what has come, for none to overwrite. */
struct fragment {
	addr_t new_addr[2]; /* by enum side; unset: stays */
	u32 seen_at; /* jiffies */
	u16 spans;
	u16 covered; /* bytes that have come */
	u16 total; /* bytes in all, once the last fragment has come */
	u8 bad; /* fragments overlapped: the rest is dropped */
	u8 wan; /* by which it left */
	__be16 new_id; /* identification that it leaves with; 0: stays */
	u16 pad;
	struct span span[FRAGMENT_SPANS];
};

/* The punt port: a TAP read by the agent. A frame's destination MAC says why and where; behind this header comes the
 * packet as the hook saw it, with an Ethernet header of zeros where it had none.
 */
enum punt_reason {
	PUNT_FRAGMENT_IN, /* before its first; to be put back on the ingress hook of the interface */
	PUNT_FRAGMENT_OUT, /* the same at the egress hook */
	PUNT_REFUSED, /* no session possible: the sender is to be told (RFC 5508 REQ-8) */
	PUNT_TTL, /* its time ended in a hairpin */
	PUNT_TOO_BIG, /* for the WAN that it belongs to: in pieces to be put back, or the sender is to be told */
	PUNT_ALG_IN, /* of an ALG's control session: to be read, and put back on the ingress hook of the interface */
	PUNT_ALG_OUT, /* the same at the egress hook */
	PUNT_REASONS,
};

struct punt_header {
	u8 local; /* 0x02: a locally administered address */
	u8 reason;
	__be16 ifindex[2]; /* upper and lower half */
	__be16 about[2]; /* upper and lower half: the MTU of PUNT_TOO_BIG, the mapping's slot of PUNT_ALG_* */
	u16 pad;
	__be16 proto;
};

struct budget {
	u32 window; /* jiffies at its start */
	u32 used;
};

/* Protocols without ports: one internal host for each remote (address-only mapping); SCTP keeps its ports. */
struct binding_key {
	addr_t remote_addr;
	__be16 remote_port;
	__be16 port;
	u8 proto;
	u8 external;
	u16 pad;
};

struct binding {
	addr_t internal;
	u32 last_seen; /* jiffies */
	u64 out_packets, out_bytes, in_packets, in_bytes;
};

/* A server's port that has an ALG, for the internal hosts of a prefix. */
struct alg_key {
	u32 bits; /* ALG_ANY and those of the address */
	u16 class;
	__be16 port;
	addr_t addr;
};

struct alg {
	char name[16]; /* for the agent */
	u32 passing; /* it was put there by a session, as another of its sessions is to come, and ends */
	u32 expires; /* jiffies */
};

struct control_key { /* of an ALG's control session */
	u32 mapping; /* its slot */
	addr_t remote;
	__be16 remote_port;
	u16 pad;
};

/* By how much sequence numbers of one direction differ for the other side: from the end of an edit on, in the sender's own,
 * by `by`; before the oldest that is known by `before`. The agent writes them, oldest first.
 */
#define SHIFTS 8

struct shifts {
	u32 count;
	u32 before;
	struct {
		u32 start; /* of what was edited */
		u32 end;
		u32 by;
	} shift[SHIFTS];
};

struct control {
	struct mapping_key internal;
	u32 opened_at; /* jiffies */
	u32 from_outside;
	u32 mark; /* of its packets on their way out, while the skb's own says where they are in theirs */
	u32 over; /* its ALG will read no more */
	u32 acked[2]; /* by enum direction, of what went that way: as its receiver has acknowledged; 0: not known */
	struct shifts shifts[2]; /* by enum direction */
};

/* A pinhole: some remote may come to a mapping for a while (RFC 2663 section 2.9 calls the sessions bundled). */
struct pinhole_key {
	u32 mapping; /* its slot */
	addr_t remote; /* unset: anybody */
};

struct pinhole {
	u64 left; /* sessions that it still serves, where it is counted */
	u32 counted;
	u32 expires; /* jiffies */
	addr_t internal;
	__be16 internal_port;
	__be16 remote_port; /* 0: any */
	struct control_key control; /* who has asked for it */
	u32 owned; /* the mapping's slot was made static for it */
};

/* PPTP's calls (RFC 2637): what GRE has in place of ports is the receiver's number of the call. */
struct call_key {
	addr_t remote;
	__be16 call; /* as the remote knows it */
	u16 external;
};

struct call {
	addr_t internal;
	__be16 call; /* as the internal host knows it */
	u16 pad;
	u32 last_seen; /* jiffies */
};

struct caller_key { /* an internal host that has calls with this remote: anybody else has one tunnel, see portless.h */
	addr_t remote, internal;
};

struct contact_key { /* address-dependent filtering: has this mapping sent to this remote address? */
	u32 mapping;
	addr_t remote_addr;
};

struct contact {
	struct mapping_key internal; /* whose mapping it was: slots are used again */
	u32 seen_at; /* jiffies */
};


struct prefix_key {
	u32 bits;
	addr_t addr;
};

/* Which external addresses of a WAN the hosts of an internal prefix may have; each host keeps one of them (RFC 4787
 * REQ-2).
 */
#define CHOICE_MAX 64

struct choice_key {
	u32 bits; /* CHOICE_ADDR_AT and those of the address */
	u32 wan;
	addr_t addr;
};

#define CHOICE_ADDR_AT 32 /* bits before the address */

struct choice {
	u32 count;
	u8 external[CHOICE_MAX];
};

/* Basic NAT (RFC 2663 section 4.1.1) of a prefix to another of its length, one to one, whatever the protocol. */
struct counterpart {
	addr_t network; /* the other prefix */
	addr_t mask;
	u32 wan; /* the external one's */
};

/* A destination that is not translated for: everything there, or some ports. */
#define EXEMPT_PORTS 4

struct exempt {
	u8 count; /* 0: everything */
	u8 pad[3];
	struct {
		u8 proto;
		u8 pad;
		u16 first, last; /* host order */
	} ports[EXEMPT_PORTS];
};

enum prefix_role { PREFIX_FOREIGN, PREFIX_OWN, PREFIX_INTERNAL, PREFIX_PRIVATE };

#define INTERFACES 65536
#define LOOPBACK 1 /* its index in every namespace */

enum interface_role { ROLE_NONE, ROLE_LAN, ROLE_WAN, ROLE_OTHER }; /* NONE: the agent does not know it */

#define XDP_FROM 1 /* our XDP program is on it: flows entering here can be armed */
#define XDP_TO 2 /* XDP can redirect to it */

#define TAGS 2 /* VLAN tags that a frame may have: a VLAN's own, and of QinQ another before it */

struct tag { /* as on the wire */
	__be16 tpid;
	__be16 tci; /* here without priority: the VLAN's id */
};

/* Of a VLAN the row is that of the VLAN device; its frames pass XDP on the device below, with their tags. */
struct interface {
	u16 mac[3];
	u8 role;
	u8 xdp; /* XDP_FROM, XDP_TO */
	u32 mtu; /* longest IP packet that XDP may redirect to it */
	u16 mss; /* TCP segments of new connections are clamped to this; 0: never */
	u8 wan; /* number of the WAN, which has mappings of its own */
	u8 tags; /* how many it has */
	struct tag tag[TAGS]; /* the outermost first */
	addr_t network, mask; /* of a LAN, one that it has; unset: none */
	addr_t redirect_to; /* of a LAN whose egress restores redirected connections: where they go */
};

struct vlan_key { /* which VLAN device a frame belongs to */
	u32 device; /* index of the device below */
	struct tag outer, inner;
};

struct pool { /* two ranges of ports: below and above the gateway's own ephemeral ports */
	u32 first[2];
	u32 count[2];
};

enum filtering { FILTER_ADDRESS_AND_PORT, FILTER_ADDRESS, FILTER_NONE }; /* RFC 4787 section 5, by its dependence */

#define SEEDS (2 * ADDR_WORDS + 4) /* for each word of a 5-tuple one, and one more */

struct settings { /* times in jiffies */
	u64 seed[SEEDS]; /* of the index; as long as its entries */
	u32 externals; /* how many there is room for */
	u32 further_base; /* the first slot for further sessions */
	u32 further; /* how many */
	u32 buckets;
	u32 fronts;
	addr_t external[EXTERNAL_ROOM]; /* zero: none */
	u8 external_wan[EXTERNAL_ROOM]; /* the WAN that each belongs to */
	u32 exit[WANS]; /* interface index of each WAN; 0: not there */
	struct pool pool[2 * CLASS_ROOM]; /* by class; upper half: for internal ports below 1024 (RFC 4787 REQ-3a), if any */
	u32 tcp_established;
	u32 tcp_transitory;
	u32 udp;
	u32 icmp;
	u32 fragment;
	u32 rearm; /* an armed flow shows itself to the slow path this often */
	u32 disarmed_at; /* flows armed before this are not */
	u8 accelerate; /* XDP programs are attached */
	u8 inbound_refresh; /* RFC 4787 REQ-6 */
	u8 filtering[CLASS_ROOM];
	u8 preserve; /* an internal port is kept where it is free */
	u8 parity; /* even to even, odd to odd (RFC 4787 REQ-4) */
	u8 overload; /* a used-up pool shares its ports among hosts, for different remotes */
	u8 block_bits; /* a port block has 2 to the power of so many ports; 0: no blocks */
	u8 host_blocks; /* that one host may have */
	u8 drop_other; /* protocols without ports that are not known */
	u8 basic; /* there are counterparts */
	u8 last; /* programs take over from each other: what passes one of ours meets no other on its hook */
	u32 hz; /* jiffies a second */
	u32 host_sessions; /* limits for each internal host */
	u32 host_mappings; /* per protocol */
	u32 host_rate; /* new sessions a second */
	u32 host_burst;
	u32 wan; /* interface index: hairpinned packets are turned round there, whichever WAN's address they go to */
	u32 punt; /* the punt port's; 0: none */
	u32 heartbeat; /* jiffies at the agent's last tick */
};

struct manifest { /* JSON, zero-terminated: what the agent must know after a restart; no packet reads it */
	u8 text[65536];
};

struct ends { /* of a session to be opened */
	addr_t internal, remote;
	__be16 internal_port, remote_port;
	u8 marks; /* SESSION_* */
	u8 is_mapped; /* the mapping that it is opened on is known to be that of the internal endpoint */
	u8 pad[2];
};

enum side { SOURCE, DESTINATION };

struct packet {
	struct __sk_buff *skb;
	u32 now; /* jiffies */
	u32 l3; /* offsets from the start of the packet */
	u32 l4;
	u32 payload; /* where TCP's options end */
	u32 l4_len; /* bytes of this packet from l4 on, by the IP header's word */
	addr_t src, dst;
	__be16 src_port, dst_port; /* of ICMP queries: identifier on the asker's side, 0 on the other */
	u8 proto;
	u8 class;
	u8 icmp_type;
	u8 tcp_flags;
	__be32 seq, ack;
	u16 fragment_offset; /* bytes */
	bool more_fragments;
	bool options;
	bool hairpin; /* one of two translations in one place */
	bool own; /* from one of the gateway's external addresses */
	u8 alg; /* ALG_* */
	u8 wan; /* whose mappings it is a matter of */
	u8 ttl;
	__be16 fragment_id;
};

struct flow_keys { /* of both flows of a session */
	struct flow_key out, in;
};

/* What has happened to a session; see events.h. */
enum event_kind { EVENT_VOID, EVENT_OPENED, EVENT_CLOSED, EVENT_REFUSED };
enum close_reason { CLOSE_EXPIRED, CLOSE_FORCED, CLOSE_EVICTED }; /* any but the first ends it before its time */

#define EVENTS 16384 /* that are kept; a power of two */

struct event {
	u64 number; /* from 1; written last */
	addr_t remote, external; /* down to the ports as in struct flow */
	__be16 remote_port, external_port;
	u32 opened_at; /* down to the traffic as in struct session */
	struct mapping_key internal;
	struct traffic sent;
	struct traffic received;
	u32 at; /* jiffies */
	u32 reason; /* enum close_reason, or of what was refused enum counter */
	u8 kind; /* enum event_kind */
	u8 tcp_seen[2]; /* by enum direction */
	u8 marks; /* SESSION_* */
	u32 pad;
};

struct watch {
	u64 next; /* number of the next event, from 0 */
	u32 until; /* jiffies until when somebody watches */
	u32 pad;
};

/* What becomes of a packet at a hook; see trace.h. */
enum trace_hook { TRACE_LAN_IN, TRACE_WAN_OUT, TRACE_WAN_IN, TRACE_LAN_OUT, TRACE_LO_OUT };

#define TRACES 4096 /* packets that are kept; a power of two */
#define TRACE_WORDS 2 /* 64 counters each; a power of two */

struct ip_header {
	u8 version_ihl;
	u8 tos;
	__be16 tot_len;
	__be16 id;
	__be16 frag_off;
	u8 ttl;
	u8 proto;
	u16 check;
	addr_t src, dst;
};

struct look { /* at a packet */
	struct ip_header ip;
	u8 l4[36]; /* the transport header; of an ICMP error with the quoted addresses and ports */
};

struct traced {
	u64 number; /* from 1; written last */
	u64 counted[TRACE_WORDS]; /* counters that grew, by bit: enum counter */
	struct look before, after;
	u32 at; /* jiffies */
	u32 ifindex;
	u32 mark;
	u16 hook; /* enum trace_hook */
	u16 verdict; /* enum verdict */
};

struct tracing {
	u64 next; /* number of the next packet, from 0 */
	addr_t internal; /* the host */
	u32 until; /* jiffies until when somebody reads; 0: nobody */
};

struct sight { /* of the packet that a CPU is at work on */
	struct look before, after;
	u64 counts[64 * TRACE_WORDS];
	u32 l3;
	u32 len;
	u32 is_open;
	u32 pad;
};

/* A session's end takes effect with a swap of its slot's life, after which the slot may be another's at once; so what is
 * to be tidied up is noted before.
 */
struct ending {
	struct flow_keys flows;
	struct mapping_key owner; /* of the port */
	u32 mapping;
	addr_t internal;
	u8 marks;
};

#define OPTIONS_SPAN 64 /* a power of two above the longest options of IP and TCP, 40 bytes */

/* What the stack of 512 bytes has no room for. */
struct scratch {
	u8 options[OPTIONS_SPAN + 8];
	struct packet blurred; /* see packet_blur() */
	struct fragment fragment;
	struct ending ending;
	struct ends ends;
	struct flow_keys joining;
	struct tenant newcomer; /* has none */
	struct pool pool; /* the port block that a mapping's port is chosen from */
	addr_t elsewhere; /* the external address as which the packet leaves by another WAN */
	struct alg_key alg_key;
	struct pinhole_key pinhole_key;
	struct control_key control_key;
	struct control control;
	u32 refused; /* why the packet's session was, by enum counter; 0: it was not */
};
