package text

import (
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/kptrace/kptrace/trace"
)

// column is one column of the table.
type column struct {
	title string
	// want is the width in characters it has, growing to what is seen; least
	// is what it shrinks to at most on a narrow terminal.
	want, least int
	// keepEnd says that the end of a cell says more than its beginning.
	keepEnd bool
	cell    func(f *trace.Flow, now time.Time) string
}

// table lays out rows. It belongs to one goroutine.
type table struct {
	columns []column
	loc     *time.Location
}

const (
	gap = "  "
	// mostGrow bounds how wide a column gets by what is seen.
	mostGrow = 48
	// leastResult is what the last column gets at least.
	leastResult = 36
)

func newTable(wide bool, loc *time.Location) *table {
	t := &table{loc: loc}
	without := func(cell func(*trace.Flow) string) func(*trace.Flow, time.Time) string {
		return func(f *trace.Flow, _ time.Time) string { return cell(f) }
	}
	add := func(title string, want, least int, keepEnd bool, cell func(*trace.Flow, time.Time) string) {
		t.columns = append(t.columns, column{title, want, least, keepEnd, cell})
	}
	add("TIME", 12, 12, false, t.time)
	if wide {
		add("NODE", 6, 4, true, without(func(f *trace.Flow) string { return f.Node }))
		add("ID", 13, 13, false, without(func(f *trace.Flow) string { return f.ID.String() }))
	}
	add("CLIENT", 21, 10, true, without(func(f *trace.Flow) string { return clientName(&f.Client) }))
	if wide {
		add("CLIENT IP", 16, 9, true, without(func(f *trace.Flow) string { return addrPort(f.Client.Addr) }))
	}
	add("SERVICE", 18, 10, true, without(serviceName))
	if wide {
		add("SERVICE IP", 14, 9, true, without(func(f *trace.Flow) string { return addrPort(f.Service.Addr) }))
	}
	add("BACKEND", 20, 10, false, without(backendName))
	if wide {
		add("BACKEND IP", 16, 9, true, without(func(f *trace.Flow) string { return addrPort(f.Backend.Addr) }))
		add("SOURCE SEEN", 16, 9, true, without(func(f *trace.Flow) string { return addrPort(f.Decision.SourceSeen) }))
		add("EVIDENCE", 15, 6, false, without(func(f *trace.Flow) string { return strings.Join(f.Evidence.Names(), ",") }))
	}
	add("WHY", 44, 12, false, without(Why))
	add("RESULT", 0, 0, false, Result)
	return t
}

// time is the clock of today, and the date where it was another day.
func (t *table) time(f *trace.Flow, now time.Time) string {
	at, now := f.Start.In(t.loc), now.In(t.loc)
	if at.YearDay() != now.YearDay() || at.Year() != now.Year() {
		return at.Format("Jan 02 15:04")
	}
	return at.Format("15:04:05.000")
}

// titles is the line of titles.
func (t *table) titles(width int) string {
	cells := make([]string, len(t.columns))
	for i, c := range t.columns {
		cells[i] = c.title
	}
	return t.join(cells, width, nil)
}

// row is the line of a flow, at most width characters if that is not zero.
// paint colours the last cell.
func (t *table) row(f *trace.Flow, now time.Time, width int, paint func(string) string) string {
	cells := make([]string, len(t.columns))
	for i := range t.columns {
		c := &t.columns[i]
		cells[i] = clean(c.cell(f, now))
		if n := utf8.RuneCountInString(cells[i]); n > c.want && c.want > 0 {
			c.want = max(c.want, min(n, mostGrow))
		}
	}
	return t.join(cells, width, paint)
}

// join pads and cuts cells to the columns' widths.
func (t *table) join(cells []string, width int, paint func(string) string) string {
	widths := t.widths(width)
	var b strings.Builder
	used, last := 0, len(cells)-1
	for i, c := range cells[:last] {
		if width > 0 {
			c = cut(c, widths[i], t.columns[i].keepEnd)
		}
		n := utf8.RuneCountInString(c)
		b.WriteString(c)
		b.WriteString(strings.Repeat(" ", max(0, widths[i]-n)))
		b.WriteString(gap)
		used += max(n, widths[i]) + len(gap)
	}
	c := cells[last]
	if width > 0 {
		c = cut(c, max(0, width-used), false)
	}
	if paint != nil {
		c = paint(c)
	}
	b.WriteString(c)
	return strings.TrimRight(b.String(), " ")
}

// widths shares width among the columns: while it is too little, the one that
// is furthest above its least gives way.
func (t *table) widths(width int) []int {
	w := make([]int, len(t.columns))
	sum := 0
	for i, c := range t.columns {
		w[i] = c.want
		sum += c.want + len(gap)
	}
	for width > 0 && sum+leastResult > width {
		most := -1
		for i, c := range t.columns {
			if w[i] > c.least && (most < 0 || w[i]-c.least > w[most]-t.columns[most].least) {
				most = i
			}
		}
		if most < 0 {
			break
		}
		w[most]--
		sum--
	}
	return w
}

// cut shortens s to n characters, with "…" where something is missing.
func cut(s string, n int, keepEnd bool) string {
	runes := []rune(s)
	switch {
	case len(runes) <= n:
		return s
	case n <= 0:
		return ""
	case keepEnd:
		return "…" + string(runes[len(runes)-n+1:])
	}
	return string(runes[:n-1]) + "…"
}

// clean takes out what could move a terminal's cursor: names come from files.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}
