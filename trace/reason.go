package trace

import "slices"

// Reason is a stable code for a failure.
type Reason string

// The reasons. Reasons says what each means.
const (
	NoReason Reason = ""

	// Refused by the proxy's own rules.
	NoEndpoints       Reason = "no-endpoints"
	EndpointsNotReady Reason = "endpoints-not-ready"
	PortMismatch      Reason = "port-mismatch"
	NoLocalEndpoints  Reason = "no-local-endpoints"
	SourceRange       Reason = "source-range"
	Localnet          Reason = "localnet"

	// Stopped on the node, on the way to the endpoint or back.
	DroppedByRule  Reason = "dropped-by-rule"
	PolicyDrop     Reason = "policy-drop"
	NotForwarded   Reason = "not-forwarded"
	NoRoute        Reason = "no-route"
	RPFilter       Reason = "rp-filter"
	SourcePorts    Reason = "source-ports"
	DroppedOnNode  Reason = "dropped-on-node"
	ReplyLost      Reason = "reply-lost"
	ReplyRPFilter  Reason = "reply-rp-filter"
	ReplyBypassed  Reason = "reply-bypassed"
	Hairpin        Reason = "hairpin"
	Untranslated   Reason = "untranslated"
	IdleExpired    Reason = "idle-expired"
	EntryLost      Reason = "entry-lost"
	InvalidDropped Reason = "invalid-dropped"
	TooLarge       Reason = "too-large"
	StaleEntry     Reason = "stale-entry"
	// LargeUnacknowledged says what was seen, and not that it was the MTU.
	LargeUnacknowledged Reason = "large-unacknowledged"
	// ConntrackFull is what check calls its finding, too.
	ConntrackFull Reason = "conntrack-full"
	NotTracked    Reason = "not-tracked"
	// NodePortShadowed is of any address of a Service.
	NodePortShadowed Reason = "nodeport-shadowed"

	// Of the endpoint, or between node and endpoint.
	EndpointRefused     Reason = "endpoint-refused"
	Unreachable         Reason = "unreachable"
	SynUnanswered       Reason = "syn-unanswered"
	NoReply             Reason = "no-reply"
	ResetByEndpoint     Reason = "reset-by-endpoint"
	ResetByClient       Reason = "reset-by-client"
	EndpointTerminating Reason = "endpoint-terminating"
	EndpointGone        Reason = "endpoint-gone"
	RulesBehind         Reason = "rules-behind"
	AffinityDead        Reason = "affinity-dead"

	// AffinityForgotten is of connections that went on, to another endpoint.
	AffinityForgotten Reason = "affinity-forgotten"

	// ProxyStopped: the userspace proxy ended, and with it what it relayed.
	ProxyStopped Reason = "proxy-stopped"
)

// ReasonInfo is what there is to say of a Reason.
type ReasonInfo struct {
	Code Reason
	// Sentence says what happened, Evidence by what kptrace knows, and Next what
	// to look at.
	Sentence, Evidence, Next string
}

// Reasons lists all reasons, in the order in which a connection can meet them.
func Reasons() []ReasonInfo {
	return []ReasonInfo{
		{NoEndpoints, "The Service has no endpoint, so the node refuses the connection.",
			"The proxy's REJECT rule reported the packet, and no EndpointSlice of the Service has an endpoint.",
			"Does the Service's selector match the labels of any pod? kubectl get pods -l … and kubectl get endpointslices -l kubernetes.io/service-name=NAME."},
		{EndpointsNotReady, "The Service has endpoints and none of them is ready, so the node refuses the connection.",
			"The proxy's REJECT rule reported the packet, and every endpoint in the Service's slices is not ready.",
			"Why do the pods' readiness probes fail? kubectl describe pod."},
		{PortMismatch, "The Service's EndpointSlices have endpoints for ports of other names only, so this port has none.",
			"The proxy's REJECT rule reported the packet, and the slices have endpoints, but no port of this name and protocol.",
			"Compare the port names and protocols of Service and EndpointSlice; a targetPort given by name must exist in the pod's containers."},
		{NoLocalEndpoints, "The traffic policy is Local and no endpoint runs on this node, so the node drops the connection.",
			"The proxy's DROP rule reported the packet.",
			"internalTrafficPolicy and externalTrafficPolicy of the Service; a load balancer should not send to this node: does it ask the healthCheckNodePort?"},
		{SourceRange, "The client is outside the load balancer's source ranges, so the node drops the connection.",
			"The proxy's DROP rule for source ranges reported the packet.",
			"spec.loadBalancerSourceRanges of the Service; is the client's address replaced on the way, by a gateway?"},
		{Localnet, "A packet from outside was addressed to 127.0.0.0/8, which nobody outside may use.",
			"The rule against it is where the walk of kptrace explain ends; a Service with endpoints is translated before. No connection shows it, for nothing reports from that chain, which is the kubelet's, too.", "The route by which it came."},
		{DroppedByRule, "A rule of the node dropped or refused the packet on its way to the endpoint.",
			"The endpoint was picked, the connection never left the node, and every way through the live rules ends at that rule.",
			"The rule, and whose it is, stand beside the reason; kptrace explain prints the way there. NetworkPolicies: kubectl get networkpolicy."},
		{PolicyDrop, "The policy of a built-in chain, mostly FORWARD, dropped the packet on its way to the endpoint.",
			"As for dropped-by-rule; the way ends at the chain's policy.",
			"Docker sets FORWARD to DROP when it starts, firewalls too: iptables -P FORWARD ACCEPT, or a rule that accepts the pods' range."},
		{NotForwarded, "The node does not forward packets.",
			"The endpoint was picked, the connection never left the node, and net.ipv4.ip_forward is 0. In IPVS mode, where the node takes the client's packets to be its own: as for reply-lost.",
			"sysctl -w net.ipv4.ip_forward=1; what turned it off?"},
		{NoRoute, "The node has no route to the endpoint.",
			"The endpoint was picked, the connection never left the node, and the kernel knows no route.",
			"ip route get ENDPOINT on the node; is the CNI healthy?"},
		{RPFilter, "Strict reverse path filtering dropped the packet: the node would send answers to the client by another interface.",
			"The connection never left the node, rp_filter of the interface it came in by is 1, and the route to the client leads elsewhere.",
			"ip route get CLIENT on the node; 2 (loose) is enough: sysctl -w net.ipv4.conf.all.rp_filter=2."},
		{SourcePorts, "The node had no source port left to masquerade the connection with.",
			"The connection never left the node, a rule would have replaced its source, and connection tracking has entries to the endpoint for nearly all ports that the rule may use.",
			"Who makes so many connections to one endpoint? A narrow --to-ports of a rule; nf_conntrack_tcp_timeout_time_wait; more endpoints, or keep-alive."},
		{DroppedOnNode, "The packet did not leave the node, and where it was dropped is not known.",
			"The endpoint was picked and connection tracking never confirmed the connection; the live rules of iptables would have let it through.",
			"Tables of nf_tables that are not of iptables, which stand beside the reason; an eBPF program, traffic control; the counter insert_failed of conntrack -S; kptrace follow -o path."},
		{ReplyLost, "The endpoint answered and the client tries again: the answer was lost between this node and the client.",
			"The endpoint's SYN-ACK passed this node, and the client sent its SYN again, twice at least; or once, and the entry expired in SYN_RECV.",
			"Rules that drop what comes from the endpoint (iptables-save), rp_filter, the network to the client."},
		{ReplyRPFilter, "Strict reverse path filtering dropped the answer: the node would send to the endpoint by another interface than the answer came in by.",
			"As for reply-lost; rp_filter of the interface by which the SYN-ACK came in is 1, the route to the endpoint leads elsewhere, and the kernel has counted packets that it dropped for that.",
			"ip route get ENDPOINT and ip rule on the node; 2 (loose) is enough: sysctl -w net.ipv4.conf.all.rp_filter=2."},
		{ReplyBypassed, "The endpoint answered the client past the node's translation, from its own address, so that the client did not know the answer for one.",
			"No rule saw an answer, and on the wire of the node was the SYN-ACK to this SYN as it left for the client with the endpoint's own address, or the reset with which the client turned it down.",
			"ip route get CLIENT at the endpoint: is there another way than through the node? Pods on one bridge: sysctl -w net.bridge.bridge-nf-call-iptables=1."},
		{Hairpin, "A pod was sent to itself, and its own address as the source was not replaced, so it took the packet for forged.",
			"Client and endpoint have the same address, and the connection was not masqueraded.",
			"A rule before KUBE-POSTROUTING that accepts or translates pod traffic; hairpin mode of the CNI's bridge."},
		{Untranslated, "A connection to the Service goes to its address as it is, for it began while the rules were not there, or a rule before them let it pass.",
			"Connection tracking has an entry to the Service's address that is not translated; the kernel asks rules for the first packet only.",
			"conntrack -D --orig-dst ADDRESS; for UDP, kptrace's proxy does it. Clients that send before kube-proxy is ready."},
		{NotTracked, "A rule keeps the packets of the connection from connection tracking, so that no rule of nat sees them and no endpoint is picked. What becomes of them is not known.",
			"The path of its first packet, which somebody followed, shows a rule that says NOTRACK, and none of nat.",
			"The rule stands beside the reason. NodeLocal DNSCache has such rules on purpose: it answers at the Service's address itself. kptrace check (not-tracked) finds them also where nobody follows paths."},
		{IdleExpired, "Connection tracking forgot the connection because nothing was sent for too long; what either side sends now is lost or reset.",
			"The entry of an established connection expired.",
			"Keep-alives shorter than net.netfilter.nf_conntrack_tcp_timeout_established."},
		{EntryLost, "Connection tracking had lost the connection's entry, so that what was sent later was taken for a new connection, and went to another endpoint or to none.",
			"The first packet seen of it is no SYN, or made an entry in mid-connection, and no entry of it expired before (that would be idle-expired).",
			"Who empties the table (conntrack -E -e DESTROY)? A restart of the CNI, conntrack -F; a table that was full throws out entries (early_drop in conntrack -S)."},
		{InvalidDropped, "Connection tracking takes segments of the connection for INVALID, and a rule of the node drops them: they are sent again and again, and the connection hangs.",
			"The same segment was reported as INVALID once more when it was sent again, and the live rules of FORWARD drop what is; the rule stands beside the reason.",
			"Was the entry removed (it stands beside the reason then; conntrack -E -e DESTROY) where nf_conntrack_tcp_loose is 0? Segments out of the window, as where packets of one direction take another way past the node (tcpdump, nf_conntrack_log_invalid): nf_conntrack_tcp_be_liberal, kube-proxy's --conntrack-tcp-be-liberal."},
		{TooLarge, "Large packets of the connection do not get through: they exceed the MTU of a link on the way, and the sender does not heed the ICMP error that says so.",
			"The error (fragmentation needed, packet too big) was seen more than once, 200 ms apart and more: the sender sent the same size again.",
			"A firewall that drops ICMP on the way to the sender or in it; the MTU of the CNI's devices against that of the nodes' network; TCPMSS --clamp-mss-to-pmtu."},
		{LargeUnacknowledged, "Large packets of the connection passed the node again and again, and were never acknowledged by the side that then ended it; small ones were, for it was established.",
			"The FIN or RST of that side acknowledges less than the entry had counted more than a second before, and in between the other side sent large packets and heard nothing.",
			"Does a link on the way have a smaller MTU, and does the router before it send no ICMP error, or a firewall drop it? ping -M do -s 1400 ADDRESS; TCPMSS --clamp-mss-to-pmtu; net.ipv4.tcp_mtu_probing=1 at the sender."},
		{StaleEntry, "Connection tracking keeps the client at an endpoint that has left the Service.",
			"The API does not have the endpoint any more, the client's packets still pass its entry, and nothing comes back.",
			"conntrack -D -p udp --orig-dst ADDRESS; why does the kube-proxy not delete it?"},
		{ConntrackFull, "The node's table of connections is full, so it dropped the first packet before any rule saw it.",
			"A packet to the Service came to a device of the node, no rule reported it and no entry was made, and meanwhile connection tracking counted packets that it dropped, with at least 95 % of nf_conntrack_max in use.",
			"Who has so many connections: count the lines of conntrack -L by source; net.netfilter.nf_conntrack_max; timeouts of connections that nobody ends (nf_conntrack_tcp_timeout_established)."},
		{NodePortShadowed, "Another rule sent the connection elsewhere before the Service's rules saw it.",
			"Connection tracking translated it to what is no endpoint of the Service, and the live rules have a rule, not the proxy's, that does so.",
			"The rule, and whose it is, stand beside the reason: hostPort of a pod, Docker's published ports, a hand-made DNAT."},
		{EndpointRefused, "The endpoint refused the connection: nothing listens on that port.",
			"An RST, or an ICMP port unreachable, in answer to the first packet.",
			"Does the container listen on the targetPort, and on the pod's address and not on 127.0.0.1? Why is the endpoint ready?"},
		{Unreachable, "A router, or the node, said that the endpoint cannot be reached.",
			"An ICMP error about the first packet; who sent it stands beside the reason.",
			"Does the pod still exist? The route to its node; a firewall that rejects."},
		{SynUnanswered, "The SYN left the node and no answer passed it.",
			"SYN and retransmits were seen, the connection is confirmed, and there was no SYN-ACK, RST or ICMP error.",
			"The endpoint's node: does the SYN arrive there? A NetworkPolicy there; an overloaded listener; an answer that takes another way than through this node."},
		{NoReply, "The datagram left the node and no answer passed it.",
			"The connection is confirmed, and nothing came back.",
			"As for syn-unanswered; or the protocol has no answers."},
		{ResetByEndpoint, "The endpoint reset the connection after it was established.",
			"An RST from the endpoint after an answer.",
			"The application: crashed, out of memory, closed with unread data; an idle timeout of a proxy in the pod."},
		{ResetByClient, "The client reset the connection after it was established.",
			"An RST from the client after an answer.",
			"The client: its own timeout, or it closed with unread data."},
		{EndpointTerminating, "The connection failed at an endpoint that is terminating.",
			"It failed, and the API says that the endpoint is terminating.",
			"A preStop hook that waits until rules everywhere have followed, and a server that finishes what it began."},
		{EndpointGone, "The connection failed at an endpoint that has left the Service meanwhile.",
			"It failed, and the API does not have the endpoint any more; it had it when it was picked.",
			"A rollout or an eviction: kubectl get events. Clients have to connect anew."},
		{RulesBehind, "The connection was sent to an endpoint that had left the Service before.",
			"The endpoint was picked after the state without it had come to this node.",
			"How long syncs take: kptrace status, kubeproxy_sync_proxy_rules_duration_seconds."},
		{AffinityDead, "Session affinity keeps the client at an endpoint that does not work.",
			"The endpoint was chosen by affinity, and the connection failed at it.",
			"The endpoint's readiness: as long as it is ready, the client stays with it. A shorter affinity timeout."},
		{AffinityForgotten, "Session affinity did not hold: the client was sent to another endpoint, since the kernel had forgotten it. The connection need not have failed.",
			"A list of xt_recent keeps the last 100 clients of an endpoint. Within the timeout so many others were sent to the client's endpoint that it fell out, and the next pick was another one.",
			"How many clients an endpoint has: kptrace_affinity_list_entries, kptrace check (affinity-full). More endpoints; xt_recent.ip_list_tot on the kernel's command line, or as the module's option; a mode without such lists (ipvs, nftables)."},
		{ProxyStopped, "The userspace proxy ended, and with it the connection it relayed.", "The proxy said so.", "Why it ended: its log."},
	}
}

// Info returns what there is to say of a Reason.
func (r Reason) Info() (ReasonInfo, bool) {
	all := Reasons()
	i := slices.IndexFunc(all, func(x ReasonInfo) bool { return x.Code == r })
	if i < 0 {
		return ReasonInfo{Code: r}, false
	}
	return all[i], true
}
