package node

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
	"github.com/kptrace/kptrace/trace/correlate"
)

const (
	// inquiries bounds the flows that wait to be looked into; what finds no room
	// keeps the reason it has.
	inquiries = 256
	// rulesFor is how long live rules that were read serve for further flows.
	rulesFor = 2 * time.Second
)

// inquirer finds out why first packets did not leave the node: it walks them
// through the live rules. It runs beside the correlator and never delays it.
type inquirer struct {
	flows chan *trace.Flow
	views func() []*proxy.View
	do    func(context.Context, func(*correlate.Correlator)) error

	state *check.State
	rules *liverules.Program
	read  time.Time
}

func newInquirer(views func() []*proxy.View, do func(context.Context, func(*correlate.Correlator)) error) *inquirer {
	return &inquirer{flows: make(chan *trace.Flow, inquiries), views: views, do: do}
}

// ask takes a flow, if there is room.
func (q *inquirer) ask(f *trace.Flow) {
	select {
	case q.flows <- f:
	default:
	}
}

// run looks into flows until ctx ends.
func (q *inquirer) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case f := <-q.flows:
			reason, cause := q.why(ctx, f)
			if reason == trace.NoReason && cause == "" {
				continue
			}
			err := q.do(ctx, func(c *correlate.Correlator) { c.Explain(f.ID, f.Tuple, reason, cause) })
			if err != nil && ctx.Err() != nil {
				return nil
			}
		}
	}
}

// why walks a flow's first packet. An empty reason with a cause says why there is
// none.
func (q *inquirer) why(ctx context.Context, f *trace.Flow) (reason trace.Reason, cause string) {
	if v, err := readSysctl("net/ipv4/ip_forward"); err == nil && v == "0" && f.Tuple.Is4() && f.Backend.Addr.IsValid() && deviceTo(f.Backend.Addr.Addr()) != "" {
		return trace.NotForwarded, "net.ipv4.ip_forward is 0"
	}
	if f.Reason == trace.Unreachable { // said the node itself
		if deviceTo(f.Backend.Addr.Addr()) == "" {
			return trace.NoRoute, ""
		}
		return trace.NoReason, ""
	}
	if err := q.refresh(ctx, f.Start); err != nil {
		return trace.NoReason, "the live rules cannot be read"
	}
	src := f.Tuple.Src()
	pkt := proxy.Packet{Proto: f.Tuple.Proto(), Src: src, Dst: f.Tuple.Dst(), FromNode: slices.Contains(q.state.Addrs, src.Addr())}
	if !pkt.FromNode {
		pkt.In = deviceTo(src.Addr())
	}
	var stop *liverules.Way
	passes := false
	for _, w := range q.rules.Ways(pkt) {
		if f.Backend.Addr.IsValid() && w.Endpoint != f.Backend.Addr {
			continue
		}
		if (w.Verdict == proxy.Drop || w.Verdict == proxy.Reject) && !w.Unsure {
			stop = &w
		} else {
			passes = true
		}
	}
	switch {
	case stop == nil && f.Backend.Addr.IsValid() && deviceTo(f.Backend.Addr.Addr()) == "" && !slices.Contains(q.state.Addrs, f.Backend.Addr.Addr()):
		return trace.NoRoute, ""
	case stop == nil && f.Reason == trace.DroppedByRule: // the node answered, by a rule that was not found
		return trace.NoReason, "the node itself refused it; no rule that is there now explains it"
	case stop == nil:
		return trace.NoReason, "the live rules would have let it through"
	case passes && f.Reason != trace.DroppedByRule:
		return trace.NoReason, "perhaps by " + lastStep(stop) + ", which could not be evaluated"
	case stop.Reason == "policy-drop":
		return trace.PolicyDrop, lastStep(stop)
	}
	return trace.DroppedByRule, lastStep(stop)
}

// lastStep names the rule or policy at which a way ends, and whose it is.
func lastStep(w *liverules.Way) string {
	s := w.Steps[len(w.Steps)-1]
	if s.Rule == nil {
		return fmt.Sprintf("the policy of %s/%s", s.Table, s.Chain)
	}
	text := fmt.Sprintf("rule %d of %s/%s", s.Index, s.Table, s.Chain)
	if w.Owner != "" {
		text += " (" + w.Owner + ")"
	}
	return text + ": " + s.Rule.String()
}

// refresh reads the live rules, unless it has just done so, and since the flow
// began.
func (q *inquirer) refresh(ctx context.Context, began time.Time) error {
	if q.rules != nil && time.Since(q.read) < rulesFor && q.read.After(began) {
		return nil
	}
	s, _, err := Inspect(ctx)
	if err != nil {
		return err
	}
	var rulesets []*xtables.Ruleset
	for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		for _, d := range s.Dumps {
			if d.Family == fa && len(xtables.LiveKube(d.Rules)) > 0 {
				rulesets = append(rulesets, d.Rules)
				break
			}
		}
	}
	q.state, q.rules, q.read = s, liverules.New(liverules.Config{Addrs: s.Addrs, Route: route}, rulesets...), s.Now
	return nil
}
