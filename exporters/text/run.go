package text

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// Format is a way of printing flows.
type Format string

// The formats. JSON is one document that is complete when the stream ends,
// JSONL one object a line as it comes.
const (
	Line  Format = "line"
	Wide  Format = "wide"
	JSON  Format = "json"
	JSONL Format = "jsonl"
	// Path is Wide's row, and below it the tree of each packet's path.
	Path Format = "path"
)

// Config says how to show a stream.
type Config struct {
	// Out gets what is data. Err gets what is talk, unless TTY is set.
	Out, Err io.Writer
	Format   Format
	// TTY says that Out is a terminal whose last rows can be rewritten: rows
	// are then updated in place, and above 20 a second those of good
	// connections are folded into a counter. Size is its width and height in
	// characters; nil means 80 by 24. Colour allows colours.
	TTY    bool
	Size   func() (width, height int)
	Colour bool
	// Updates shows every change; otherwise, off a terminal, each connection
	// is shown exactly once: when it ends, or as it stands when the stream
	// ends.
	Updates bool
	// List says that the stream is a list of what there is: everything is
	// shown at once, as it is. ByEndpoint groups it by endpoint.
	List, ByEndpoint bool
	// Recorded says that the stream is a recording's, which has no Header.
	Recorded bool
	// Paths says that the paths of packets were asked for: a connection that has
	// ended is shown when its paths are there, or when they no longer come.
	Paths bool
	// NoHeader leaves out the scope and the titles.
	NoHeader bool
	// Nodes is how many nodes were asked; the scope waits for their headers.
	Nodes int
	// Now and Location are for tests; nil means the real ones.
	Now      func() time.Time
	Location *time.Location
}

const (
	// drawEvery is how often a terminal is redrawn at most.
	drawEvery = 50 * time.Millisecond
	// headerWait is how long the scope waits for slow nodes.
	headerWait = time.Second
	// doneFor is for how long an ended flow is remembered, so that its late
	// corrections are not taken for another flow: conntrack's DESTROY comes
	// up to 3 minutes late.
	doneFor = 4 * time.Minute
	// doneMost bounds how many are remembered, to some 40 MB.
	doneMost = 500_000
)

// key identifies a flow among nodes.
type key struct {
	node string
	id   trace.FlowID
}

type renderer struct {
	cfg   Config
	out   *bufio.Writer
	err   io.Writer
	table *table
	term  *screen // nil off a terminal

	headers  []*trace.Header
	begun    time.Time
	headed   bool // the scope was shown
	idle     map[string]*trace.Idle
	lastRow  time.Time
	open     map[key]*trace.Flow
	done     recent
	listed   []*trace.Flow
	objects  int // JSON objects printed
	total    int
	failed   int
	losses   []trace.Loss
	direct   trace.Direct
	waiting  waiting
	fold     folder
	writeErr error
}

// Run shows a stream until it is closed or ctx ends. Either way the output is
// complete for what was received, with a summary at its end. The error is that
// of writing to Out.
func Run(ctx context.Context, cfg Config, stream <-chan trace.Message) error {
	r := newRenderer(cfg)
	tick := time.NewTicker(drawEvery)
	defer tick.Stop()
	for r.writeErr == nil {
		select {
		case m, ok := <-stream:
			if !ok {
				return r.end()
			}
			r.take(m)
			if len(stream) == 0 && r.term == nil {
				r.flush()
			}
		case <-tick.C:
			r.tick()
		case <-ctx.Done():
			return r.end()
		}
	}
	return r.writeErr
}

func newRenderer(cfg Config) *renderer {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Location == nil {
		cfg.Location = time.Local
	}
	if cfg.Size == nil {
		cfg.Size = func() (int, int) { return 80, 24 }
	}
	if cfg.Format == JSON || cfg.Format == JSONL || cfg.Format == Path || cfg.List {
		cfg.TTY = false
	}
	r := &renderer{
		cfg: cfg, out: bufio.NewWriterSize(cfg.Out, 64<<10), err: cfg.Err,
		table: newTable(cfg.Format == Wide || cfg.Format == Path, cfg.Location), begun: cfg.Now(),
		idle: make(map[string]*trace.Idle), open: make(map[key]*trace.Flow),
	}
	r.lastRow = r.begun
	if cfg.TTY {
		r.term = &screen{w: r.out, size: cfg.Size}
	}
	return r
}

func (r *renderer) take(m trace.Message) {
	switch {
	case m.Header != nil:
		r.headers = append(r.headers, m.Header)
		if len(r.headers) >= max(1, r.cfg.Nodes) {
			r.head()
		}
	case m.Flow != nil:
		r.flow(m)
	case m.Loss != nil:
		r.loss(m)
	case m.Idle != nil:
		r.idle[m.Node] = m.Idle
		r.explain()
	case m.End != nil:
		r.direct = r.direct.Add(m.End.Direct)
	}
}

// flow takes one revision.
func (r *renderer) flow(m trace.Message) {
	f, k := m.Flow, key{m.Node, m.Flow.ID}
	if r.waiting.update(k, f) {
		return
	}
	if r.done.has(k) {
		if r.cfg.Updates && !m.Gone {
			r.show(k, f)
		} else if r.term != nil {
			r.term.update(k, r.row(f), true)
		}
		return
	}
	old, known := r.open[k]
	if known && f.Revision < old.Revision {
		return
	}
	if !known {
		r.total++
	}
	if m.Gone {
		delete(r.open, k)
		if r.term != nil {
			r.term.update(k, r.row(f), f.Ended)
		} else if !r.cfg.Updates {
			r.total--
		}
		return
	}
	if f.Ended {
		delete(r.open, k)
		r.done.add(k, r.cfg.Now())
		if f.Outcome.Failed() {
			r.failed++
		}
	} else {
		r.open[k] = f
	}
	switch {
	case r.cfg.ByEndpoint:
		r.listed = append(r.listed, f)
	case r.term != nil:
		r.onTerminal(k, f, !known)
	case r.cfg.Paths && !r.cfg.Updates && !r.cfg.List:
		r.await(k, f)
	case f.Ended || r.cfg.Updates || r.cfg.List:
		r.show(k, f)
	}
}

// show prints a flow off a terminal.
func (r *renderer) show(_ key, f *trace.Flow) {
	r.head()
	r.lastRow = r.cfg.Now()
	switch r.cfg.Format {
	case JSON, JSONL:
		r.object(f)
	default:
		r.line(r.row(f)(0))
		if r.cfg.Format == Path {
			r.trees(f)
		}
	}
}

// row returns a function that lays out f for a width, as it is now.
func (r *renderer) row(f *trace.Flow) func(width int) string {
	now := r.cfg.Now()
	var paint func(string) string
	if r.cfg.Colour {
		paint = painter(f)
	}
	return func(width int) string { return r.table.row(f, now, width, paint) }
}

func (r *renderer) object(f *trace.Flow) {
	data, err := json.Marshal(ToJSON(f))
	if err != nil {
		r.writeErr = fmt.Errorf("text: encoding flow %s: %w", f.ID, err)
		return
	}
	if r.cfg.Format == JSON {
		r.openDocument()
		if r.objects > 0 {
			r.write(",\n")
		}
		r.write(string(data))
	} else {
		r.line(string(data))
	}
	r.objects++
}

// directJSON is the count of connections past the Service, in a JSON document.
func (r *renderer) directJSON() string {
	return fmt.Sprintf(`"direct":{"pods":%d,"node":%d,"elsewhere":%d}`, r.direct.Pods, r.direct.Node, r.direct.Elsewhere)
}

// openDocument begins the JSON document, once.
func (r *renderer) openDocument() {
	if r.objects == 0 {
		r.write(fmt.Sprintf("{\"schemaVersion\":%d,\"flows\":[\n", SchemaVersion))
	}
}

func (r *renderer) line(s string) { r.write(s + "\n") }

func (r *renderer) write(s string) {
	if r.writeErr == nil {
		_, r.writeErr = r.out.WriteString(s)
	}
}

func (r *renderer) flush() {
	if r.writeErr == nil {
		r.writeErr = r.out.Flush()
	}
}

// talk prints lines that are not data, in their place among the rows.
func (r *renderer) talk(lines ...string) {
	if r.term != nil {
		r.term.note(lines...)
		return
	}
	r.flush()
	for _, l := range lines {
		fmt.Fprintln(r.err, l)
	}
}

func (r *renderer) tick() {
	now := r.cfg.Now()
	if len(r.headers) > 0 && now.Sub(r.begun) > headerWait {
		r.head()
	}
	r.done.forget(now)
	r.pathsDue(now)
	if r.term != nil {
		r.folded(now)
		r.term.draw()
	}
	r.flush()
}

// end shows what is left, and the summary.
func (r *renderer) end() error {
	if len(r.headers) > 0 {
		r.head()
	}
	r.pathsDue(time.Time{})
	left := make([]*trace.Flow, 0, len(r.open))
	keys := make(map[*trace.Flow]key, len(r.open))
	for k, f := range r.open {
		left = append(left, f)
		keys[f] = k
	}
	slices.SortFunc(left, trace.CompareFlows)
	for _, f := range left {
		if f.Outcome.Failed() {
			r.failed++
		}
		if r.term == nil && !r.cfg.Updates && !r.cfg.List {
			r.show(keys[f], f)
		}
	}
	r.list()
	if r.term != nil {
		r.fold.finish(r)
		r.term.draw()
	}
	told := len(r.headers) > 0 || r.cfg.Recorded
	if r.cfg.Format == JSON && told {
		r.openDocument()
		r.write("\n]," + r.directJSON() + "}\n")
	}
	if told {
		r.talk(r.summary(len(left)))
	}
	if r.term != nil {
		r.term.draw()
	}
	r.flush()
	return r.writeErr
}

// recent remembers flows for a time, in two generations.
type recent struct {
	young, old map[key]struct{}
	turned     time.Time
}

func (c *recent) add(k key, now time.Time) {
	if c.young == nil {
		c.young, c.turned = make(map[key]struct{}), now
	}
	c.young[k] = struct{}{}
}

func (c *recent) has(k key) bool {
	if _, ok := c.young[k]; ok {
		return true
	}
	_, ok := c.old[k]
	return ok
}

func (c *recent) forget(now time.Time) {
	if now.Sub(c.turned) >= doneFor || len(c.young) >= doneMost {
		c.old, c.young, c.turned = c.young, make(map[key]struct{}), now
	}
}
