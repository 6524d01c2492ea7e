/* XDP on LAN and WAN: repeats, for armed flows, what the slow path has decided. It holds no policy. Whatever it
 * does not recognise goes up unmodified; all checks come before the first write.
 */
struct fast {
	struct ethernet_header *eth;
	struct ip_header *ip;
	struct port_header *ports;
	u16 *check; /* of the transport */
	__be32 ack;
	bool tcp_acks;
	u8 class;
	u32 total; /* IP length, bytes */
};

/* Fills @f from a plain IPv4 packet to this interface's own MAC; CONTINUE when it may fly. */
static __always_inline enum verdict fast_parse(struct xdp_md *ctx, struct fast *f)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethernet_header *eth = data;
	struct ip_header *ip = data + sizeof(*eth);
	struct udp_header *udp = (void *)(ip + 1);
	struct tcp_header *tcp = (void *)(ip + 1);
	struct interface *here = interface_at(ctx->ingress_ifindex);
	u32 header;

	/* The shortest packet that flies is a UDP header without payload. */
	if ((void *)(udp + 1) > end || eth->proto != bpf_htons(ETH_P_IP))
		return pass(COUNT_up_not_ip);
	if (!here || here->mac[0] != eth->dst[0] || here->mac[1] != eth->dst[1] || here->mac[2] != eth->dst[2])
		return pass(COUNT_up_not_for_us);
	f->total = bpf_ntohs(ip->tot_len);
	if (ip->version_ihl != 0x45 || ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_OFFSET_UNITS) ||
	    (void *)ip + f->total > end || f->total < sizeof(*ip) + sizeof(*udp))
		return pass(COUNT_up_unusual_ip);
	if (ip->ttl <= 1)
		return pass(COUNT_up_ttl);
	f->eth = eth;
	f->ip = ip;
	f->class = class_of(ip->proto);
	if (f->class == CLASS_UDP) {
		f->ports = &udp->port;
		f->check = &udp->check;
		return CONTINUE;
	}
	if (f->class != CLASS_TCP || (void *)(tcp + 1) > end)
		return pass(COUNT_up_protocol);
	header = (tcp->data_offset >> 4) * 4;
	if (header < sizeof(*tcp) || sizeof(*ip) + header > f->total)
		return pass(COUNT_up_protocol);
	if (tcp->flags & (TCP_SYN | TCP_FIN | TCP_RST) || !(tcp->flags & TCP_ACK))
		return pass(COUNT_up_tcp_flags);
	f->ports = &tcp->port;
	f->check = &tcp->check;
	f->ack = tcp->ack;
	f->tcp_acks = true;
	return CONTINUE;
}

/* The half of the session that this packet belongs to, or NULL. */
static __always_inline struct flow *fast_flow(const struct settings *cfg, const struct fast *f,
					      enum direction direction)
{
	struct session *s;
	u32 slot;

	if (direction == OUTBOUND) {
		slot = slot_of_internal(f->ip->src, f->class, f->ports->src);
		s = session_find_outbound(slot, f->ip->src, f->ports->src, f->ip->dst, f->ports->dst, f->class);
	} else {
		slot = slot_of_external(cfg, f->ip->dst, f->class, f->ports->dst);
		s = session_find(slot, f->ip->src, f->ports->src, INBOUND);
	}
	return s ? session_flow(s, direction) : NULL;
}

static __always_inline void fast_rewrite(struct fast *f, const struct flow *flow, const struct interface *egress,
					 enum direction direction)
{
	if (direction == OUTBOUND) {
		f->ip->src = flow->new_addr;
		f->ports->src = flow->new_port;
	} else {
		f->ip->dst = flow->new_addr;
		f->ports->dst = flow->new_port;
	}
	f->ip->ttl--;
	f->ip->check = csum_apply(f->ip->check, flow->l3_delta + CSUM_DELTA_TTL);
	*f->check = f->class == CLASS_UDP ? csum_apply_udp(*f->check, flow->l4_delta) :
					    csum_apply(*f->check, flow->l4_delta);
	__builtin_memcpy(f->eth->dst, flow->next_hop, sizeof(f->eth->dst));
	__builtin_memcpy(f->eth->src, egress->mac, sizeof(f->eth->src));
}

static __always_inline enum verdict fast_walk(struct xdp_md *ctx, enum direction direction, u32 *egress_index)
{
	struct fast f = {};
	enum verdict verdict = fast_parse(ctx, &f);
	struct settings *cfg = settings_get();
	u32 now = jiffies_now();
	struct interface *egress;
	struct flow *flow;

	if (verdict != CONTINUE || !cfg)
		return verdict;
	flow = fast_flow(cfg, &f, direction);
	if (!flow)
		return pass(COUNT_up_no_flow);
	if (!flow_is_armed(cfg, flow, now))
		return pass(COUNT_up_not_armed);
	if (f.total > flow->longest)
		return pass(COUNT_up_longer);
	*egress_index = flow->egress;
	egress = interface_at(*egress_index);
	if (!egress || !(egress->xdp & XDP_TO))
		return pass(COUNT_up_not_armed);

	fast_rewrite(&f, flow, egress, direction);
	if (f.tcp_acks)
		flow->last_ack = f.ack;
	flow_touch(flow, now, f.total);
	count(direction == OUTBOUND ? COUNT_fast_outbound : COUNT_fast_inbound);
	return CONTINUE;
}

#ifndef L3
int masq_lan_xdp(struct xdp_md *ctx)
{
	u32 egress = 0;

	return fast_walk(ctx, OUTBOUND, &egress) == CONTINUE ? transmitters.redirect_map(egress, 0) : XDP_PASS;
}

int masq_wan_xdp(struct xdp_md *ctx)
{
	u32 egress = 0;

	return fast_walk(ctx, INBOUND, &egress) == CONTINUE ? transmitters.redirect_map(egress, 0) : XDP_PASS;
}
#endif
