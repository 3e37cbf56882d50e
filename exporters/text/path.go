package text

import (
	"fmt"
	"strings"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// The widths of a tree's columns; what is longer pushes the rest.
const (
	treeWhere = 34
	treeWhat  = 58
)

// Tree prints a path as a tree, one line a hop: where it was, indented by how
// deep the chains are nested, its meaning with what it did and changed, and the
// rule's text last.
func Tree(p *trace.Path) string {
	var b strings.Builder
	name := p.Packet
	if p.Predicted {
		name = "predicted " + name
		if p.Probability > 0 {
			name += " (" + percent(p.Probability) + ")"
		}
	}
	fmt.Fprintf(&b, "  %s", name)
	if !p.Tuple.IsZero() {
		fmt.Fprintf(&b, "  %s → %s", end(p.Tuple.Src()), end(p.Tuple.Dst()))
	}
	if !p.Left.IsZero() && p.Left != p.Tuple {
		fmt.Fprintf(&b, "  left as %s → %s", end(p.Left.Src()), end(p.Left.Dst()))
	}
	b.WriteByte('\n')
	var hook, table string
	var last time.Time
	depth := nesting{}
	for i := range p.Hops {
		h := &p.Hops[i]
		if h.Hook != hook || h.Table != table {
			hook, table, depth = h.Hook, h.Table, nil
			if h.Table != "" {
				fmt.Fprintf(&b, "    %s %s%s\n", h.Hook, h.Table, devices(h))
			}
		}
		b.WriteString(treeLine(h, &depth, &last))
	}
	switch {
	case p.Note != "":
		fmt.Fprintf(&b, "    note: %s\n", p.Note)
	case p.Incomplete:
		b.WriteString("    note: hops may be missing here\n")
	}
	return b.String()
}

// nesting is the stack of chains a packet is in.
type nesting []string

// enter returns how deep a chain is, given the one the last hop was in.
func (n *nesting) enter(chain string) int {
	for i, c := range *n {
		if c == chain {
			*n = (*n)[:i+1]
			return i
		}
	}
	*n = append(*n, chain)
	return len(*n) - 1
}

func treeLine(h *trace.Hop, depth *nesting, last *time.Time) string {
	where, indent := "", 6
	switch h.Kind {
	case trace.HopRule, trace.HopEnd, trace.HopPolicy:
		where = h.Chain
		if h.Kind == trace.HopRule && h.Rule != 0 {
			where += fmt.Sprintf(" %d", h.Rule)
		}
		indent += 2 * depth.enter(h.Chain)
	case trace.HopWire:
		where, indent = "wire "+h.Hook, 4
	default:
		where, indent = string(h.Kind), 4
	}
	text := h.Text
	if text != "" {
		text = "| " + text
	}
	line := strings.Repeat(" ", indent) + pad(where, treeWhere-indent) + " " + pad(meaning(h, last), treeWhat) + " " + text
	return strings.TrimRight(line, " ") + "\n"
}

func pad(s string, width int) string {
	if n := len([]rune(s)); n < width {
		return s + strings.Repeat(" ", width-n)
	}
	return s
}

// meaning says what a hop is, what it did and what it changed.
func meaning(h *trace.Hop, last *time.Time) string {
	var parts []string
	add := func(s string) {
		if s != "" {
			parts = append(parts, s)
		}
	}
	switch h.Kind {
	case trace.HopEnd:
		add("end of the chain")
	case trace.HopPolicy:
		add("policy")
	case trace.HopWire:
		add(h.In + h.Out)
	}
	add(h.Purpose)
	switch {
	case h.Verdict == "" || h.Verdict == "match" || h.Verdict == "continue":
	case h.Target != "":
		add("→ " + h.Target)
	default:
		add("[" + h.Verdict + "]")
	}
	for _, c := range h.Changes {
		if c.Before == "" {
			add(fmt.Sprintf("{%s %s}", c.Field, c.After))
		} else {
			add(fmt.Sprintf("{%s %s → %s}", c.Field, c.Before, c.After))
		}
	}
	if !h.Time.IsZero() {
		if !last.IsZero() && !h.Time.Equal(*last) {
			add("+" + elapsed(h.Time.Sub(*last)))
		}
		*last = h.Time
	}
	return strings.Join(parts, "  ")
}

func elapsed(d time.Duration) string {
	if d < 10*time.Millisecond {
		return d.Round(time.Microsecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

// devices says by which devices a packet came and goes.
func devices(h *trace.Hop) string {
	s := ""
	for _, d := range []struct{ word, dev, port string }{{"in", h.In, h.PhysIn}, {"out", h.Out, h.PhysOut}} {
		if d.dev == "" && d.port == "" {
			continue
		}
		s += "  " + d.word + " " + d.dev
		if d.port != "" && d.port != d.dev {
			s += " (port " + d.port + ")"
		}
	}
	return s
}
