package text

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// Detail writes all that is known of one flow, for people. The time now is for
// the age of an open one; loc is the zone in which times are told.
func Detail(w io.Writer, f *trace.Flow, now time.Time, loc *time.Location) error {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		if text := clean(fmt.Sprintf(format, args...)); text != "" {
			fmt.Fprintf(&b, "%-13s %s\n", name, text)
		}
	}
	stamp := func(t time.Time) string { return t.In(loc).Format("2006-01-02 15:04:05.000000") }
	line("flow", "%s (revision %d) on %s", f.ID, f.Revision, f.Node)
	line("began", "%s", stamp(f.Start))
	line("result", "%s", Result(f, now))
	line("outcome", "%s%s", f.Outcome, paren(string(f.Reason)))
	line("cause", "%s", f.Cause)
	if info, ok := f.Reason.Info(); ok {
		line("meaning", "%s", info.Sentence)
		line("look at", "%s", info.Next)
	}
	if !f.Ended {
		line("", "not ended")
	}
	line("missing", "%s", f.Missing)
	b.WriteString("\n")
	line("client", "%s", peerText(&f.Client))
	line("service", "%s at %s%s", f.Service.Name, addrPort(f.Service.Addr), paren(string(f.Service.Via)))
	if f.Backend != (trace.Peer{}) {
		line("backend", "%s", peerText(&f.Backend))
	}
	line("why", "%s", Why(f))
	detailDecision(line, f)
	b.WriteString("\n")
	for i := range f.Attempts {
		a := &f.Attempts[i]
		text := fmt.Sprintf("%s  %s at %s", a.Outcome, peerText(&a.Endpoint), a.Start.In(loc).Format("15:04:05.000000"))
		if a.Latency >= 0 {
			text += ", answer after " + Duration(a.Latency)
		}
		if a.Retransmits > 0 {
			text += ", " + plural(a.Retransmits, "retransmit")
		}
		if a.ICMP != "" {
			text += ", " + a.ICMP
		}
		if a.Reason != trace.NoReason {
			text += "; " + string(a.Reason)
		}
		if a.Cause != "" {
			text += ": " + a.Cause
		}
		line(fmt.Sprintf("attempt %d", i+1), "%s", text)
	}
	if f.Established >= 0 {
		line("established", "%s after the first packet", Duration(f.Established))
	}
	if f.Duration >= 0 {
		line("lasted", "%s", Duration(f.Duration))
	}
	if f.Counted {
		line("sent", "%s in %s", Bytes(f.Out.Bytes), plural(f.Out.Packets, "packet"))
		line("received", "%s in %s", Bytes(f.In.Bytes), plural(f.In.Packets, "packet"))
	}
	line("conntrack", "%s", f.Tuple)
	if !f.Reply.IsZero() {
		line("", "answered as %s", f.Reply)
	}
	if f.CTID != 0 {
		line("", "id %d", f.CTID)
	}
	if f.IPVSState != 0 {
		line("ipvs", "state %s, as last sampled", f.IPVSState)
	}
	line("evidence", "%s", strings.Join(f.Evidence.Names(), ", "))
	if f.Incomplete {
		line("", "events were lost while it lasted: something may be missing here")
	}
	if f.Existing {
		line("", "older than kptrace: how its endpoint was chosen was not seen")
	}
	if len(f.Paths) > 0 {
		line("path", "%s", "")
		for i := range f.Paths {
			b.WriteString(Tree(&f.Paths[i]))
		}
	}
	_, err := io.WriteString(w, strings.ReplaceAll(b.String(), "\n\n\n", "\n\n"))
	return err
}

func detailDecision(line func(string, string, ...any), f *trace.Flow) {
	d := &f.Decision
	if !d.Known {
		return
	}
	line("  mode", "%s", d.Mode)
	if d.Candidates > 0 {
		line("  algorithm", "%s among %s%s", d.Algorithm, plural(d.Candidates, "candidate"), excluded(d.Excluded))
	}
	if d.Load != nil {
		line("  load", "sampled %s before the pick: active / other connections, weight", Duration(d.Load.Age))
		for i, s := range d.Load.Servers {
			mark := ""
			if i == d.Load.Picked {
				mark = "  picked"
			}
			line("", "%s  %d / %d, %d%s", s.Addr, s.Active, s.Inactive, s.Weight, mark)
		}
	}
	if d.Forwarding != trace.ForwardUnknown {
		line("  forwarding", "%s", d.Forwarding)
	}
	if d.Probability > 0 {
		line("  chance", "%s", percent(d.Probability))
	}
	line("  policy", "%s", d.Policy)
	switch {
	case d.AffinityTimeout == 0:
	case d.Affinity == trace.AffinityHit || d.Affinity == trace.AffinityExpired:
		line("  affinity", "%s: the client came %s ago, the timeout is %s", d.Affinity, Duration(d.AffinityAge), Duration(d.AffinityTimeout))
	case d.Affinity != "":
		line("  affinity", "%s, the timeout is %s", d.Affinity, Duration(d.AffinityTimeout))
	}
	line("  masquerade", "%s", d.Masquerade)
	if d.SourceSeen.IsValid() {
		line("  seen as", "%s by the backend", d.SourceSeen)
	}
}

// peerText is "10.244.1.5:40312  pod shop/web-7f9 of Deployment/web on node1".
func peerText(p *trace.Peer) string {
	text := addrPort(p.Addr)
	if p.Pod != "" {
		text += fmt.Sprintf("  pod %s/%s", p.Namespace, p.Pod)
	}
	if p.Workload != "" {
		text += " of " + p.Workload
	}
	switch {
	case p.Node != "" && p.Pod != "":
		text += " on " + p.Node
	case p.Node != "":
		text += "  node " + p.Node
	}
	return text
}

func paren(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}
