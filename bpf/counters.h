/* Every way a packet can end, and every turn of a session's life worth counting. The enum here and
 * the names and help texts in Python come from this one list: X(name, "help"). A name's first word tells its
 * kind: fast_ and slow_ translated, up_ handed by XDP to the slow path, own_ not ours to translate,
 * drop_ dropped, session_ and mapping_ life cycle.
 */
#define COUNTERS(X)                                                                                \
	X(fast_outbound, "LAN to WAN packets translated by XDP")                                   \
	X(fast_inbound, "WAN to LAN packets translated by XDP")                                    \
	X(slow_outbound, "LAN to WAN packets translated by TC")                                    \
	X(slow_inbound, "WAN to LAN packets translated by TC")                                     \
	X(slow_icmp_error_outbound, "ICMP errors from inside, translated with their quote")        \
	X(slow_icmp_error_inbound, "ICMP errors from outside, translated with their quote")        \
	X(slow_fragment_outbound, "later fragments from inside, translated")                       \
	X(slow_fragment_inbound, "later fragments from outside, translated")                       \
	X(slow_portless_outbound, "LAN to WAN packets of protocols without ports, translated")     \
	X(slow_portless_inbound, "WAN to LAN packets of protocols without ports, translated")      \
	X(slow_basic_outbound, "LAN to WAN packets of hosts with an address of their own (1:1)")    \
	X(slow_basic_inbound, "WAN to LAN packets of hosts with an address of their own (1:1)")     \
	X(slow_hairpin, "LAN to LAN packets through an external endpoint, translated twice")       \
	X(slow_hairpin_own, "between the gateway itself and a forward of its own, translated")     \
	X(slow_redirected, "packets from a LAN to somebody outside, redirected to the gateway itself") \
	X(slow_redirected_answer, "the gateway's answers to them, as if from whoever was called")   \
	X(exit_other_wan, "sent on to the WAN by which the session was opened, translated there")  \
	X(punt_fragment, "later fragments before their first, handed to the agent to wait")        \
	X(punt_alg, "packets of ALGs' control sessions, handed to the agent to be read")           \
	X(punt_return, "what the agent has had, put back where it came from")                      \
	X(up_not_ip, "XDP passed up: not IP, or a truncated header")                               \
	X(up_not_for_us, "XDP passed up: not addressed to this interface's MAC")                   \
	X(up_vlan, "XDP passed up: tagged for a VLAN that is none of ours, or not on XDP")          \
	X(up_no_room, "XDP passed up: no room in front of the frame for the VLAN tags of its way out") \
	X(up_unusual_ip, "XDP passed up: IP options, a fragment, or a length that does not fit")   \
	X(up_protocol, "XDP passed up: neither TCP nor UDP")                                       \
	X(up_tcp_flags, "XDP passed up: SYN, FIN or RST, which the slow path follows")             \
	X(up_ttl, "XDP passed up: TTL ends here")                                                  \
	X(up_no_flow, "XDP passed up: no session yet, or not ours")                                \
	X(up_not_armed, "XDP passed up: the flow's next hop is to be confirmed by the kernel")     \
	X(up_longer, "XDP passed up: longer than any packet of the flow that the kernel let pass") \
	X(own_outbound, "the gateway's own or routed packets leaving the WAN untouched")           \
	X(own_inbound, "packets from the WAN handed to the gateway's own stack")                   \
	X(own_exempt, "to and from destinations that are exempt from translation, untouched")      \
	X(own_not_ip, "other protocols than this instance's IP version, untouched")                \
	X(session_opened, "sessions opened")                                                       \
	X(session_reopened, "expired sessions opened again in place by their own host")            \
	X(session_closed, "sessions closed by the reaper")                                         \
	X(mapping_opened, "mappings opened")                                                       \
	X(mapping_closed, "mappings closed, their external port put to rest")                      \
	X(mapping_reclaimed, "expired ports taken back by a packet because the pool was used up")  \
	X(block_taken, "port blocks taken by hosts")                                               \
	X(block_freed, "port blocks given back")                                                   \
	X(forward_opened, "sessions that a forward let in")                                        \
	X(redirect_opened, "connections from a LAN that a redirect took")                          \
	X(trigger_pulled, "ports that an internal host's own traffic opened to it")                \
	X(pinhole_opened, "sessions that a pinhole let in")                                        \
	X(alg_bypassed, "packets of ALGs' control sessions passed unread: no agent, too many, or one too long")  \
	X(alg_full, "ALGs' control sessions opened without their ALG, for want of room")           \
	X(embryo_evicted, "unanswered sessions from outside that gave way to newer ones")          \
	X(drop_malformed, "dropped: truncated or contradictory headers")                           \
	X(drop_source_private, "dropped: would have left the WAN with a private source")           \
	X(drop_source_foreign, "dropped: a LAN packet whose source is in no internal prefix")      \
	X(drop_unguarded, "dropped: from the LAN to an interface that may be the WAN anew, not yet translated there") \
	X(drop_turned_round, "dropped: from the WAN back to the WAN, addressed to a private prefix")     \
	X(drop_filtered, "dropped: from the WAN to a mapped port, by a remote nobody inside talks to")  \
	X(drop_source_martian, "dropped: from the WAN, with a source that cannot be there")        \
	X(drop_source_route, "dropped: IP options that dictate the route")                         \
	X(drop_destination_internal, "dropped: from the WAN, addressed to an internal prefix")     \
	X(drop_protocol, "dropped: a protocol that is not to be translated, from inside")             \
	X(drop_icmp_type, "dropped: an ICMP type that is not translated, from inside")             \
	X(drop_icmp_error_no_session, "dropped: an ICMP error from inside about no known session") \
	X(drop_icmp_error_leak, "dropped: an ICMP error that would have quoted a private address") \
	X(drop_icmp_checksum, "dropped: an ICMP error whose checksum, or whose quote's, is wrong") \
	X(drop_icmp_error_implausible, "dropped: an ICMP error quoting what was never sent, or an MTU below 552") \
	X(drop_tcp_no_session, "dropped: a TCP segment from inside that cannot open a session")    \
	X(drop_tcp_flags, "dropped: TCP flags no sane stack sends")                                \
	X(drop_fragment_orphan, "dropped: a later fragment from inside before its first")          \
	X(drop_fragment_tiny, "dropped: a first fragment too short to hold the transport header")  \
	X(drop_fragment_overlap, "dropped: a fragment that overlaps another of its packet")        \
	X(drop_host_limit, "dropped: an internal host with as many sessions or ports as it may have")   \
	X(drop_host_rate, "dropped: an internal host opening sessions faster than it may")         \
	X(drop_portless_taken, "dropped: another internal host speaks this protocol with this remote")  \
	X(drop_portless_full, "dropped: no room for another host and remote of a protocol without ports") \
	X(drop_reply_taken, "dropped: the internal host speaks with this remote through another port")  \
	X(drop_redirects_full, "dropped: no room for another redirected connection")               \
	X(drop_hairpin_route, "dropped: a hairpinned packet whose way leads to no LAN")            \
	X(drop_ttl, "dropped: a hairpinned packet whose time ends here")                           \
	X(drop_exit_route, "dropped: has to leave by another WAN, which is not there or has no route") \
	X(drop_exit_too_big, "dropped: too big for the WAN by which it has to leave; put back in pieces, or told") \
	X(drop_punt_stray, "dropped: at the punt port, but not ours to put back")                  \
	X(drop_no_external, "dropped: the WAN has no address to masquerade as")                    \
	X(drop_ports_exhausted, "dropped: no free external port")                                  \
	X(drop_blocks_exhausted, "dropped: no free port block")                                    \
	X(drop_sessions_full, "dropped: no room for another session")                              \
	X(drop_session_busy, "dropped: the session was being closed at this very moment")          \
	X(drop_rewrite, "dropped: the kernel refused to change the packet")

#define COUNTER_ENUM(name, help) COUNT_##name,
enum counter { COUNTERS(COUNTER_ENUM) COUNTER_MAX };

#define KINDS_TRANSLATED (COUNT_slow_redirected_answer + 1) /* fast_ and slow_ come first */
