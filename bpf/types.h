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

typedef struct {
	__be32 word[ADDR_WORDS];
} addr_t;

/* Protocols that share a space of ports. An ICMP query's identifier is its port (RFC 5508). */
enum proto_class { CLASS_TCP, CLASS_UDP, CLASS_ICMP, CLASSES, CLASS_NONE = CLASSES };

/* A slot is a place in `sessions`. The first session of a mapping lives in the slot of its external
 * endpoint; further sessions of the same mapping live behind all of those.
 */
#define PORTS 65536
#define FURTHER_BASE (EXTERNALS * CLASSES * PORTS)
#define SLOTS (FURTHER_BASE + FURTHER)
#define NO_SLOT (~0U)
#define NO_EXTERNAL (~0U)

/* One direction of a session as seen on the wire. 56 bytes: with 8 more in struct session it fills
 * one cache line, the only one an accelerated packet touches.
 */
struct flow {
	addr_t remote_addr;
	addr_t new_addr; /* outbound: the external source; inbound: the internal destination */
	__be16 remote_port;
	__be16 new_port;
	u16 l3_delta; /* one's-complement sum of new minus old, address only */
	u16 l4_delta; /* address and port */
	u16 next_hop[3]; /* MAC */
	u16 egress; /* interface index; XDP serves indices below INTERFACES */
	u32 armed_at; /* jiffies at which the slow path last confirmed this flow for XDP */
	u32 last_seen; /* jiffies */
	__be32 last_ack; /* TCP: the last acknowledgement this side sent */
	u16 longest; /* IP length that the kernel has let pass since the flow was armed */
	u8 tcp_seen; /* TCP_* flags this side has sent */
	u8 pad;
	u64 packets;
	u64 bytes; /* IP lengths */
};

/* `life` changes by compare-and-swap only. In the slot of an external endpoint it is the life of the
 * mapping; LIFE_SESSION says that the slot's own session is in use; LIFE_FURTHER counts the further sessions.
 */
#define LIFE_LIVE 1ULL
#define LIFE_RESTING 2ULL /* closed at out.last_seen; the agent frees the slot after the rest (RFC 6888 REQ-8) */
#define LIFE_STATE 3ULL
#define LIFE_SESSION 4ULL
#define LIFE_FURTHER (1ULL << 8)
#define LIFE_FURTHER_MASK (0xffffffULL << 8)
#define LIFE_CHANGE (1ULL << 32) /* grows with every reopening, so that no swap succeeds on an old reading */

struct session {
	struct flow out;
	u64 life;
	struct flow in;
	u32 opened_at; /* jiffies */
	u32 mapping; /* slot of the mapping: this one, or another for a further session */
};

struct mapping_key { /* internal endpoint */
	addr_t addr;
	__be16 port;
	u8 class;
	u8 pad;
};

struct remote_key { /* which further session of a mapping */
	u32 mapping;
	addr_t addr;
	__be16 port;
	u16 pad;
};

struct fragment_key {
	addr_t src, dst;
	u32 id;
	u32 proto;
};

struct fragment {
	addr_t new_addr;
	u32 seen_at; /* jiffies */
};

struct prefix_key {
	u32 bits;
	addr_t addr;
};

enum prefix_role { PREFIX_FOREIGN, PREFIX_OWN, PREFIX_INTERNAL, PREFIX_PRIVATE };

#define INTERFACES 65536
enum interface_role { ROLE_NONE, ROLE_LAN, ROLE_WAN };

#define XDP_FROM 1 /* our XDP program is on it: flows entering here can be armed */
#define XDP_TO 2 /* XDP can redirect to it */

struct interface {
	u16 mac[3];
	u8 role;
	u8 xdp; /* XDP_FROM, XDP_TO */
	u32 mtu;
};

struct pool { /* two ranges of ports: below and above the gateway's own ephemeral ports */
	u32 first[2];
	u32 count[2];
};

struct settings { /* times in jiffies */
	addr_t external[EXTERNALS]; /* zero: none */
	struct pool pool[CLASSES];
	u32 tcp_established;
	u32 tcp_transitory;
	u32 udp;
	u32 icmp;
	u32 fragment;
	u32 rearm; /* an armed flow shows itself to the slow path this often */
	u32 disarmed_at; /* flows armed before this are not */
	u8 accelerate; /* XDP programs are attached */
	u8 inbound_refresh; /* RFC 4787 REQ-6 */
	u16 pad;
};

struct manifest { /* JSON, zero-terminated: what the agent must know after a restart; no packet reads it */
	u8 text[65536];
};

enum side { SOURCE, DESTINATION };

struct packet {
	struct __sk_buff *skb;
	u32 now; /* jiffies */
	u32 l3; /* offsets from the start of the packet */
	u32 l4;
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
	u32 fragment_id;
};
