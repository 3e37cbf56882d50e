package text

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Why says in a few words why the backend was chosen, or why none was.
func Why(f *trace.Flow) string {
	d := &f.Decision
	if f.Direct() {
		return "none: the client dialled the endpoint itself"
	}
	if f.Outcome == trace.Rejected || f.Outcome == trace.Dropped {
		return reasonWords(f.Reason) + excluded(d.Excluded)
	}
	if !d.Known {
		note := d.Note
		if f.Existing {
			note = cmp.Or(note, "before start")
		}
		return "unknown (" + cmp.Or(note, "no evidence") + ")"
	}
	var parts []string
	switch d.Affinity {
	case trace.AffinityHit:
		hit := "affinity hit"
		if left := d.AffinityTimeout - d.AffinityAge; d.AffinityTimeout > 0 && left >= 0 {
			hit += ", " + Duration(left) + " left"
		}
		parts = append(parts, hit)
	case trace.AffinityExpired:
		parts = append(parts, "affinity expired after "+Duration(d.AffinityAge), choice(d))
	case trace.AffinityNew, trace.AffinityEvicted, trace.AffinityReset:
		parts = append(parts, "affinity "+string(d.Affinity), choice(d))
	default:
		parts = append(parts, choice(d))
	}
	if n := len(f.Attempts); n > 1 {
		parts = append(parts, fmt.Sprintf("retry %d", n-1))
	}
	switch d.Policy {
	case "", "Cluster":
	case "Local":
		parts = append(parts, "local endpoints only")
	case "terminating":
		parts = append(parts, "terminating endpoints only")
	default:
		parts = append(parts, "policy "+d.Policy)
	}
	switch d.Masquerade {
	case "", "no":
	case "marked":
		parts = append(parts, "masqueraded")
	case "relay":
		parts = append(parts, "relayed by the proxy")
	default:
		parts = append(parts, "masqueraded ("+d.Masquerade+")")
	}
	text := strings.Join(parts, ", ")
	if d.Note != "" {
		text += " (" + d.Note + ")"
	}
	return text
}

// choice says how one endpoint was picked of how many.
func choice(d *trace.Decision) string {
	x := excluded(d.Excluded)
	if d.Forwarding > trace.ForwardNAT {
		x += ", by " + d.Forwarding.String()
	}
	switch {
	case d.Mode == proxy.IPVS && d.Candidates > 1:
		if d.Load != nil && d.Load.Picked >= 0 {
			return schedulerWords(d.Algorithm) + ": " + loadWords(d.Load) + ", sampled" + x
		}
		return fmt.Sprintf("%s, 1 of %d%s", schedulerWords(d.Algorithm), d.Candidates, x)
	case d.Candidates == 1:
		return "only endpoint" + x
	case d.Candidates == 0:
		return cmp.Or(strings.ReplaceAll(d.Algorithm, "-", " "), "picked") + x
	case d.Probability > 0:
		return fmt.Sprintf("%s %s, 1 of %d%s", d.Algorithm, percent(d.Probability), d.Candidates, x)
	}
	return fmt.Sprintf("%s, 1 of %d%s", cmp.Or(strings.ReplaceAll(d.Algorithm, "-", " "), "picked"), d.Candidates, x)
}

// schedulerWords is an IPVS scheduler's name in few words.
func schedulerWords(name string) string {
	switch name {
	case "rr":
		return "round robin"
	case "wrr":
		return "weighted round robin"
	case "lc":
		return "least-conn"
	case "wlc":
		return "weighted least-conn"
	case "sh":
		return "source hash"
	case "dh":
		return "destination hash"
	case "mh":
		return "maglev hash"
	case "sed":
		return "shortest expected delay"
	case "nq":
		return "never queue"
	case "lblc":
		return "locality least-conn"
	case "lblcr":
		return "locality least-conn with replication"
	case "fo":
		return "failover"
	case "ovf":
		return "overflow"
	}
	return cmp.Or(name, "picked")
}

// loadWords is "2 of [2 5 7]": the picked server's established connections and
// those of all; "2/3 of [2/3 5/1]" with their weights where these differ.
func loadWords(l *trace.Load) string {
	weighted := false
	for _, s := range l.Servers {
		weighted = weighted || s.Weight != l.Servers[0].Weight
	}
	number := func(s trace.ServerLoad) string {
		if weighted {
			return fmt.Sprintf("%d/%d", s.Active, s.Weight)
		}
		return fmt.Sprint(s.Active)
	}
	all := make([]string, len(l.Servers))
	for i, s := range l.Servers {
		all[i] = number(s)
	}
	if len(all) > 8 {
		all = append(all[:8], "…")
	}
	return number(l.Servers[l.Picked]) + " of [" + strings.Join(all, " ") + "]"
}

// excluded is " (1 not ready, 2 terminating)", or empty.
func excluded(x proxy.Excluded) string {
	var parts []string
	for _, p := range []struct {
		n    int
		word string
	}{
		{x.NotReady, "not ready"}, {x.Terminating, "terminating"}, {x.OtherZone, "in other zones"},
		{x.NotLocal, "not local"}, {x.Overlay, "taken out"},
	} {
		if p.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", p.n, p.word))
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return " (" + strings.Join(parts, ", ") + ")"
}

func reasonWords(r trace.Reason) string {
	switch r {
	case trace.DroppedByRule:
		return "by a rule"
	case trace.PolicyDrop:
		return "by the policy of a chain"
	case trace.ConntrackFull:
		return "the table of connections is full"
	case trace.SourceRange:
		return "outside the source ranges"
	case trace.PortMismatch:
		return "no endpoints for a port of this name"
	case trace.EndpointsNotReady:
		return "no endpoint is ready"
	}
	return cmp.Or(strings.ReplaceAll(string(r), "-", " "), "by a rule")
}

// because says what is known of a failure beside how it looked from outside.
func because(f *trace.Flow) string {
	text := ""
	switch f.Reason {
	case trace.DroppedByRule, trace.PolicyDrop:
		text = "dropped on the node " + reasonWords(f.Reason)
	case trace.NotForwarded:
		text = "the node does not forward"
	case trace.NoRoute:
		text = "the node has no route"
	case trace.DroppedOnNode:
		text = "dropped on the node"
	case trace.RPFilter:
		text = "dropped by strict reverse path filtering"
	case trace.SourcePorts:
		text = "no source port was left"
	case trace.TooLarge:
		text = "large packets do not get through"
	case trace.LargeUnacknowledged:
		text = "large packets were never acknowledged"
	case trace.EntryLost:
		text = "its entry was lost"
	case trace.StaleEntry:
		text = "kept there by an old entry"
	case trace.NodePortShadowed:
		text = "sent elsewhere by another rule"
	case trace.ReplyLost:
		text = "the endpoint answered, the answer was lost"
	case trace.ReplyRPFilter:
		text = "the answer was dropped by strict reverse path filtering"
	case trace.ReplyBypassed:
		text = "the answer did not pass this node's translation"
	case trace.Hairpin:
		text = "hairpin without masquerade"
	case trace.Untranslated:
		text = "not translated"
	case trace.IdleExpired:
		text = "entry expired"
	case trace.EndpointTerminating:
		text = "the endpoint is terminating"
	case trace.EndpointGone:
		text = "the endpoint has gone"
	case trace.RulesBehind:
		text = "rules behind the API"
	case trace.AffinityDead:
		text = "kept there by affinity"
	case trace.ConntrackFull:
		if f.Cause == "" {
			return ""
		}
		return "; " + f.Cause
	case trace.AffinityForgotten:
		text = "affinity was forgotten"
	default:
		return ""
	}
	if f.Cause != "" && f.Reason != trace.AffinityDead {
		text += ": " + f.Cause
	}
	return "; " + text
}

// Result says in a few words what became of the connection. The time now is
// for the age of those still open.
func Result(f *trace.Flow, now time.Time) string {
	text := outcomeWords(f, now) + because(f)
	if f.Incomplete {
		text += " (events were lost meanwhile)"
	}
	return text
}

func outcomeWords(f *trace.Flow, now time.Time) string {
	udp := f.Tuple.Proto() == conntrack.UDP
	switch f.Outcome {
	case trace.Pending:
		return "no answer yet"
	case trace.Open:
		if f.Existing {
			return "open " + Duration(now.Sub(f.Start))
		}
		return answered(f, udp)
	case trace.Closed:
		end := "closed"
		if f.Duration >= 0 {
			end += " " + Duration(f.Duration)
		}
		if udp {
			end = "idle"
			if f.Duration >= 0 {
				end += ", lasted " + Duration(f.Duration)
			}
		}
		if a := answered(f, udp); a != "open" {
			end = a + " · " + end
		}
		return end + traffic(f)
	case trace.Refused:
		a := lastAttempt(f)
		switch {
		case f.Reason == trace.Unreachable:
			return cmp.Or(a.ICMP, "unreachable")
		case a.ICMP != "":
			return "refused by endpoint (" + a.ICMP + ")"
		}
		return "refused by endpoint"
	case trace.Reset:
		who := ""
		switch f.Reason {
		case trace.ResetByEndpoint:
			who = " by endpoint"
		case trace.ResetByClient:
			who = " by client"
		case trace.ProxyStopped:
			who = " by the proxy, which stopped,"
		}
		text := "reset" + who
		if f.Duration >= 0 {
			text += " after " + Duration(f.Duration)
		}
		return text + traffic(f)
	case trace.Unanswered:
		if udp {
			return "no answer yet" + icmp(f)
		}
		return "no answer yet, " + plural(lastAttempt(f).Retransmits, "retransmit") + icmp(f)
	case trace.Timeout:
		if udp {
			return "timeout, never answered" + icmp(f)
		}
		return "timeout after " + plural(lastAttempt(f).Retransmits+1, "SYN") + icmp(f)
	case trace.Rejected:
		return "rejected: " + reasonWords(f.Reason)
	case trace.Dropped:
		return "dropped: " + reasonWords(f.Reason)
	case trace.Unknown:
		return "unknown: " + cmp.Or(f.Missing, "evidence is missing")
	}
	return string(f.Outcome)
}

// answered says how long the answer took, "open" where that is unknown.
func answered(f *trace.Flow, udp bool) string {
	if f.Established < 0 {
		return "open"
	}
	text := "established " + Duration(f.Established)
	if udp {
		text = "answered " + Duration(f.Established)
	}
	switch failed := len(f.Attempts) - 1; {
	case failed == 1:
		text += " after 1 failed try"
	case failed > 1:
		text += fmt.Sprintf(" after %d failed tries", failed)
	}
	if n := lastAttempt(f).Retransmits; n > 0 && !udp {
		text += ", " + plural(n, "retransmit")
	}
	return text
}

func traffic(f *trace.Flow) string {
	if !f.Counted {
		return ""
	}
	return " ↑" + Bytes(f.Out.Bytes) + " ↓" + Bytes(f.In.Bytes)
}

func icmp(f *trace.Flow) string {
	if a := lastAttempt(f); a.ICMP != "" {
		return " (" + a.ICMP + ")"
	}
	return ""
}

func lastAttempt(f *trace.Flow) trace.Attempt {
	if len(f.Attempts) == 0 {
		return trace.Attempt{Latency: -1}
	}
	return f.Attempts[len(f.Attempts)-1]
}

// clientName is "shop/web-7f9:40312", "node1:40312" or the address.
func clientName(p *trace.Peer) string {
	switch {
	case p.Pod != "":
		return fmt.Sprintf("%s/%s:%d", p.Namespace, p.Pod, p.Addr.Port())
	case p.Node != "":
		return fmt.Sprintf("%s:%d", p.Node, p.Addr.Port())
	}
	return addrPort(p.Addr)
}

// backendName is "foo-5c:8080 (node2)", with the namespace if it is not the
// Service's, "foo-5c → foo-9d" after retries, or the address.
func backendName(f *trace.Flow) string {
	short := func(p *trace.Peer) string {
		switch {
		case p.Pod == "":
			return addr(p.Addr)
		case p.Namespace != f.Service.Name.Namespace:
			return p.Namespace + "/" + p.Pod
		}
		return p.Pod
	}
	if f.Backend == (trace.Peer{}) {
		return "-"
	}
	if f.Retried() {
		names := make([]string, len(f.Attempts))
		for i := range f.Attempts {
			names[i] = short(&f.Attempts[i].Endpoint)
		}
		return strings.Join(names, " → ")
	}
	if f.Backend.Pod == "" {
		return addrPort(f.Backend.Addr)
	}
	text := fmt.Sprintf("%s:%d", short(&f.Backend), f.Backend.Addr.Port())
	if f.Backend.Node != "" {
		text += " (" + f.Backend.Node + ")"
	}
	return text
}

// serviceName is "shop/foo:http", and how it was dialled if not by ClusterIP.
func serviceName(f *trace.Flow) string {
	text := f.Service.Name.String()
	if f.Service.Via != "" && f.Service.Via != proxy.ViaClusterIP {
		text += " " + string(f.Service.Via)
	}
	return text
}
