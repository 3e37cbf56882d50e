package lab

import (
	"fmt"
	"strings"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// IncidentScenario is the scenario that incidents happen in: healthy, until one
// does.
const IncidentScenario = "incident"

// Incident is a fault that `kptrace lab incident` hides in a lab.
type Incident struct {
	Name string
	// Symptom is what a user is told, and Service the Service that it is about, in
	// namespace shop.
	Symptom, Service string
	// Reason is the code by which kptrace calls failed connections to Service, Check
	// a finding of kptrace check; one of them may be empty.
	Reason trace.Reason
	Check  string
	// Also is true of some of these connections as well, if not empty.
	Also trace.Reason
	// Answer says what was done.
	Answer string
	// Beside says that it happens to a kube-proxy that kptrace only watches.
	Beside bool
	// Once says that only connections fail that are under way or begin while it
	// happens, Late how long after their begin it is known why, if not soon.
	Once bool
	Late time.Duration
	// UnderWay is for how long before it happens connections have begun that fail, if
	// those do that are under way.
	UnderWay time.Duration
	// After is how long connections go on to fail for it when it is undone.
	After time.Duration
	// RulesOf says that it is done to the rules of the iptables mode.
	RulesOf bool

	// Userspace says that it happens to a proxy in userspace mode, which relays
	// connections itself. Who tells of it is gone afterwards, so that it has to be
	// followed while it happens.
	Userspace bool

	do step
	// at are the pods at which tries fail, in userspace mode; empty is anywhere.
	at []string
}

// step is what an incident does, in this order.
type step struct {
	end     bool        // the node's proxy ends; whoever watches it starts it again
	stop    bool        // the kube-proxy beside which kptrace runs
	faults  [][2]string // of pods: kind, pod
	sysctls []setting   // of the node
	noRoute string      // the node's route to this pod goes nowhere
	detour  string      // the node's route to this address leads to foo-3
	mtu     string      // of the node's link to this pod, 1000
	narrow  string      // packets of more than 1000 bytes to this pod vanish
	// link has the first pod answer the second by a link that is not the node's.
	link [2]string
	// oneSided has the node's route to this pod lead to foo-3, but for what has a mark.
	oneSided string
	busy     string     // connections to this endpoint have ports 61000 to 61007 of the node
	crowd    bool       // many clients of Service sticky, in pod batch
	fill     bool       // the node's table of connections is full
	forget   bool       // the node's entries of established connections are deleted
	nft      string     // rules of nf_tables, in a table ip guard
	node     [][]string // arguments of iptables on the node
	first    [][]string // arguments of iptables, which again undoes
	pause    time.Duration
	again    [][]string
	edit     func(manifests string) string
	then     [][2]string // faults of pods a second after the edit
}

// setting is a sysctl of the node: what it is made, and what it was.
type setting struct{ name, value, was string }

// Incidents lists all incidents; numbers begin with 1.
func Incidents() []Incident {
	const foo2 = "10.244.1.22/32"
	iptables := func(lines ...string) (out [][]string) {
		for _, l := range lines {
			out = append(out, strings.Fields(l))
		}
		return out
	}
	return []Incident{
		{Name: "closed-port", Service: "foo", Symptom: "one request in three to http://foo.shop is refused", Reason: trace.EndpointRefused,
			Answer: "Pod foo-2 closed its port and still is ready.", do: step{faults: [][2]string{{FaultRefuse, "shop/foo-2"}}}},
		{Name: "silent-pod", Service: "foo", Symptom: "one request in three to http://foo.shop times out", Reason: trace.SynUnanswered,
			Answer: "Pod foo-2 answers nobody: its routes lead nowhere.", do: step{faults: [][2]string{{FaultBlackhole, "shop/foo-2"}}}},
		{Name: "crash", Service: "foo", Symptom: "some requests to http://foo.shop end in a reset", Reason: trace.ResetByEndpoint,
			Answer: "Pod foo-3 resets each connection once it has read the request.", do: step{faults: [][2]string{{FaultReset, "shop/foo-3"}}}},
		{Name: "policy", Service: "foo", Symptom: "since somebody tightened security, requests to http://foo.shop hang now and then", Reason: trace.DroppedByRule,
			Answer: "A NetworkPolicy, as Calico would write it, drops what goes to foo-2.",
			do:     step{node: iptables("-N cali-tw-foo2", "-A cali-tw-foo2 -j DROP", "-I FORWARD -d "+foo2+" -m conntrack --ctstate NEW -j cali-tw-foo2")}},
		{Name: "firewall", Service: "foo", Symptom: "some requests to http://foo.shop fail at once, and the pods say that they refused nobody", Reason: trace.DroppedByRule,
			Answer: "firewalld refuses what goes to foo-2, in the name of the endpoint.",
			do:     step{node: iptables("-N FWDI_public", "-A FWDI_public -p tcp -j REJECT --reject-with tcp-reset", "-I FORWARD -d "+foo2+" -m conntrack --ctstate NEW -j FWDI_public")}},
		{Name: "docker", Service: "foo", Symptom: "since Docker was installed on the node, pods reach no Service; from outside they work", Reason: trace.PolicyDrop,
			Answer: "Docker set the policy of FORWARD to DROP.", do: step{node: iptables("-N DOCKER", "-P FORWARD DROP")}},
		{Name: "forwarding", Service: "foo", Symptom: "nothing works any more", Reason: trace.NotForwarded,
			Answer: "net.ipv4.ip_forward was set to 0.", do: step{sysctls: []setting{{"net/ipv4/ip_forward", "0", "1"}}}},
		{Name: "selector", Service: "foo", Symptom: "http://foo.shop is refused since the deployment of a new version", Reason: trace.NoEndpoints,
			Answer: "The Service's selector matches no pod: its EndpointSlice is empty.",
			do:     step{edit: endpoints("foo", func(string) string { return "" })}},
		{Name: "probes", Service: "foo", Symptom: "http://foo.shop is refused, and its pods run", Reason: trace.EndpointsNotReady,
			Answer: "All pods of foo fail their readiness probes.",
			do: step{edit: endpoints("foo", func(line string) string {
				return strings.Replace(line, "nodeName", "conditions: {ready: false, serving: false}, nodeName", 1)
			})}},
		{Name: "port-name", Service: "foo", Symptom: "http://foo.shop is refused, and its pods are ready", Reason: trace.PortMismatch,
			Answer: "The port is called web in the EndpointSlice, and http in the Service.",
			do: step{edit: func(s string) string {
				head, tail, _ := strings.Cut(s, "metadata: {name: foo-1, namespace: shop, labels")
				return head + "metadata: {name: foo-1, namespace: shop, labels" + strings.Replace(tail, "{name: http, port: 8080}", "{name: web, port: 8080}", 1)
			}}},
		{Name: "local", Service: "foo", Symptom: "http://foo.shop hangs on this node, and works on others", Reason: trace.NoLocalEndpoints,
			Answer: "internalTrafficPolicy is Local, and no endpoint runs on this node.",
			do: step{edit: func(s string) string {
				s = endpoints("foo", func(line string) string { return strings.Replace(line, "node1", "node2", 1) })(s)
				return strings.Replace(s, "internalTrafficPolicy: Cluster", "internalTrafficPolicy: Local", 1)
			}}},
		{Name: "ranges", Service: "front", Symptom: "http://198.18.0.10 hangs for everybody in the cluster", Reason: trace.SourceRange,
			Answer: "loadBalancerSourceRanges of front were changed to 203.0.113.0/24.",
			do: step{edit: func(s string) string {
				return strings.Replace(s, "loadBalancerSourceRanges: [10.244.0.0/16]", "loadBalancerSourceRanges: [203.0.113.0/24]", 1)
			}}},
		{Name: "hairpin", RulesOf: true, Service: "foo", Symptom: "one request in three that pod foo-1 sends to http://foo.shop hangs, and those of others work", Reason: trace.Hairpin,
			Answer: "A rule before KUBE-POSTROUTING keeps the node from masquerading what a pod sends to itself.",
			do:     step{node: iptables("-t nat -I POSTROUTING -s 10.244.1.21/32 -d 10.244.1.21/32 -j ACCEPT")}},
		{Name: "route", Service: "foo", Symptom: "one request in three to http://foo.shop hangs since the CNI was restarted", Reason: trace.NoRoute,
			Answer: "The node's route to foo-2 is gone.", do: step{noRoute: foo2}},
		{Name: "one-way", Service: "foo", Symptom: "one request in three to http://foo.shop times out, and the pods say that clients come and send nothing", Reason: trace.ReplyLost, Late: 4 * time.Second,
			Answer: "A rule drops what foo-2 answers.",
			do:     step{node: iptables("-I FORWARD -s " + foo2 + " -p tcp --tcp-flags SYN,ACK SYN,ACK -j DROP")}},
		{Name: "two-ways", Service: "foo", Symptom: "one request in three of pod web to http://foo.shop times out, and foo-2 says that web resets it", Reason: trace.ReplyBypassed, Late: 4 * time.Second,
			Answer: "foo-2 has a link of its own to web, by which it answers from its own address, past the node.",
			do:     step{link: [2]string{"shop/foo-2", "shop/web"}}},
		{Name: "one-sided", Service: "foo", Symptom: "since routes of the node were changed, one request in three to http://foo.shop times out", Reason: trace.ReplyRPFilter, Late: 4 * time.Second,
			Answer: "A routing rule leads to foo-2 by the mark that a firewall sets; the node's main table leads elsewhere, and rp_filter, which looks at no mark, is strict.",
			do: step{sysctls: []setting{{"net/ipv4/conf/all/rp_filter", "1", "0"}}, oneSided: "shop/foo-2",
				node: iptables("-t mangle -I PREROUTING -j MARK --or-mark 0x1000")}},
		{Name: "stuck", Service: "sticky", Symptom: "for some clients http://sticky.shop fails always, for others never", Reason: trace.AffinityDead,
			Answer: "Pods foo-1, foo-2 and foo-3 closed their ports; session affinity keeps each client where it was.",
			do:     step{faults: [][2]string{{FaultRefuse, "shop/foo-1"}, {FaultRefuse, "shop/foo-2"}, {FaultRefuse, "shop/foo-3"}}}},
		{Name: "rollout", Service: "foo", Symptom: "during the rollout requests to http://foo.shop fail", Reason: trace.EndpointTerminating,
			Answer: "All pods of foo are terminating; foo-2 closed its port before its last client had gone.",
			do: step{faults: [][2]string{{FaultRefuse, "shop/foo-2"}}, edit: endpoints("foo", func(line string) string {
				return strings.Replace(line, "nodeName", "conditions: {ready: false, serving: true, terminating: true}, nodeName", 1)
			})}},
		{Name: "shadow", RulesOf: true, Service: "front", Symptom: "http://node1:30080 answers nobody outside", Reason: trace.NodePortShadowed, Check: "nodeport-shadowed",
			Answer: "Another program takes port 30080 before the Service can: a DNAT rule at the head of PREROUTING.",
			do:     step{node: iptables("-t nat -I PREROUTING -p tcp -m tcp --dport 30080 -j DNAT --to-destination 10.244.1.99:80")}},
		{Name: "silent-dns", Service: "dns", Symptom: "nobody gets an answer from udp://dns.shop:53", Reason: trace.NoReply, Late: 4 * time.Second,
			Answer: "Pod dns-1 answers nobody: its routes lead nowhere.", do: step{faults: [][2]string{{FaultBlackhole, "shop/dns-1"}}}},
		{Name: "vanished", Service: "foo", Symptom: "one request in three to http://foo.shop finds no route to host", Reason: trace.Unreachable, Late: 6 * time.Second,
			Answer: "Pod foo-2 is no more where the node looks for it: it answers no ARP.", do: step{faults: [][2]string{{FaultVanish, "shop/foo-2"}},
				sysctls: []setting{{"net/ipv4/icmp_ratelimit", "0", "1000"}}}}, // or the node says it to few
		{Name: "impatient", Service: "foo", Symptom: "the pods of foo log resets by one of their clients", Reason: trace.ResetByClient,
			Answer: "Pod batch resets its connections instead of waiting for the answer.", do: step{faults: [][2]string{{FaultAbort, "shop/batch"}}}},
		{Name: "idle", Service: "foo", Symptom: "requests to http://foo.shop on connections that were idle for a while hang", Reason: trace.IdleExpired, Late: 7 * time.Second, After: 5 * time.Second,
			Answer: "nf_conntrack_tcp_timeout_established was set to 1 second.",
			do:     step{sysctls: []setting{{"net/netfilter/nf_conntrack_tcp_timeout_established", "1", "432000"}}}},
		{Name: "guard", Service: "foo", Symptom: "one request in three to http://foo.shop hangs, and iptables-save shows no reason", Reason: trace.DroppedOnNode,
			Answer: "A table of nf_tables that is not of iptables, ip guard, drops what goes to foo-2.",
			do:     step{nft: "chain forward { type filter hook forward priority 10; ip daddr 10.244.1.22 ct state new drop; }"}},
		{Name: "detour", Service: "front", Symptom: "http://node1:30080 answers nobody outside since routes were changed", Reason: trace.RPFilter,
			Answer: "The node's route to the client leads to another interface than it comes in by, and rp_filter is strict.",
			do:     step{sysctls: []setting{{"net/ipv4/conf/all/rp_filter", "1", "0"}}, detour: "172.18.0.100/32"}},
		{Name: "ports", Service: "foo", Symptom: "some requests to http://foo.shop hang when there are many at once", Reason: trace.SourcePorts,
			Answer: "A rule masquerades what goes to foo-2 to eight ports of the node, and connections that last have them all.",
			do:     step{busy: "10.244.1.22:8080", node: iptables("-t nat -I POSTROUTING -p tcp -d " + foo2 + " -j MASQUERADE --to-ports 61000-61007")}},
		{Name: "large", Service: "foo", Symptom: "pod web gets no answer from http://foo.shop when it is a long one", Reason: trace.TooLarge, Late: 4 * time.Second,
			Answer: "The node's link to web has an MTU of 1000, and a rule drops the word about it to the pods.",
			do: step{faults: [][2]string{{FaultLarge, "shop/foo-1"}, {FaultLarge, "shop/foo-2"}, {FaultLarge, "shop/foo-3"}}, mtu: "shop/web",
				node: iptables("-I OUTPUT -p icmp -m icmp --icmp-type fragmentation-needed -j DROP")}},
		{Name: "narrow", Service: "foo", Symptom: "pod web gets no answer from http://foo.shop when it is a long one, and no ICMP error is seen anywhere", Reason: trace.LargeUnacknowledged, Late: 7 * time.Second,
			Answer: "Behind the node's link to web packets of more than 1000 bytes vanish without a word.",
			do:     step{faults: [][2]string{{FaultLarge, "shop/foo-1"}, {FaultLarge, "shop/foo-2"}, {FaultLarge, "shop/foo-3"}}, narrow: "shop/web"}},
		{Name: "bypass", RulesOf: true, Service: "foo", Symptom: "for a moment requests to http://foo.shop hung", Reason: trace.Untranslated, Once: true,
			Answer: "For a second a rule of nat let packets to foo pass before the rules of Services saw them; connections that began meanwhile go on to the address of the Service itself.",
			do:     step{first: iptables("-t nat -I PREROUTING -d 10.96.0.10/32 -j ACCEPT"), pause: time.Second, again: iptables("-t nat -D PREROUTING -d 10.96.0.10/32 -j ACCEPT")}},
		{Name: "forgotten", Service: "foo", Symptom: "requests on some connections to http://foo.shop that were open for a while ended in a reset, once", Reason: trace.EntryLost, Once: true, Late: 5 * time.Second,
			Answer: "Somebody deleted the node's entries of established connections.",
			do:     step{forget: true}},
		{Name: "invalid", RulesOf: true, Service: "foo", Symptom: "requests on some connections to http://foo.shop that were open for a while hung, once", Reason: trace.InvalidDropped, Once: true, Late: 5 * time.Second, UnderWay: 4 * time.Second, After: 8 * time.Second,
			Answer: "nf_conntrack_tcp_loose was set to 0, and somebody deleted the node's entries of established connections: what belongs to these is INVALID, and dropped.",
			do:     step{sysctls: []setting{{"net/netfilter/nf_conntrack_tcp_loose", "0", "1"}}, forget: true}},
		{Name: "eviction", Service: "foo", Symptom: "for a moment requests to http://foo.shop hung", Reason: trace.EndpointGone, Also: trace.RulesBehind, Once: true,
			Answer: "Pods foo-2 and foo-3 died; until the API said so connections were still sent to them.",
			do:     step{faults: [][2]string{{FaultBlackhole, "shop/foo-2"}, {FaultBlackhole, "shop/foo-3"}}, pause: 600 * time.Millisecond, edit: endpoints("foo", only("foo-1"))}},
		{Name: "crowd", RulesOf: true, Service: "sticky", Symptom: "since the shop has many customers, their carts at http://sticky.shop are empty now and then", Reason: trace.AffinityForgotten, Check: "affinity-full",
			Answer: "Session affinity keeps 100 clients for each endpoint, and there are 390 that come again and again.",
			do:     step{crowd: true}},
		{Name: "kept", Service: "dns", Symptom: "since dns-1 was replaced, some clients of udp://dns.shop:53 that never pause hear nothing", Reason: trace.StaleEntry, Also: trace.RulesBehind, Beside: true, Once: true, Late: 5 * time.Second,
			Answer: "kube-proxy hangs, so that nobody deletes the entries that lead to dns-1, which has gone.",
			do: step{stop: true, pause: time.Second, then: [][2]string{{FaultBlackhole, "shop/dns-1"}}, edit: endpoints("dns", func(line string) string {
				return strings.ReplaceAll(strings.Replace(line, "10.244.1.41", "10.244.1.42", 1), "dns-1", "dns-2")
			})}},
		{Name: "full", Service: "foo", Symptom: "no new connections get anywhere, and those that are open work", Reason: trace.ConntrackFull, Check: "conntrack-full", Late: 3 * time.Second, After: 4 * time.Second,
			Answer: "The node's table of connections is full of connections that somebody opened and never ended.",
			do:     step{fill: true}},
		{Name: "stopped", Service: "foo", Symptom: "since the rollout two requests in three to http://foo.shop are refused", Reason: trace.RulesBehind, Check: "endpoint-gone", Beside: true,
			Answer: "kube-proxy hangs: its rules still lead to foo-2 and foo-3, which are no endpoints any more.",
			do:     step{stop: true, faults: [][2]string{{FaultRefuse, "shop/foo-2"}, {FaultRefuse, "shop/foo-3"}}, edit: endpoints("foo", only("foo-1"))}},
		{Name: "restart", Service: "foo", Symptom: "this morning some requests to http://foo.shop that take long ended in the middle, all at once", Reason: trace.ProxyStopped, Userspace: true, Once: true,
			Answer: "The proxy was restarted. In userspace mode it relays connections itself, and those that lasted for longer than it waits (--userspace-drain) ended with it.",
			do:     step{end: true}},
	}
}

// FindIncident finds an incident by its number or name.
func FindIncident(s string) (n int, in Incident, err error) {
	all := Incidents()
	for i := range all {
		if s == fmt.Sprint(i+1) || s == all[i].Name {
			return i + 1, all[i], nil
		}
	}
	return 0, Incident{}, fmt.Errorf("lab: no incident %q: there are 1 to %d", s, len(all))
}

// only keeps the endpoint line of a pod.
func only(pod string) func(string) string {
	return func(line string) string {
		if strings.Contains(line, "name: "+pod+",") {
			return line
		}
		return ""
	}
}

// endpoints edits each endpoint line of a Service's slice; an empty line takes it
// away.
func endpoints(service string, f func(line string) string) func(string) string {
	return func(s string) string {
		var out []string
		in, listed := false, 0
		for _, line := range strings.Split(s, "\n") {
			if strings.HasPrefix(line, "---") {
				in = false
			}
			if strings.Contains(line, "kubernetes.io/service-name: "+service+"}") {
				in = true
			}
			if in && strings.HasPrefix(line, "- {addresses") {
				if line = f(line); line == "" {
					continue
				}
				listed++
			}
			out = append(out, line)
		}
		text := strings.Join(out, "\n")
		if listed == 0 { // a list without entries
			i := strings.Index(text, "kubernetes.io/service-name: "+service+"}")
			return text[:i] + strings.Replace(text[i:], "endpoints:", "endpoints: []", 1)
		}
		return text
	}
}
