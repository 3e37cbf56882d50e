package text

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// head shows the scope and the titles, once.
func (r *renderer) head() {
	if r.headed {
		return
	}
	r.headed = true
	lines := r.cfg.Format != JSON && r.cfg.Format != JSONL
	if !r.cfg.NoHeader && lines && len(r.headers) > 0 {
		r.talk(r.scope()...)
	}
	for _, h := range r.headers {
		for _, n := range h.Notes {
			r.talk("note: " + h.Node + ": " + clean(n))
		}
		for _, u := range h.Unknown {
			r.talk(fmt.Sprintf("note: %s: there is no %s yet: waiting for it", h.Node, u))
		}
	}
	if r.cfg.NoHeader || !lines {
		return
	}
	if r.term != nil {
		width, _ := r.cfg.Size()
		r.term.note(r.dim(r.table.titles(width)))
	} else if !r.cfg.ByEndpoint {
		r.line(r.table.titles(0))
	}
}

// scopeServices is how many Services the scope names one by one.
const scopeServices = 4

// scope is the first lines: what is followed, where, since when.
func (r *renderer) scope() []string {
	slices.SortFunc(r.headers, func(a, b *trace.Header) int { return strings.Compare(a.Node, b.Node) })
	var nodes []string
	modes := make(map[string]bool)
	var services []trace.ServiceInfo
	since := time.Time{}
	for _, h := range r.headers {
		nodes = append(nodes, h.Node)
		modes[string(h.Mode)] = true
		for _, s := range h.Services {
			if !slices.ContainsFunc(services, func(o trace.ServiceInfo) bool {
				return o.Name == s.Name && o.ClusterIP == s.ClusterIP
			}) {
				services = append(services, s)
			}
		}
		if h.Since.After(since) {
			since = h.Since
		}
	}
	mode := "several modes"
	if len(modes) == 1 {
		mode = cmp.Or(string(r.headers[0].Mode), "no mode")
	}
	on := strings.Join(nodes, ", ")
	if len(nodes) > 4 {
		on = fmt.Sprintf("%s and %d more", strings.Join(nodes[:3], ", "), len(nodes)-3)
	}
	where := fmt.Sprintf("%s on %s (%d of %s)", mode, on, len(nodes), plural(max(len(nodes), r.cfg.Nodes), "node"))
	tail := ""
	if !since.IsZero() {
		tail = "  history since " + r.clock(since)
	}
	switch n := len(services); {
	case n == 0:
		return []string{"connections to Services  " + where + tail}
	case n <= scopeServices:
		var lines []string
		for _, s := range services {
			lines = append(lines, clean(fmt.Sprintf("%s  %s  %s%s", s.Name, where, serviceFacts(&s), tail)))
		}
		return lines
	default:
		ready := 0
		for _, s := range services {
			if s.Ready > 0 {
				ready++
			}
		}
		return []string{fmt.Sprintf("%s  %s  %d with a ready endpoint%s", plural(n, "Service port"), where, ready, tail)}
	}
}

// serviceFacts is "10.96.0.10  3 of 4 endpoints ready".
func serviceFacts(s *trace.ServiceInfo) string {
	text := s.ClusterIP.String()
	if s.NodePort != 0 {
		text += fmt.Sprintf("  node port %d", s.NodePort)
	}
	text += fmt.Sprintf("  %d of %s ready", s.Ready, plural(s.Total, "endpoint"))
	if s.Affinity > 0 {
		text += "  affinity " + Duration(s.Affinity)
	}
	return text
}

func (r *renderer) clock(t time.Time) string {
	t, now := t.In(r.cfg.Location), r.cfg.Now().In(r.cfg.Location)
	if t.YearDay() != now.YearDay() || t.Year() != now.Year() {
		return t.Format("Jan 02 15:04")
	}
	return t.Format("15:04")
}

// loss shows what was lost as a row.
func (r *renderer) loss(m trace.Message) {
	r.losses = trace.MergeLoss(r.losses, *m.Loss)
	where := ""
	if len(r.headers) > 1 {
		where = " on " + m.Node
	}
	text := fmt.Sprintf("%s  LOST  %s%s (%s): connections may be missing or incomplete",
		time.Unix(0, m.Loss.To).In(r.cfg.Location).Format("15:04:05.000"), plural(m.Loss.Events, "event"), where, lossPlace(m.Loss))
	if r.cfg.Colour {
		text = yellow(text)
	}
	r.head()
	if r.term == nil && (r.cfg.Format == Line || r.cfg.Format == Wide) {
		r.line(text)
		return
	}
	r.talk(text)
}

func lossPlace(l *trace.Loss) string {
	switch l.Where {
	case "kernel":
		return l.Source.String() + ", in the kernel"
	case "rules":
		return l.Source.String() + ", while others had removed the rules that report"
	case "queue":
		return l.Source.String() + ", before they could be joined"
	case "ring":
		return "this reader was too slow"
	case "table":
		return "the flow table was full"
	}
	return cmp.Or(l.Where, "?")
}

// explain says why nothing is shown, when every node has told its facts since
// the last row.
func (r *renderer) explain() {
	if len(r.idle) < len(r.headers) {
		return
	}
	quiet := time.Duration(0)
	nodes := make([]string, 0, len(r.idle))
	for node, i := range r.idle {
		nodes = append(nodes, node)
		if quiet == 0 || i.For < quiet {
			quiet = i.For
		}
	}
	if r.cfg.Now().Sub(r.lastRow) < quiet-time.Second {
		clear(r.idle)
		return
	}
	slices.Sort(nodes)
	r.head()
	lines := []string{fmt.Sprintf("nothing to show for %s; what was checked:", Duration(quiet.Truncate(time.Second)))}
	var blind []string
	for _, node := range nodes {
		i := r.idle[node]
		lines = append(lines, r.idleFacts(node, i)...)
		for _, b := range i.Blind {
			if !slices.Contains(blind, b) {
				blind = append(blind, b)
			}
		}
	}
	for i, b := range blind {
		intro := "  not visible here: "
		if i > 0 {
			intro = strings.Repeat(" ", len(intro))
		}
		lines = append(lines, intro+clean(b))
	}
	for i := range lines {
		lines[i] = r.dim(lines[i])
	}
	r.talk(lines...)
	clear(r.idle)
}

// idleFacts is what one node checked.
func (r *renderer) idleFacts(node string, i *trace.Idle) []string {
	var lines []string
	add := func(format string, args ...any) {
		lines = append(lines, "  "+node+": "+clean(fmt.Sprintf(format, args...)))
	}
	for k := range i.Services {
		s := &i.Services[k]
		if k == scopeServices {
			add("and %d more Service ports", len(i.Services)-k)
			break
		}
		facts := serviceFacts(s)
		if s.Ready == 0 {
			facts += ": connections to it are refused, and would show as rejected"
		}
		add("%s  %s", s.Name, facts)
	}
	rules := plural(i.Rules, "rule") + " would report a connection"
	if i.Rules == 0 {
		rules = "no rule reports such connections"
	}
	switch {
	case i.SyncError != "":
		rules += "; the last sync failed: " + i.SyncError
	case i.Synced.IsZero():
		rules += "; the kernel has not been programmed yet"
	default:
		rules += ", programmed at " + i.Synced.In(r.cfg.Location).Format("15:04:05")
	}
	add("%s", rules)
	last := "the history has none"
	if !i.Last.IsZero() {
		last = "the last one began at " + i.Last.In(r.cfg.Location).Format("15:04:05")
	}
	add("%s; %s to other targets seen meanwhile", last, plural(i.Others, "update"))
	if i.Direct.Total() > 0 {
		add("%s: --direct shows them", directWords(i.Direct))
	}
	for _, f := range i.Findings {
		add("kptrace check says: %s", f)
	}
	var read []string
	var events uint64
	for _, s := range i.Sources {
		events += s.Events
		read = append(read, fmt.Sprintf("%s %d", s.Source, s.Events))
	}
	switch {
	case len(read) == 0:
		add("no source is running: nothing can be seen")
	case events == 0:
		add("no events since the start (%s): does any traffic to Services pass this node?", strings.Join(read, ", "))
	default:
		add("events since the start: %s", strings.Join(read, ", "))
	}
	return lines
}

// summary is the last line.
func (r *renderer) summary(open int) string {
	var lost uint64
	var places []string
	for i := range r.losses {
		lost += r.losses[i].Events
		places = append(places, fmt.Sprintf("%d %s", r.losses[i].Events, lossPlace(&r.losses[i])))
	}
	text := fmt.Sprintf("%s, %d failed, %s lost", plural(r.total, "connection"), r.failed, plural(lost, "event"))
	if open > 0 && !r.cfg.List {
		text += fmt.Sprintf(", %d not ended", open)
	}
	if lost > 0 {
		text += " (" + strings.Join(places, "; ") + ")"
	}
	if r.direct.Total() > 0 {
		text += "; " + directWords(r.direct)
	}
	return text
}

// directWords is "3 connections straight to endpoints, past the Service (2 of pods
// here, 1 from elsewhere)".
func directWords(d trace.Direct) string {
	var of []string
	for _, p := range []struct {
		n    uint64
		word string
	}{{d.Pods, "of pods here"}, {d.Node, "of the node itself, as by probes"}, {d.Elsewhere, "from elsewhere, where a Service may have sent them"}} {
		if p.n > 0 {
			of = append(of, fmt.Sprintf("%d %s", p.n, p.word))
		}
	}
	return plural(d.Total(), "connection") + " straight to endpoints, past the Service (" + strings.Join(of, ", ") + ")"
}

// list prints what was gathered for ByEndpoint.
func (r *renderer) list() {
	if !r.cfg.ByEndpoint {
		return
	}
	slices.SortStableFunc(r.listed, func(a, b *trace.Flow) int {
		return cmp.Or(a.Service.Name.Compare(b.Service.Name), a.Backend.Addr.Compare(b.Backend.Addr), trace.CompareFlows(a, b))
	})
	now := r.cfg.Now()
	lines := r.cfg.Format == Line || r.cfg.Format == Wide
	if lines && !r.cfg.NoHeader && len(r.listed) > 0 {
		r.line("  " + r.table.titles(0))
	}
	for len(r.listed) > 0 {
		first := r.listed[0]
		n := slices.IndexFunc(r.listed, func(f *trace.Flow) bool {
			return f.Service.Name != first.Service.Name || f.Backend.Addr != first.Backend.Addr
		})
		if n < 0 {
			n = len(r.listed)
		}
		if lines {
			r.line(fmt.Sprintf("%s > %s: %d open, the oldest for %s",
				first.Service.Name, backendName(first), n, Duration(now.Sub(first.Start))))
		}
		for _, f := range r.listed[:n] {
			aged := *f
			aged.Existing = aged.Existing || f.Outcome == trace.Open
			r.emit(f, &aged)
		}
		r.listed = r.listed[n:]
	}
}

// emit prints a flow in a list: as it is in JSON, with its age in lines.
func (r *renderer) emit(f, aged *trace.Flow) {
	if r.cfg.Format == JSON || r.cfg.Format == JSONL {
		r.object(f)
		return
	}
	r.line("  " + r.row(aged)(0))
}
