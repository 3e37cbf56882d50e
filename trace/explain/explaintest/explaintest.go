// Package explaintest holds what was observed of packets against what was predicted.
package explaintest

import (
	"fmt"
	"math"
	"net/netip"
	"strings"

	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
)

// Odds are those of an Answer's endpoints, and why they cannot be right, "" if nothing
// speaks against them.
func Odds(a *explain.Answer) (odds map[netip.AddrPort]float64, why string) {
	odds = map[netip.AddrPort]float64{}
	if len(a.Cases) != 1 {
		return odds, fmt.Sprintf("%d cases instead of one", len(a.Cases))
	}
	c := &a.Cases[0]
	if len(c.If) > 0 {
		return odds, fmt.Sprintf("it depends on %v", c.If)
	}
	for i := range c.Choices {
		odds[c.Choices[i].Endpoint.Addr] += c.Choices[i].Probability
	}
	if sum := c.Odds(); math.Abs(sum-1) > 1e-8 {
		return odds, fmt.Sprintf("odds add up to %v", sum)
	}
	return odds, ""
}

// Differs holds an observed path against a prediction: given the endpoint that was
// picked, it must have met the rules predicted, in their order, each where it was
// predicted and with the effect that was. "" is agreement. With numbers the rules'
// numbers in their chains must be the same too.
func Differs(a *explain.Answer, seen *trace.Path, numbers bool) string {
	if _, why := Odds(a); why != "" {
		return why
	}
	ways := a.Cases[0].Ways
	ep := seen.Endpoint()
	if ep.IsValid() {
		ways = nil
		for _, c := range a.Cases[0].Choices {
			if c.Endpoint.Addr == ep {
				ways = c.Ways
			}
		}
		if ways == nil {
			return fmt.Sprintf("it went to %s, which is no choice", ep)
		}
	}
	switch len(ways) {
	case 0:
		return "it reached no endpoint, which was not predicted"
	case 1:
	default:
		return fmt.Sprintf("%d ways are predicted instead of one", len(ways))
	}
	want := &ways[0].Path
	if at, same := want.SameRules(seen); !same {
		return fmt.Sprintf("the ways differ at step %d\npredicted:\n%sobserved:\n%s", at, steps(want, at), steps(seen, at))
	}
	if x, y := rules(want), rules(seen); numbers {
		for i := range min(len(x), len(y)) {
			if x[i].Rule != y[i].Rule || x[i].Target != y[i].Target {
				return fmt.Sprintf("rule %d of %s %s to %q was predicted, rule %d (handle %d) to %q met: %s",
					x[i].Rule, x[i].Table, x[i].Chain, x[i].Target, y[i].Rule, y[i].Handle, y[i].Target, x[i].Text)
			}
		}
	}
	return ""
}

// rules are the hops of rules.
func rules(p *trace.Path) (out []trace.Hop) {
	for _, h := range p.Hops {
		if h.Kind == trace.HopRule && !h.Bridge() {
			out = append(out, h)
		}
	}
	return out
}

// steps prints steps around one.
func steps(p *trace.Path, around int) string {
	var b strings.Builder
	for i, s := range p.Steps() {
		if i >= around-2 && i <= around+2 {
			fmt.Fprintf(&b, "  %d %+v\n", i, s)
		}
	}
	return b.String()
}
