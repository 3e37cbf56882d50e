package text

import (
	"fmt"
	"io"
	"strings"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
)

// Explain writes what would become of a packet, for people: the answer first,
// then the odds, then the rules. With all, the rules of every endpoint's way are
// printed and not only those of the first.
func Explain(w io.Writer, a *explain.Answer, all bool) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s → %s", a.Packet.Proto, end(a.Packet.Src), end(a.Packet.Dst))
	if name := peerName(&a.From); name != "" {
		fmt.Fprintf(&b, "  from %s", name)
	}
	b.WriteByte('\n')
	if a.Rules != "" {
		fmt.Fprintf(&b, "by %s\n", a.Rules)
	}
	for i := range a.Cases {
		b.WriteByte('\n')
		explainCase(&b, &a.Cases[i], all)
	}
	for i, n := range a.Notes {
		if i == 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func explainCase(b *strings.Builder, c *explain.Case, all bool) {
	writeConditions(b, "", c.If)
	switch {
	case c.Service != (proxy.PortName{}):
		fmt.Fprintf(b, "service   %s by %s\n", c.Service, c.Via)
	default:
		b.WriteString("service   none: no rule claims this address and port for a Service\n")
	}
	fmt.Fprintf(b, "verdict   %s\n", caseVerdict(c))
	if c.Algorithm != "" {
		fmt.Fprintf(b, "choice    %s, %s", c.Algorithm, plural(len(c.Choices), "candidate"))
		if c.Policy != "" {
			fmt.Fprintf(b, ", policy %s", c.Policy)
		}
		if c.Affinity > 0 {
			fmt.Fprintf(b, "; session affinity for %s, so a client that was here before stays where it was", Duration(c.Affinity))
		}
		b.WriteByte('\n')
	}
	for i := range c.Choices {
		x := &c.Choices[i]
		name := "endpoints"
		if i > 0 {
			name = ""
		}
		fmt.Fprintf(b, "%-9s %7s  %s", name, percent(x.Probability), peerText(&x.Endpoint))
		if why := x.Ways[0].Masquerade; why != "" {
			fmt.Fprintf(b, "  masqueraded (%s)", why)
		}
		if v := wayVerdicts(x.Ways); v != "" {
			b.WriteString("  " + v)
		}
		b.WriteByte('\n')
	}
	if sum := c.Odds(); len(c.Choices) > 0 && sum < 0.999 {
		fmt.Fprintf(b, "%-9s %7s  nowhere: rules are missing\n", "", percent(1-sum))
	}
	for i := range c.Excluded {
		name := "excluded"
		if i > 0 {
			name = ""
		}
		fmt.Fprintf(b, "%-9s          %s: %s\n", name, excludedEnd(&c.Excluded[i]), c.Excluded[i].Why)
	}
	for i := range c.Choices {
		if i > 0 && !all {
			if more := len(c.Choices) - 1; more > 0 {
				fmt.Fprintf(b, "\n  … and %s that differ in the endpoint; --all prints them\n", plural(more, "more way"))
			}
			break
		}
		writeWays(b, c.Choices[i].Ways)
	}
	writeWays(b, c.Ways)
}

// excludedEnd names an endpoint that is no candidate, or all there could be.
func excludedEnd(x *explain.Excluded) string {
	if !x.Endpoint.Addr.IsValid() {
		return "all endpoints"
	}
	return peerText(&x.Endpoint)
}

func writeConditions(b *strings.Builder, indent string, conds []explain.Condition) {
	for _, c := range conds {
		word := "if not   "
		if c.Holds {
			word = "if       "
		}
		fmt.Fprintf(b, "%s%s %s", indent, word, c.What)
		if c.Text != "" {
			fmt.Fprintf(b, "  | %s", c.Text)
		}
		b.WriteByte('\n')
	}
}

// writeWays prints ways that end alike once, and those that do not all.
func writeWays(b *strings.Builder, ways []explain.Way) {
	if len(ways) == 0 {
		return
	}
	alike := true
	plain := 0 // the way on which nothing unknown was taken to hold
	for i := range ways {
		w := &ways[i]
		alike = alike && w.Verdict == ways[0].Verdict && !w.Unsure && w.Path.Left == ways[0].Path.Left
		held := false
		for _, c := range w.If {
			held = held || c.Holds
		}
		if !held {
			plain = i
		}
	}
	if alike {
		b.WriteByte('\n')
		b.WriteString(Tree(brief(&ways[plain].Path, nil)))
		if n := len(ways[plain].If); n > 0 {
			fmt.Fprintf(b, "    could not evaluate, and it makes no difference to the outcome:\n")
			for _, c := range ways[plain].If {
				fmt.Fprintf(b, "      %s\n", c.What)
			}
		}
		return
	}
	for i := range ways {
		b.WriteByte('\n')
		writeConditions(b, "  ", ways[i].If)
		fmt.Fprintf(b, "  then      %s\n", wayVerdict(&ways[i]))
		var before *trace.Path
		if i > 0 {
			before = &ways[i-1].Path
		}
		b.WriteString(Tree(brief(&ways[i].Path, before)))
	}
}

// brief leaves out what a reader need not see: policies that accept what no rule
// was for, and the hops that a path has in common with the one before.
func brief(p, before *trace.Path) *trace.Path {
	out := *p
	hops := p.Hops
	if before != nil {
		n := 0
		for n < len(hops)-1 && n < len(before.Hops) && sameHop(&hops[n], &before.Hops[n]) {
			n++
		}
		if n > 0 {
			h := &hops[n-1]
			out.Note = strings.TrimPrefix(out.Note+fmt.Sprintf("; up to %s %s/%s the same as above", h.Hook, h.Table, h.Chain), "; ")
		}
		hops = hops[n:]
	}
	out.Hops = nil
	for i := range hops {
		h := &hops[i]
		if h.Kind == trace.HopPolicy && h.Verdict == "accept" && (i == 0 || hops[i-1].Table != h.Table || hops[i-1].Hook != h.Hook) {
			continue
		}
		out.Hops = append(out.Hops, *h)
	}
	return &out
}

func sameHop(a, b *trace.Hop) bool {
	return a.Hook == b.Hook && a.Table == b.Table && a.Chain == b.Chain && a.Rule == b.Rule && a.Verdict == b.Verdict
}

func caseVerdict(c *explain.Case) string {
	v, same := c.Verdict()
	if !same {
		return "depends on what could not be evaluated, see below"
	}
	var ways []explain.Way
	for i := range c.Choices {
		ways = append(ways, c.Choices[i].Ways...)
	}
	ways = append(ways, c.Ways...)
	switch v {
	case proxy.Forward:
		return "forwarded to an endpoint"
	case proxy.Pass:
		return "passes: it goes where it is addressed to, and no Service has to do with it"
	}
	return wayVerdict(&ways[0])
}

func wayVerdict(w *explain.Way) string {
	if w.Unsure {
		return "not known: " + w.Path.Note
	}
	switch w.Verdict {
	case proxy.Forward:
		return "forwarded"
	case proxy.Pass:
		return "passes"
	}
	text := "dropped"
	if w.Verdict == proxy.Reject {
		text = "rejected"
	}
	switch {
	case w.Reason == "dropped-by-rule" && w.Owner == "":
		return text + " by a rule"
	case w.Reason == "dropped-by-rule":
		return text + " by a rule of " + w.Owner
	case w.Reason != trace.NoReason:
		text += ": " + reasonWords(w.Reason)
	}
	return text
}

// wayVerdicts says more of a choice than that it is reached, empty if it is.
func wayVerdicts(ways []explain.Way) string {
	words := map[string]bool{}
	var list []string
	for i := range ways {
		s := wayVerdict(&ways[i])
		if !words[s] {
			words[s] = true
			list = append(list, s)
		}
	}
	if len(list) == 1 && list[0] == "forwarded" {
		return ""
	}
	return strings.Join(list, ", or ")
}

// peerName is "shop/web-7f9 (node2)", or the node, or empty.
func peerName(p *trace.Peer) string {
	switch {
	case p.Pod != "" && p.Node != "":
		return fmt.Sprintf("%s/%s (%s)", p.Namespace, p.Pod, p.Node)
	case p.Pod != "":
		return p.Namespace + "/" + p.Pod
	}
	return p.Node
}
