// Package diagnose asks what the failures of a Service have in common: which
// endpoint, client or node they share that good connections do not, and for what
// reason they failed. It is pure: flows and the findings of a check go in, ranked
// sentences with counts come out.
package diagnose

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
)

// Finding is what some of the failures have in common.
type Finding struct {
	// Failures counts the failed connections it explains, of Of in all.
	Failures int `json:"failures"`
	Of       int `json:"of"`
	// Reason is their reason, and Cause what is known beside it.
	Reason trace.Reason `json:"reason"`
	Cause  string       `json:"cause,omitempty"`
	// By is what they share beside it: backend, node, client, client-node, or
	// empty; Value is which. Good counts the connections with the same Value that
	// did not fail, GoodElse those with others.
	By       By     `json:"by,omitempty"`
	Value    string `json:"value,omitempty"`
	Good     int    `json:"good"`
	GoodElse int    `json:"goodElse"`
	// Odds is the chance with which a new connection meets Value, 0 if that is not
	// a matter of chance.
	Odds float64 `json:"odds,omitempty"`
	// Text says it in one sentence, Next what to look at.
	Text string `json:"text"`
	Next string `json:"next,omitempty"`
	// Flows are the ids of some of the connections, newest first.
	Flows []string `json:"flows,omitempty"`
}

// Notice is what went wrong during connections that did not fail.
type Notice struct {
	Reason trace.Reason `json:"reason"`
	// Connections counts them, of Of that did not fail.
	Connections int `json:"connections"`
	Of          int `json:"of"`
	// Text says it in one sentence, Next what to look at, Flow is the newest one.
	Text string `json:"text"`
	Next string `json:"next"`
	Flow string `json:"flow"`
}

// Report is a diagnosis.
type Report struct {
	// Total and Failed count the connections looked at.
	Total  int `json:"total"`
	Failed int `json:"failed"`
	// Incomplete counts those during which events were lost.
	Incomplete int       `json:"incomplete,omitempty"`
	Findings   []Finding `json:"findings"`
	// Noticed is what else went wrong, of connections that did not fail.
	Noticed []Notice `json:"noticed,omitempty"`
	// Check are the findings of a check that can have to do with it, those that
	// break traffic first.
	Check []check.Finding `json:"check,omitempty"`
}

// By is something by which connections can be told apart.
type By string

// The ways to tell connections apart.
const (
	Backend    By = "backend"
	Node       By = "node"
	Client     By = "client"
	ClientNode By = "client-node"
	Zone       By = "zone"
	Service    By = "service"
	Reason     By = "reason"
	Outcome    By = "outcome"
)

// Bys lists them.
func Bys() []By { return []By{Backend, Node, Client, ClientNode, Zone, Service, Reason, Outcome} }

// Value returns a flow's value, empty if it has none.
func (b By) Value(f *trace.Flow) string {
	switch b {
	case Backend:
		return endName(&f.Backend)
	case Node:
		return f.Backend.Node
	case Client:
		if f.Client.Pod != "" {
			return f.Client.Namespace + "/" + f.Client.Pod
		}
		if f.Client.Addr.IsValid() {
			return f.Client.Addr.Addr().String()
		}
	case ClientNode:
		return f.Client.Node
	case Zone:
		return f.Backend.Zone
	case Service:
		return f.Service.Name.String()
	case Reason:
		return string(f.Reason)
	case Outcome:
		return string(f.Outcome)
	}
	return ""
}

func endName(p *trace.Peer) string {
	switch {
	case !p.Addr.IsValid():
		return ""
	case p.Pod != "":
		return fmt.Sprintf("%s/%s:%d", p.Namespace, p.Pod, p.Addr.Port())
	}
	return p.Addr.String()
}

// few is the share of a group that may be otherwise where it is said that the
// group shares something.
const few = 0.1

// maxFlows is how many ids a Finding carries.
const maxFlows = 5

// Diagnose looks at connections, failed ones and others, and at the findings of a
// check of the same nodes.
func Diagnose(flows []*trace.Flow, findings []check.Finding) Report {
	r := Report{Total: len(flows), Findings: []Finding{}}
	groups := make(map[trace.Reason][]*trace.Flow)
	var good []*trace.Flow
	for _, f := range flows {
		if f.Incomplete {
			r.Incomplete++
		}
		if f.Outcome.Failed() {
			r.Failed++
			groups[f.Reason] = append(groups[f.Reason], f)
		} else {
			good = append(good, f)
		}
	}
	for reason, group := range groups {
		r.Findings = append(r.Findings, common(reason, group, good, r.Failed))
	}
	slices.SortFunc(r.Findings, func(a, b Finding) int {
		return cmp.Or(b.Failures-a.Failures, strings.Compare(string(a.Reason), string(b.Reason)))
	})
	r.Noticed = notices(good)
	names := make(map[string]bool)
	for _, f := range flows {
		names[f.Service.Name.String()] = true
	}
	for _, f := range findings {
		about, _, _ := strings.Cut(f.Object, " ")
		service := strings.Contains(about, "/") && strings.Contains(about, ":")
		if f.Severity != check.Note && (!service || names[about]) {
			r.Check = append(r.Check, f)
		}
	}
	return r
}

// notices counts connections that did not fail by their reasons.
func notices(good []*trace.Flow) (list []Notice) {
	for _, info := range trace.Reasons() {
		n := Notice{Reason: info.Code, Of: len(good), Next: info.Next}
		var newest *trace.Flow
		for _, f := range good {
			if f.Reason != info.Code {
				continue
			}
			if n.Connections++; newest == nil || trace.CompareFlows(f, newest) > 0 {
				newest = f
			}
		}
		if newest == nil {
			continue
		}
		n.Flow = newest.ID.String()
		n.Text = fmt.Sprintf("%d of %d connections that did not fail: %s", n.Connections, n.Of, strings.ReplaceAll(string(n.Reason), "-", " "))
		list = append(list, n)
	}
	return list
}

// common finds what a group of failures for one reason shares that good
// connections do not.
func common(reason trace.Reason, group, good []*trace.Flow, failed int) Finding {
	out := Finding{Failures: len(group), Of: failed, Reason: reason, GoodElse: len(good)}
	best := 0.0
	for _, by := range []By{Backend, Client, Node, Zone, ClientNode} {
		counts := make(map[string]int)
		for _, f := range group {
			counts[by.Value(f)]++
		}
		value, n := "", 0
		for v, k := range counts {
			if k > n || k == n && v < value {
				value, n = v, k
			}
		}
		if value == "" || float64(n) < (1-few)*float64(len(group)) {
			continue
		}
		in := 0
		for _, f := range good {
			if by.Value(f) == value {
				in++
			}
		}
		rest := len(good) - in
		// How much likelier a connection fails with it than without: an endpoint
		// that all share says nothing.
		score := float64(n)/float64(n+in) - float64(len(group)-n)/float64(max(1, len(group)-n+rest))
		if len(group)-n+rest == 0 || rest == 0 && in > 0 { // there is nothing to compare with
			continue
		}
		if score > best+1e-9 {
			best = score
			out.By, out.Value, out.Good, out.GoodElse = by, value, in, rest
		}
	}
	causes := make(map[string]int)
	for _, f := range group {
		causes[f.Cause]++
		if p := f.Decision.Probability; p > 0 && out.By == Backend {
			out.Odds = p
		}
	}
	for c, k := range causes {
		if c != "" && 2*k > len(group) {
			out.Cause = c
		}
	}
	newest := slices.Clone(group)
	slices.SortFunc(newest, func(a, b *trace.Flow) int { return trace.CompareFlows(b, a) })
	for _, f := range newest[:min(maxFlows, len(newest))] {
		out.Flows = append(out.Flows, f.ID.String())
	}
	if info, ok := reason.Info(); ok {
		out.Next = info.Next
	}
	out.Text = sentence(&out, group[0])
	return out
}

// sentence puts a finding into words.
func sentence(x *Finding, one *trace.Flow) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d of %d failures: ", x.Failures, x.Of)
	switch x.By {
	case Backend:
		fmt.Fprintf(&b, "endpoint %s", x.Value)
		if one.Backend.Node != "" {
			fmt.Fprintf(&b, " on %s", one.Backend.Node)
		}
		b.WriteString(", ")
	case Node:
		fmt.Fprintf(&b, "endpoints on %s, ", x.Value)
	case Zone:
		fmt.Fprintf(&b, "endpoints in zone %s, ", x.Value)
	case Client:
		fmt.Fprintf(&b, "client %s, ", x.Value)
	case ClientNode:
		fmt.Fprintf(&b, "clients on %s, ", x.Value)
	}
	b.WriteString(strings.ReplaceAll(string(cmp.Or(x.Reason, "reason unknown")), "-", " "))
	if x.Cause != "" {
		fmt.Fprintf(&b, " (%s)", x.Cause)
	}
	switch {
	case x.By == Backend && x.Odds > 0 && one.Decision.Candidates > 1:
		fmt.Fprintf(&b, "; it is 1 of %d endpoints, so %s new connections meets it", one.Decision.Candidates, oneIn(x.Odds))
		if x.Good > 0 {
			fmt.Fprintf(&b, "; %d connections to it were good", x.Good)
		}
	case x.By != "" && x.Good == 0 && x.GoodElse > 0:
		fmt.Fprintf(&b, "; no connection with it was good, and %d with others were", x.GoodElse)
	case x.By == "" && x.GoodElse == 0:
		b.WriteString("; no connection was good")
	case x.By == "":
		fmt.Fprintf(&b, "; they share neither endpoint, client nor node, and %d connections were good", x.GoodElse)
	}
	return b.String()
}

func oneIn(p float64) string { return fmt.Sprintf("one in %.0f", 1/p) }

// Row is a line of a summary.
type Row struct {
	// Values are those of the dimensions asked for, in their order.
	Values []string `json:"values"`
	// Connections counts all, Failed those that failed; Outcomes counts by outcome.
	Connections int                   `json:"connections"`
	Failed      int                   `json:"failed"`
	Outcomes    map[trace.Outcome]int `json:"outcomes"`
}

// Summary counts connections by what tells them apart, those with the most
// failures first.
func Summary(flows []*trace.Flow, by []By) []Row {
	rows := make(map[string]*Row)
	for _, f := range flows {
		values := make([]string, len(by))
		for i, b := range by {
			values[i] = b.Value(f)
		}
		key := strings.Join(values, "\x00")
		r := rows[key]
		if r == nil {
			r = &Row{Values: values, Outcomes: make(map[trace.Outcome]int)}
			rows[key] = r
		}
		r.Connections++
		r.Outcomes[f.Outcome]++
		if f.Outcome.Failed() {
			r.Failed++
		}
	}
	out := make([]Row, 0, len(rows))
	for _, r := range rows {
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b Row) int {
		return cmp.Or(b.Failed-a.Failed, b.Connections-a.Connections, slices.Compare(a.Values, b.Values))
	})
	return out
}
