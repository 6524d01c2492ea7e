/* From an skb to struct packet: every header read once, by its true length, before anything is changed.
 * Bytes are copied out with bpf_skb_load_bytes, which also reaches the paged part of an skb.
 */
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

struct port_header { /* TCP and UDP agree on these */
	__be16 src, dst;
};

struct tcp_header {
	struct port_header port;
	__be32 seq, ack;
	u8 data_offset; /* upper four bits, in words */
	u8 flags;
	__be16 window;
	u16 check;
	__be16 urgent;
};

struct udp_header {
	struct port_header port;
	__be16 len;
	u16 check;
};

struct icmp_header {
	u8 type, code;
	u16 check;
	__be16 id, seq;
};

#define IP_MORE_FRAGMENTS 0x2000
#define IP_OFFSET_UNITS 0x1fff

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define ICMP_ECHO_REPLY 0
#define ICMP_UNREACHABLE 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER 12

static __always_inline u32 class_of(u8 proto)
{
	return proto == IPPROTO_TCP  ? CLASS_TCP :
	       proto == IPPROTO_UDP  ? CLASS_UDP :
	       proto == IPPROTO_ICMP ? CLASS_ICMP :
				       CLASS_NONE;
}

static __always_inline bool icmp_is_error(u8 type)
{
	return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER;
}

static __always_inline bool packet_is_icmp_error(const struct packet *p)
{
	return p->proto == IPPROTO_ICMP && icmp_is_error(p->icmp_type);
}

static __always_inline bool packet_is_later_fragment(const struct packet *p)
{
	return p->fragment_offset > 0;
}

/* RFC 1858: a first fragment too short for its transport header hides it from every check. */
static __always_inline enum verdict too_short(const struct packet *p)
{
	return drop(p->more_fragments ? COUNT_drop_fragment_tiny : COUNT_drop_malformed);
}

static __always_inline enum verdict parse_tcp(struct packet *p)
{
	struct tcp_header tcp;
	u32 header;

	if (p->l4_len < sizeof(tcp) || bpf_skb_load_bytes(p->skb, p->l4, &tcp, sizeof(tcp)))
		return too_short(p);
	header = (tcp.data_offset >> 4) * 4;
	if (header < sizeof(tcp) || header > p->l4_len)
		return too_short(p);
	p->src_port = tcp.port.src;
	p->dst_port = tcp.port.dst;
	p->seq = tcp.seq;
	p->ack = tcp.ack;
	p->tcp_flags = tcp.flags;
	return CONTINUE;
}

static __always_inline enum verdict parse_udp(struct packet *p)
{
	struct udp_header udp;

	if (p->l4_len < sizeof(udp) || bpf_skb_load_bytes(p->skb, p->l4, &udp, sizeof(udp)))
		return too_short(p);
	p->src_port = udp.port.src;
	p->dst_port = udp.port.dst;
	return CONTINUE;
}

static __always_inline enum verdict parse_icmp(struct packet *p)
{
	struct icmp_header icmp;

	if (p->l4_len < sizeof(icmp) || bpf_skb_load_bytes(p->skb, p->l4, &icmp, sizeof(icmp)))
		return too_short(p);
	p->icmp_type = icmp.type;
	if (icmp.type == ICMP_ECHO)
		p->src_port = icmp.id;
	else if (icmp.type == ICMP_ECHO_REPLY)
		p->dst_port = icmp.id;
	else
		p->class = CLASS_NONE;
	return CONTINUE;
}

static __always_inline enum verdict parse(struct packet *p)
{
	struct __sk_buff *skb = p->skb;
	struct ip_header ip;
	u32 header, total;

	/* A tag that the device took off belongs to a VLAN interface, not to this one. */
	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return pass(COUNT_own_not_ip);
	if (bpf_skb_load_bytes(skb, p->l3, &ip, sizeof(ip)))
		return drop(COUNT_drop_malformed);
	header = (ip.version_ihl & 0xf) * 4;
	total = bpf_ntohs(ip.tot_len);
	if (!total && skb->gso_segs > 1) /* a super-packet beyond 64 kB (BIG TCP) */
		total = skb->len - p->l3;
	if (ip.version_ihl >> 4 != 4 || header < sizeof(ip) || total < header || p->l3 + total > skb->len)
		return drop(COUNT_drop_malformed);

	p->l4 = p->l3 + header;
	p->l4_len = total - header;
	p->options = header > sizeof(ip);
	p->src = ip.src;
	p->dst = ip.dst;
	p->proto = ip.proto;
	p->class = class_of(ip.proto);
	p->fragment_id = ip.id;
	p->fragment_offset = (bpf_ntohs(ip.frag_off) & IP_OFFSET_UNITS) * 8;
	p->more_fragments = ip.frag_off & bpf_htons(IP_MORE_FRAGMENTS);
	if (packet_is_later_fragment(p))
		return CONTINUE;
	switch (p->class) {
	case CLASS_TCP:
		return parse_tcp(p);
	case CLASS_UDP:
		return parse_udp(p);
	case CLASS_ICMP:
		return parse_icmp(p);
	}
	return CONTINUE;
}
