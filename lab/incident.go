package lab

import (
	"fmt"
	"strings"

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
	// Reason is the code by which kptrace calls failed connections to Service, or
	// Check the finding of kptrace check where there are no such connections.
	Reason trace.Reason
	Check  string
	// Answer says what was done.
	Answer string

	do step
}

// step is what an incident does: faults of pods, commands on the node, settings
// of the node, edits of the manifests, a route of the node that goes nowhere.
type step struct {
	faults  [][2]string // kind, pod
	node    [][]string  // arguments of iptables
	sysctls [][2]string
	edit    func(manifests string) string
	noRoute string // a pod's address
}

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
			Answer: "Docker set the policy of FORWARD to DROP.", do: step{node: iptables("-P FORWARD DROP")}},
		{Name: "forwarding", Service: "foo", Symptom: "nothing works any more", Reason: trace.NotForwarded,
			Answer: "net.ipv4.ip_forward was set to 0.", do: step{sysctls: [][2]string{{"net/ipv4/ip_forward", "0"}}}},
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
		{Name: "hairpin", Service: "foo", Symptom: "one request in three that pod foo-1 sends to http://foo.shop hangs, and those of others work", Reason: trace.Hairpin,
			Answer: "A rule before KUBE-POSTROUTING keeps the node from masquerading what a pod sends to itself.",
			do:     step{node: iptables("-t nat -I POSTROUTING -s 10.244.1.21/32 -d 10.244.1.21/32 -j ACCEPT")}},
		{Name: "route", Service: "foo", Symptom: "one request in three to http://foo.shop hangs since the CNI was restarted", Reason: trace.NoRoute,
			Answer: "The node's route to foo-2 is gone.", do: step{noRoute: foo2}},
		{Name: "one-way", Service: "foo", Symptom: "one request in three to http://foo.shop times out, and the pods say that clients come and send nothing", Reason: trace.ReplyLost,
			Answer: "A rule drops what foo-2 answers.",
			do:     step{node: iptables("-I FORWARD -s " + foo2 + " -p tcp --tcp-flags SYN,ACK SYN,ACK -j DROP")}},
		{Name: "stuck", Service: "sticky", Symptom: "for some clients http://sticky.shop fails always, for others never", Reason: trace.AffinityDead,
			Answer: "Pods foo-1, foo-2 and foo-3 closed their ports; session affinity keeps each client where it was.",
			do:     step{faults: [][2]string{{FaultRefuse, "shop/foo-1"}, {FaultRefuse, "shop/foo-2"}, {FaultRefuse, "shop/foo-3"}}}},
		{Name: "rollout", Service: "foo", Symptom: "during the rollout requests to http://foo.shop fail", Reason: trace.EndpointTerminating,
			Answer: "All pods of foo are terminating; foo-2 closed its port before its last client had gone.",
			do: step{faults: [][2]string{{FaultRefuse, "shop/foo-2"}}, edit: endpoints("foo", func(line string) string {
				return strings.Replace(line, "nodeName", "conditions: {ready: false, serving: true, terminating: true}, nodeName", 1)
			})}},
		{Name: "shadow", Service: "front", Symptom: "http://node1:30080 answers nobody outside, and kptrace follow shows none of them", Check: "nodeport-shadowed",
			Answer: "Another program takes port 30080 before the Service can: a DNAT rule at the head of PREROUTING.",
			do:     step{node: iptables("-t nat -I PREROUTING -p tcp -m tcp --dport 30080 -j DNAT --to-destination 10.244.1.99:80")}},
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
