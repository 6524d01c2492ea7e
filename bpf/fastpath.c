/* XDP on the devices of LAN and WAN: repeats, for armed flows, what the slow path has decided. It holds no policy. Whatever it
 * does not recognise goes up unmodified; all checks come before the first write.
 */
struct fast {
	struct interface *here; /* that it belongs to */
	u32 tags; /* VLAN tags that it came with */
	struct ethernet_header *eth;
	struct ip_header *ip;
	struct port_header *ports;
	u16 *check; /* of the transport */
	__be32 ack;
	bool tcp_acks;
	u8 class;
	u32 total; /* IP length, bytes */
};

#define TAGS_AT offsetof(struct ethernet_header, proto)
#define VLAN_ID 0x0fff

/* Reads the tags of a frame that is not IP at once, and finds the VLAN device that they name. A tag with VLAN id 0 names
 * none: it only carries a priority.
 */
static __always_inline enum verdict tags_read(struct xdp_md *ctx, struct fast *f)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct vlan_key key = { .device = ctx->ingress_ifindex };
	struct tag *tag = data + TAGS_AT, *named = &key.outer;
	u32 *index;

#pragma unroll
	for (u32 i = 0; i < TAGS; i++) {
		if ((void *)(tag + 1) + sizeof(__be16) > end)
			return pass(COUNT_up_not_ip);
		if (tag->tpid != bpf_htons(ETH_P_8021Q) && tag->tpid != bpf_htons(ETH_P_8021AD))
			break;
		if (tag->tci & bpf_htons(VLAN_ID)) {
			named->tpid = tag->tpid;
			named->tci = tag->tci & bpf_htons(VLAN_ID);
			named = &key.inner;
		}
		f->tags++;
		tag++;
	}
	if (tag->tpid != bpf_htons(ETH_P_IP))
		return pass(COUNT_up_not_ip);
	if (!key.outer.tpid)
		return CONTINUE;
	index = vlans.lookup(&key);
	if (!index)
		return pass(COUNT_up_vlan);
	f->here = interface_at(*index);
	return CONTINUE;
}

/* Notes where things stand behind @ip; false when the packet ends before. */
static __always_inline bool fast_locate(struct fast *f, struct ip_header *ip, void *end)
{
	struct udp_header *udp = (void *)(ip + 1);
	struct tcp_header *tcp = (void *)(ip + 1);
	bool is_udp = f->class == CLASS_UDP;

	f->ip = ip;
	f->ports = &udp->port;
	f->check = is_udp ? &udp->check : &tcp->check;
	return (is_udp ? (void *)(udp + 1) : (void *)(tcp + 1)) <= end;
}

/* Fills @f from a plain IPv4 packet to the own MAC of the interface that it belongs to; CONTINUE when it may fly. */
static __always_inline enum verdict fast_parse(struct xdp_md *ctx, struct fast *f)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethernet_header *eth = data;
	struct ip_header *ip = data + sizeof(*eth);
	struct tcp_header *tcp;
	enum verdict verdict;
	u32 header;

	/* The shortest packet that flies is a UDP header without payload. */
	if ((void *)(ip + 1) + sizeof(struct udp_header) > end)
		return pass(COUNT_up_not_ip);
	f->here = interface_at(ctx->ingress_ifindex);
	if (eth->proto != bpf_htons(ETH_P_IP)) {
		verdict = tags_read(ctx, f);
		if (verdict != CONTINUE)
			return verdict;
		ip = data + sizeof(*eth) + f->tags * sizeof(struct tag);
		if ((void *)(ip + 1) + sizeof(struct udp_header) > end)
			return pass(COUNT_up_not_ip);
	}
	if (!f->here || f->here->mac[0] != eth->dst[0] || f->here->mac[1] != eth->dst[1] ||
	    f->here->mac[2] != eth->dst[2])
		return pass(COUNT_up_not_for_us);
	f->total = bpf_ntohs(ip->tot_len);
	if (ip->version_ihl != 0x45 || ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_OFFSET_UNITS) ||
	    f->total > (u64)(end - (void *)ip) || f->total < sizeof(*ip) + sizeof(struct udp_header))
		return pass(COUNT_up_unusual_ip);
	if (ip->ttl <= 1)
		return pass(COUNT_up_ttl);
	f->eth = eth;
	f->class = class_of(ip->proto);
	if (f->class >= CLASS_ICMP || !fast_locate(f, ip, end))
		return pass(COUNT_up_protocol);
	if (f->class == CLASS_UDP)
		return CONTINUE;
	tcp = (void *)f->ports;
	header = (tcp->data_offset >> 4) * 4;
	if (header < sizeof(*tcp) || sizeof(*ip) + header > f->total)
		return pass(COUNT_up_protocol);
	if (tcp->flags & (TCP_SYN | TCP_FIN | TCP_RST) || !(tcp->flags & TCP_ACK))
		return pass(COUNT_up_tcp_flags);
	f->ack = tcp->ack;
	f->tcp_acks = true;
	return CONTINUE;
}

/* Of the sessions that an internal endpoint has by several WANs, the one that the kernel's choice has armed. */
static __always_inline struct session *fast_session_outbound(const struct settings *cfg, const struct fast *f, u32 now)
{
	struct session *found = NULL;

#pragma clang loop unroll(full)
	for (u32 wan = 0; wan < WANS; wan++) {
		struct flow_key key = flow_outbound(endpoint(f->ip->src, f->ports->src, f->class, wan), f->ip->dst,
						    f->ports->dst);
		struct session *s = session_find_armed(cfg, &key, now);

		found = s ?: found;
		if (WANS > 1 && s && flow_is_armed(cfg, &s->out, now))
			break;
	}
	return found;
}

static __always_inline struct session *fast_session(const struct settings *cfg, const struct fast *f,
						    enum direction direction, u32 now)
{
	struct flow_key key;

	if (direction == OUTBOUND)
		return fast_session_outbound(cfg, f, now);
	key = flow_inbound(slot_of_external(cfg, f->ip->dst, f->class, f->ports->dst), f->ip->src, f->ports->src);
	return session_find_armed(cfg, &key, now);
}

/* Gives the frame the tags of its way out for those that it came with. The last step that may fail: nothing is written
 * yet. The MACs fast_rewrite() puts in their new place, and the EtherType of IP stands in front of its header already.
 */
static __always_inline bool tags_exchange(struct xdp_md *ctx, struct fast *f, const struct interface *egress)
{
	u32 tags = egress->tags;
	struct tag *tag;
	void *data, *end;

	if (tags > TAGS || bpf_xdp_adjust_head(ctx, (int)(f->tags - tags) * (int)sizeof(*tag)))
		return false;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	tag = data + TAGS_AT;
	f->eth = data;
	/* It is as long as before; only the verifier has to be told. */
	if (!fast_locate(f, data + sizeof(*f->eth) + tags * sizeof(*tag), end) || (void *)(tag + TAGS) > end)
		return false;
#pragma unroll
	for (u32 i = 0; i < TAGS; i++)
		if (i < tags)
			tag[i] = egress->tag[i];
	return true;
}

static __always_inline void fast_rewrite(struct fast *f, const struct flow *flow, const struct interface *egress,
					 enum direction direction)
{
	addr_t *addr = direction == OUTBOUND ? &f->ip->src : &f->ip->dst;
	__be16 *port = direction == OUTBOUND ? &f->ports->src : &f->ports->dst;
	u32 l3_delta = csum_delta_addr(*addr, flow->new_addr);
	u32 l4_delta = l3_delta + csum_delta_port(*port, flow->new_port);

	*addr = flow->new_addr;
	*port = flow->new_port;
	f->ip->ttl--;
	f->ip->check = csum_apply(f->ip->check, l3_delta + CSUM_DELTA_TTL);
	*f->check = f->class == CLASS_UDP ? csum_apply_udp(*f->check, l4_delta) : csum_apply(*f->check, l4_delta);
	__builtin_memcpy(f->eth->dst, flow->next_hop, sizeof(f->eth->dst));
	__builtin_memcpy(f->eth->src, egress->mac, sizeof(f->eth->src));
}

/* CONTINUE: translated, to be sent out of @egress_index. */
static __always_inline enum verdict fast_walk(struct xdp_md *ctx, struct fast *f, enum direction direction,
					      u32 *egress_index)
{
	struct settings *cfg = settings_get();
	u32 now = jiffies_now();
	struct interface *egress;
	struct session *s;
	struct flow *flow;

	if (!cfg)
		return PASS;
	s = fast_session(cfg, f, direction, now);
	if (!s)
		return pass(COUNT_up_no_flow);
	flow = session_flow(s, direction);
	if (!flow_is_armed(cfg, flow, now))
		return pass(COUNT_up_not_armed);
	if (f->total > flow->longest)
		return pass(COUNT_up_longer);
	*egress_index = flow->egress;
	egress = interface_at(*egress_index);
	if (!egress || !(egress->xdp & XDP_TO))
		return pass(COUNT_up_not_armed);
	if (f->tags | egress->tags && !tags_exchange(ctx, f, egress))
		return pass(COUNT_up_no_room);

	fast_rewrite(f, flow, egress, direction);
	if (f->tcp_acks)
		flow->last_ack = f->ack;
	flow_touch(s, direction, now, f->total);
	if (direction == OUTBOUND)
		carry(COUNT_fast_outbound, WANS > 1 ? egress->wan : 0, f->total);
	else
		carry(COUNT_fast_inbound, WANS > 1 ? f->here->wan : 0, f->total);
	return CONTINUE;
}

/* One program for both roles: VLANs of either may share a device. */
int masq_xdp(struct xdp_md *ctx)
{
	struct fast f = {};
	enum verdict verdict = fast_parse(ctx, &f);
	u32 egress = 0;

	if (verdict != CONTINUE)
		return XDP_PASS;
	if (f.here->role == ROLE_LAN)
		verdict = fast_walk(ctx, &f, OUTBOUND, &egress);
	else if (f.here->role == ROLE_WAN)
		verdict = fast_walk(ctx, &f, INBOUND, &egress);
	else
		verdict = pass(COUNT_up_not_for_us);
	return verdict == CONTINUE ? transmitters.redirect_map(egress, 0) : XDP_PASS;
}
