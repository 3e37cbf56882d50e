// Package explain predicts the way of a packet: every endpoint it can reach,
// with what odds and by which rules, and what is not certain. It makes the same
// trace.Path of rules that tracing makes of packets, so that the two can be
// compared.
//
// It is pure. [Outcome] explains what a mode's own Program says, [Live] what
// rules say that iptables-save printed, whoever wrote them.
package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
)

// Answer is what would become of one packet.
type Answer struct {
	// Rules says where the rules are from, for people.
	Rules  string
	Packet proxy.Packet
	// From and To name the packet's ends where they are known.
	From trace.Peer
	// Cases are what may be, by what could not be evaluated before the endpoint
	// was picked. Mostly there is one, without conditions.
	Cases []Case
	// Notes are what a reader has to know, in sentences without full stop.
	Notes []string
}

// Case is what holds under some conditions.
type Case struct {
	If      []Condition
	Service proxy.PortName
	Via     proxy.Via
	Mode    proxy.Mode
	// Algorithm, Policy and Affinity are as in proxy.Outcome.
	Algorithm, Policy string
	Affinity          time.Duration
	// Choices are the endpoints that can be picked; their odds add up to 1 less
	// those of Ways.
	Choices []Choice
	// Ways are those on which no endpoint is picked.
	Ways []Way
	// Excluded are the Service's endpoints that are no candidates.
	Excluded []Excluded
}

// Choice is one endpoint and the ways there, of which there is more than one
// where something on the way could not be evaluated.
type Choice struct {
	Endpoint    trace.Peer
	Probability float64
	Ways        []Way
}

// Way is one way a packet can go.
type Way struct {
	If      []Condition
	Verdict proxy.Verdict
	// Unsure says that the rules do not tell what becomes of the packet.
	Unsure bool
	// Reason is a code where it is rejected or dropped, Owner whose rule does it.
	Reason trace.Reason
	Owner  string
	// Masquerade is why the source is replaced, empty if it is not.
	Masquerade string
	Path       trace.Path
}

// Condition is something that could not be evaluated, and the answer that is
// assumed.
type Condition struct {
	// What is "-m set in rule 3 of filter/cali-FORWARD" or "10.0.0.1 is an
	// address of the node".
	What string
	// Text is the rule, empty where no rule asks.
	Text  string
	Holds bool
}

// Excluded is an endpoint that is no candidate, and why: by a code for programs and
// in words for people. An Endpoint without an address stands for all: those of a
// port whose name no EndpointSlice has.
type Excluded struct {
	Endpoint trace.Peer
	Code     string
	Why      string
}

// Verdict tells what becomes of the packet if that is the same on every way.
func (c *Case) Verdict() (v proxy.Verdict, same bool) {
	var ways []*Way
	for i := range c.Ways {
		ways = append(ways, &c.Ways[i])
	}
	for i := range c.Choices {
		for j := range c.Choices[i].Ways {
			ways = append(ways, &c.Choices[i].Ways[j])
		}
	}
	for i, w := range ways {
		if i == 0 {
			v = w.Verdict
		}
		if w.Unsure || w.Verdict != v {
			return v, false
		}
	}
	return v, len(ways) > 0
}

// Odds is the sum of all probabilities of a Case; 1 if nothing was cut short.
func (c *Case) Odds() float64 {
	sum := 0.0
	for i := range c.Choices {
		sum += c.Choices[i].Probability
	}
	for i := range c.Ways {
		if !slices.ContainsFunc(c.Ways[i].If, func(c Condition) bool { return c.Holds }) {
			sum += c.Ways[i].Path.Probability
		}
	}
	return sum
}

// Live explains what live rules do with a packet.
func Live(p *liverules.Program, pkt proxy.Packet) Answer {
	a := Answer{Packet: pkt, From: trace.Peer{Addr: pkt.Src}}
	ways := p.Ways(pkt)
	if len(ways) == 0 {
		a.Notes = append(a.Notes, "there are no rules of the packet's family: it would pass untouched")
	}
	var cases []*caseOf
	for i := range ways {
		w := &ways[i]
		before := w.Assumptions[:w.Picked]
		var c *caseOf
		for _, o := range cases {
			if sameAssumptions(o.before, before) {
				c = o
			}
		}
		if c == nil {
			c = &caseOf{before: before, Case: Case{If: conditions(before), Mode: p.Mode()}}
			cases = append(cases, c)
		}
		c.add(p, pkt, w)
	}
	for _, c := range cases {
		if len(c.Choices) > 1 {
			c.Algorithm = "random"
		} else if len(c.Choices) == 1 {
			c.Algorithm = "single"
		}
		for _, s := range p.Services() {
			if s.Name == c.Service && s.IP6 == pkt.Dst.Addr().Is6() {
				c.Affinity = s.Affinity
			}
		}
		a.Cases = append(a.Cases, c.Case)
	}
	return a
}

// AlgorithmAffinity is the Algorithm of a client that is kept with an endpoint.
const AlgorithmAffinity = "affinity"

// Held says that the packet's client is in the list of an endpoint, for which the
// rules were walked so.
func (a *Answer) Held(endpoint netip.AddrPort, age, timeout time.Duration) {
	for i := range a.Cases {
		c := &a.Cases[i]
		if len(c.Choices) != 1 || c.Choices[0].Endpoint.Addr != endpoint || c.Algorithm == AlgorithmAffinity {
			continue
		}
		c.Algorithm = AlgorithmAffinity
		a.Notes = append(a.Notes, fmt.Sprintf("%s was sent to %s %v ago: session affinity keeps it there for another %v, and longer with each connection",
			a.Packet.Src.Addr(), endpoint, age.Round(time.Second), (timeout-age).Round(time.Second)))
	}
}

type caseOf struct {
	Case
	before []xtables.Assumption
}

func sameAssumptions(a, b []xtables.Assumption) bool {
	return slices.EqualFunc(a, b, func(x, y xtables.Assumption) bool {
		return x.Rule == y.Rule && x.Held == y.Held && x.Question == y.Question && x.Index == y.Index && x.Chain == y.Chain
	})
}

func (c *caseOf) add(p *liverules.Program, pkt proxy.Packet, w *liverules.Way) {
	if w.Service != (proxy.PortName{}) {
		c.Service, c.Via = w.Service, w.Via
		c.Policy = proxy.PolicyCluster
		if w.Local {
			c.Policy = proxy.PolicyLocal
		}
	}
	way := Way{
		If: conditions(w.Assumptions[w.Picked:]), Verdict: w.Verdict, Unsure: w.Unsure,
		Reason: trace.Reason(w.Reason), Owner: w.Owner, Masquerade: w.Masquerade,
		Path: livePath(p, pkt, w),
	}
	if !w.Endpoint.IsValid() {
		c.Ways = append(c.Ways, way)
		return
	}
	i := slices.IndexFunc(c.Choices, func(o Choice) bool { return o.Endpoint.Addr == w.Endpoint })
	if i < 0 {
		i = len(c.Choices)
		c.Choices = append(c.Choices, Choice{Endpoint: trace.Peer{Addr: w.Endpoint}})
	}
	if !slices.ContainsFunc(way.If, func(c Condition) bool { return c.Holds }) {
		c.Choices[i].Probability += w.Probability
	}
	c.Choices[i].Ways = append(c.Choices[i].Ways, way)
}

// Outcome explains what a mode's Program says. The steps of its Outcome are
// those of all chains of the mode; rules of others it does not know.
func Outcome(o *proxy.Outcome, mode proxy.Mode, pkt proxy.Packet) Answer {
	a := Answer{Packet: pkt, From: trace.Peer{Addr: pkt.Src}}
	c := Case{Service: o.Service, Via: o.Via, Mode: mode, Algorithm: o.Algorithm, Policy: o.Policy, Affinity: o.Affinity}
	for i := range o.Choices {
		x := &o.Choices[i]
		w := Way{Verdict: proxy.Forward, Masquerade: x.Masquerade, Path: newPath(pkt, steps(x.Steps, pkt, x.Endpoint), x.Probability)}
		w.Path.Left = conntrack.NewTuple(pkt.Proto, pkt.Src, x.Endpoint)
		if x.Masquerade != "" {
			w.Path.Left = conntrack.Tuple{} // the node's source is not known here
		}
		c.Choices = append(c.Choices, Choice{Endpoint: trace.Peer{Addr: x.Endpoint}, Probability: x.Probability, Ways: []Way{w}})
	}
	if len(o.Choices) == 0 {
		c.Ways = []Way{{Verdict: o.Verdict, Reason: trace.Reason(o.Reason), Path: newPath(pkt, steps(o.Steps, pkt, netip.AddrPort{}), 1)}}
	}
	a.Cases = []Case{c}
	return a
}
