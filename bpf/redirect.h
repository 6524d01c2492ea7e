/* Redirects on a LAN (transparent proxies): what its hosts send to some port of anybody outside is answered by the gateway
 * itself. At the LAN's ingress the destination becomes a local port, at its egress the answers get back the source that
 * the client called. `redirects` remembers which that was; `answers` leads there from what the gateway's socket sees.
 * Redirects of what comes from outside are forwards whose target is the gateway, see inbound.h.
 */
#define CLIENT_PORT_TRIES 16

enum redirected_side { FROM_CLIENT, FROM_GATEWAY };

static __always_inline struct redirected_key redirected_key_of(const struct packet *p)
{
	struct redirected_key key = { .client = p->src,
				      .server = p->dst,
				      .client_port = p->src_port,
				      .server_port = p->dst_port,
				      .class = p->class };
	return key;
}

/* The same of a packet in the other direction. */
static __always_inline struct redirected_key redirected_key_back(const struct packet *p)
{
	struct redirected_key key = { .client = p->dst,
				      .server = p->src,
				      .client_port = p->dst_port,
				      .server_port = p->src_port,
				      .class = p->class };
	return key;
}

static __always_inline struct redirected_key answer_key_of(const struct redirected_key *key, const struct redirected *r)
{
	struct redirected_key answer = { .client = key->client,
					 .server = r->local,
					 .client_port = r->client_port,
					 .server_port = r->local_port,
					 .class = key->class };
	return answer;
}

static __always_inline struct redirected *redirected_find(const struct settings *cfg, const struct redirected_key *key,
							  u32 now)
{
	struct redirected *r = redirects.lookup((struct redirected_key *)key);
	u32 limit;

	if (!r)
		return NULL;
	limit = idle_limit(cfg, key->class, r->tcp_seen[FROM_CLIENT], r->tcp_seen[FROM_GATEWAY]);
	return idle_longer(now, r->last_seen, limit) ? NULL : r;
}

/* The live connection that the gateway's socket knows as @answer, and in @key as what its client knows it. */
static __always_inline struct redirected *answered_find(const struct settings *cfg, const struct redirected_key *answer,
							struct redirected_key *key, u32 now)
{
	struct redirected_key *found = answers.lookup((struct redirected_key *)answer);
	struct redirected *r;

	if (!found)
		return NULL;
	*key = *found;
	r = redirected_find(cfg, key, now);
	return r && r->client_port == answer->client_port && r->local_port == answer->server_port ? r : NULL;
}

/* Does a client of the gateway's own talk from there, not redirected? Asked before the first packet is let up. */
static __always_inline bool answer_is_sockets(const struct packet *p, const struct redirected_key *answer)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock;
	bool talks;

	if (p->class != CLASS_TCP)
		return false;
	tuple.ipv4.saddr = answer->client.word[0];
	tuple.ipv4.sport = answer->client_port;
	tuple.ipv4.daddr = answer->server.word[0];
	tuple.ipv4.dport = answer->server_port;
	sock = bpf_skc_lookup_tcp(p->skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!sock)
		return false;
	talks = sock->state != BPF_TCP_LISTEN && sock->state != BPF_TCP_TIME_WAIT;
	bpf_sk_release(sock);
	return talks;
}

static __always_inline bool answer_claim(const struct settings *cfg, const struct packet *p,
					 struct redirected_key *answer, struct redirected_key *key)
{
	struct redirected_key *other = answers.lookup(answer);
	struct redirected_key taken;

	if (other) {
		taken = *other;
		if (redirected_find(cfg, &taken, p->now))
			return false;
		answers.delete(answer);
	}
	return !answer_is_sockets(p, answer) && !answers.insert(answer, key);
}

/* The client's own port, or where the gateway's socket knows that already, from its call to another remote, a random one. */
static __always_inline __be16 client_port_claim(const struct settings *cfg, const struct packet *p,
						struct redirected_key *key, const struct redirected *r)
{
	struct redirected_key answer = answer_key_of(key, r);

	answer.client_port = key->client_port;
#pragma clang loop unroll(disable)
	for (int i = 0; i < CLIENT_PORT_TRIES; i++) {
		if (answer_claim(cfg, p, &answer, key))
			return answer.client_port;
		answer.client_port = bpf_htons(1024 + random_below(PORTS - 1024));
	}
	return 0;
}

/* What is left of an expired connection over the same endpoints. */
static __always_inline void redirected_forget(struct redirected_key *key)
{
	struct redirected *r = redirects.lookup(key);
	struct redirected_key answer, *found;

	if (!r)
		return;
	answer = answer_key_of(key, r);
	found = answers.lookup(&answer);
	if (found && found->server_port == key->server_port && found->client_port == key->client_port &&
	    addr_equal(found->server, key->server))
		answers.delete(&answer);
	redirects.delete(key);
}

static __always_inline bool is_spared(addr_t addr, u32 rule)
{
	struct spared_key key = { .bits = 32 + ADDR_BITS, .rule = rule, .addr = addr };

	return spared.lookup(&key);
}

/* The rule that takes @p, or NULL. */
static __always_inline struct forward *redirect_for(const struct packet *p, u32 *index)
{
	u32 role = prefix_role(p->dst);
	struct forward *f;

	*index = forward_index(p, FORWARD_ON_LAN);
	f = forward_at(*index);
	if (!f || role == PREFIX_OWN || role == PREFIX_INTERNAL || addr_is_martian(p->dst) ||
	    is_spared(p->dst, FORWARDS) || is_spared(p->dst, *index))
		return NULL;
	return f;
}

/* What an outside host has begun, and a TCP connection older than the rule, go on as they are. Another connection over the
 * same endpoints must not meet what XDP has learned of the old one.
 */
static __always_inline bool runs_already(const struct settings *cfg, const struct packet *p)
{
	struct session *s = session_by_any(cfg, endpoint(p->src, p->src_port, p->class, NO_WAN), p->dst, p->dst_port, true,
					   p->now);

	if (!s)
		return false;
	if (s->out.marks & SESSION_FROM_OUTSIDE ||
	    (p->class == CLASS_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN))
		return true;
	session_disarm(cfg, s);
	return false;
}

/* NULL with the verdict: PASS when no redirect takes @p. */
static __always_inline struct redirected *redirected_open(const struct settings *cfg, struct packet *p,
							  struct redirected_key *key, addr_t local, enum verdict *verdict)
{
	struct redirected fresh = { .local = local, .last_seen = p->now };
	struct redirected *r;
	struct forward *f;
	u32 index;

	*verdict = PASS;
	if (!packet_blur(p))
		return NULL;
	f = redirect_for(p, &index);
	if (!f || runs_already(cfg, p))
		return NULL;
	*verdict = may_open(p);
	if (*verdict != CONTINUE)
		return NULL;
	fresh.rule = index;
	fresh.local_port = bpf_htons(f->target[0].port + bpf_ntohs(p->dst_port) - f->first);
	redirected_forget(key);
	r = redirects.insert(key, &fresh) ? NULL : redirects.lookup(key);
	if (!r) {
		*verdict = drop(COUNT_drop_redirects_full);
		return NULL;
	}
	r->client_port = client_port_claim(cfg, p, key, r);
	if (!r->client_port) {
		redirects.delete(key);
		*verdict = drop(COUNT_drop_redirects_full);
		return NULL;
	}
	__sync_fetch_and_add(&f->opened, 1);
	count(COUNT_redirect_opened);
	return r;
}

static __always_inline void redirected_touch(struct redirected *r, const struct packet *p, enum redirected_side side)
{
	u8 *from = &r->tcp_seen[side], *to = &r->tcp_seen[!side];

	r->last_seen = p->now;
	if (p->class != CLASS_TCP)
		return;
	if (p->tcp_flags & TCP_SYN && !(p->tcp_flags & TCP_ACK) && !tcp_sides_are_established(*from, *to))
		*from = *to = 0; /* a new connection over the same endpoints */
	if (!(p->tcp_flags & TCP_RST)) {
		*from &= ~TCP_RST;
		*to &= ~TCP_RST;
	}
	*from |= p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_FIN | TCP_RST);
}

/* An endpoint on each side changes; the client's port seldom does. */
static __always_inline enum verdict redirected_rewrite(const struct packet *p, enum side side, addr_t new, __be16 new_port,
						       __be16 client_port, enum counter done)
{
	enum side client = side == SOURCE ? DESTINATION : SOURCE;

	if (client_port != packet_port(p, client) && rewrite_transport(p, client, packet_addr(p, client), client_port))
		return drop(COUNT_drop_rewrite);
	return rewrite(p, side, new, new_port, done);
}

/* The same of the packet that an ICMP error quotes, and of the error's other end. */
static __always_inline enum verdict redirected_error(const struct packet *p, struct quote *q, enum side side, addr_t new,
						     __be16 new_port, __be16 client_port, enum counter done)
{
	enum side quoted = side == SOURCE ? DESTINATION : SOURCE;

	if (client_port != packet_port(&q->inner, side) &&
	    (quote_rewrite(p, q, side, packet_addr(&q->inner, side), client_port) || !quote_parse(p, q)))
		return drop(COUNT_drop_rewrite);
	if (quote_rewrite(p, q, quoted, new, new_port) || rewrite_addr(p, side, new))
		return drop(COUNT_drop_rewrite);
	return translated(p, done);
}

/* About an answer of ours: it quotes what the client got. */
static __always_inline enum verdict error_redirect(const struct settings *cfg, const struct packet *p)
{
	struct redirected_key key;
	struct quote q = {};
	struct redirected *r;

	if (!quote_parse(p, &q) || !addr_equal(p->dst, q.inner.src))
		return PASS;
	key = redirected_key_back(&q.inner);
	r = redirected_find(cfg, &key, p->now);
	return r ? redirected_error(p, &q, DESTINATION, r->local, r->local_port, r->client_port,
				    COUNT_slow_redirected) :
		   PASS;
}

static __always_inline enum verdict error_answer(const struct settings *cfg, const struct packet *p)
{
	struct redirected_key answer, key;
	struct quote q = {};

	if (!quote_parse(p, &q) || !addr_equal(p->src, q.inner.dst))
		return PASS;
	answer = redirected_key_of(&q.inner);
	return answered_find(cfg, &answer, &key, p->now) ?
		       redirected_error(p, &q, SOURCE, key.server, key.server_port, key.client_port,
					COUNT_slow_redirected_answer) :
		       PASS;
}

/* Later fragments follow their first by address; one that comes before it goes where it was sent to. */
static __always_inline enum verdict fragment_redirect(const struct settings *cfg, const struct packet *p, enum side side,
						      enum counter done)
{
	struct fragment *first = fragment_recall(cfg, p);

	return first && !addr_is_unset(first->new_addr[side]) ? fragment_rewrite(p, first, done) : PASS;
}

/* At the LAN's ingress; @local is what the gateway answers from. */
static __always_inline enum verdict redirect(const struct settings *cfg, struct packet *p, addr_t local)
{
	struct redirected_key key = redirected_key_of(p);
	enum verdict verdict;
	struct redirected *r;

	if (prefix_role(p->src) != PREFIX_INTERNAL)
		return PASS;
	if (packet_follows_first(p))
		return fragment_redirect(cfg, p, DESTINATION, COUNT_slow_redirected);
	if (packet_is_icmp_error(p))
		return error_redirect(cfg, p);
	if (p->class >= CLASS_ICMP)
		return PASS;
	r = redirected_find(cfg, &key, p->now);
	if (!r)
		r = redirected_open(cfg, p, &key, local, &verdict);
	if (!r)
		return verdict;
	if (!r->client_port)
		return drop(COUNT_drop_session_busy);
	redirected_touch(r, p, FROM_CLIENT);
	r->packets++;
	r->bytes += packet_bytes(p);
	if (p->more_fragments && fragment_begin(cfg, p, DESTINATION, r->local) != CONTINUE)
		return DROP;
	return redirected_rewrite(p, DESTINATION, r->local, r->local_port, r->client_port, COUNT_slow_redirected);
}

/* At the LAN's egress, of what the gateway itself sends. */
static __always_inline enum verdict redirect_answer(const struct settings *cfg, const struct packet *p)
{
	struct redirected_key answer = redirected_key_back(p), key;
	struct redirected *r;

	if (packet_follows_first(p))
		return fragment_redirect(cfg, p, SOURCE, COUNT_slow_redirected_answer);
	if (packet_is_icmp_error(p))
		return error_answer(cfg, p);
	if (p->class >= CLASS_ICMP)
		return PASS;
	r = answered_find(cfg, &answer, &key, p->now);
	if (!r)
		return PASS;
	redirected_touch(r, p, FROM_GATEWAY);
	if (p->more_fragments && fragment_begin(cfg, p, SOURCE, key.server) != CONTINUE)
		return DROP;
	return redirected_rewrite(p, SOURCE, key.server, key.server_port, key.client_port, COUNT_slow_redirected_answer);
}
