package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/trace"
)

// followFlags are the flags of kptrace follow.
type followFlags struct {
	namespace        string
	allNamespaces    bool
	from, to, ports  []string
	outcomes         []string
	minDuration      time.Duration
	since            string
	last             int
	duration         time.Duration
	limited, byGiven bool // --for, --by was given
	wait, existing   bool
	direct           bool
	updates          bool
	noHeader         bool
	summary          bool
	by               []string
	output           string
	packets          string
	sockets          []string
}

func newFollowCmd() *cobra.Command {
	var f followFlags
	cmd := &cobra.Command{
		Use:   "follow [svc/NAME | pod/NAME | node/NAME | ns/NAME | deploy/NAME ...]",
		Short: "Show what happens to connections to a Service, live",
		Long: `Show what happens to connections to a Service, one line each: who dialled, which
Service port, which endpoint, why that one, and what became of it.

Several resources are joined by "or", and so is one flag given several times;
different flags are joined by "and". Without a resource: all Services of the
namespace. A "*" in a name stands for any text. Filters run in the node that is
asked, which is cheap; nothing on the node is changed, unless paths are asked for.

-o path and --packets show the way of packets rule by rule, as the kernel reports
it: of new connections the SYN and the SYN-ACK, or the first N packets each way.
For that the node puts the Service's addresses into a set in the kernel, whose
entries time out after 15 s unless renewed, and a chain KPTRACE-PATH into the
table raw, which is gone when the last such follower is. It costs the kernel about
50 µs a packet, at most 1,000 packets a second are traced.

Connections that reach the Service's endpoints by their own addresses, past the
Service, are counted in the last line, by who made them; --direct shows them too.
What comes from other nodes may have gone through a Service there.

On a terminal a row is updated in place until its connection ends, and above 20
rows a second good connections are counted instead of shown, failed ones never.
In a pipe each connection comes exactly once: when it ends, or as it stands when
follow ends. Data goes to stdout, everything else to stderr.

Exit codes: 0, 1 for an error, 2 for wrong usage.`,
		Example: `  # Connections to a Service in namespace shop, as they happen
  kptrace follow svc/foo -n shop

  # What failed in the last ten minutes, in all namespaces, and goes on failing
  kptrace follow -A --outcome failed --since 10m

  # From one pod or one network to port http, for half a minute
  kptrace follow svc/foo -n shop --from pod/web --from 10.9.0.0/16 --port http --for 30s

  # As JSON, one object a line
  kptrace follow svc/foo -n shop -o jsonl | jq -r '.backend.pod'

  # The way of each new connection's first packets, rule by rule
  kptrace follow svc/foo -n shop -o path --from pod/web

  # All packets for five seconds, as JSON
  kptrace follow svc/foo -n shop -o jsonl --packets all --for 5s

  # How many failed, by endpoint and reason, in the last hour
  kptrace follow svc/foo -n shop --since 1h --summary --by backend,reason

  # What is open now, by endpoint, with its age
  kptrace follow svc/foo -n shop --existing`,
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"svc/", "pod/", "node/", "ns/", "deploy/"}, cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			f.limited, f.byGiven = cmd.Flags().Changed("for"), cmd.Flags().Changed("by")
			if f.packets != "" && !cmd.Flags().Changed("output") {
				f.output = string(text.Path)
			}
			req, err := f.request(args, time.Now())
			if err != nil {
				return usageErr(err)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return f.run(ctx, req, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVarP(&f.namespace, "namespace", "n", cmp.Or(os.Getenv("KPTRACE_NAMESPACE"), "default"), "namespace of the resources ($KPTRACE_NAMESPACE)")
	flags.BoolVarP(&f.allNamespaces, "all-namespaces", "A", false, "all namespaces")
	flags.StringArrayVar(&f.from, "from", nil, "only from this client: pod/x, deploy/x, ns/x, node/x, an address or a range")
	flags.StringArrayVar(&f.to, "to", nil, "only to this endpoint (as --from), or svc/x, or the address dialled")
	flags.StringArrayVar(&f.ports, "port", nil, "only to this Service port, by number or name")
	flags.StringSliceVar(&f.outcomes, "outcome", nil, "only with this outcome: "+strings.Join(outcomeWords(), ", "))
	flags.DurationVar(&f.minDuration, "min-duration", 0, "only if it lasted at least this long, as 500ms")
	flags.StringVar(&f.since, "since", "", "first what began at most this long ago (10m), or since a time (RFC 3339)")
	flags.IntVar(&f.last, "last", 0, "first the last N connections")
	flags.DurationVar(&f.duration, "for", 0, "end after this time (10s), counted from when all nodes follow, and trace paths if asked to; 0s shows the history only")
	flags.BoolVar(&f.wait, "wait", false, "wait for the Service, and for a kptrace to ask, to appear")
	flags.BoolVar(&f.existing, "existing", false, "list what is open now, by endpoint, with its age, and end")
	flags.BoolVar(&f.direct, "direct", false, "show connections too that reach the Service's endpoints without the Service; the last line counts them anyway")
	flags.BoolVar(&f.updates, "updates", false, "print every change of a connection, not only its end")
	flags.StringVarP(&f.output, "output", "o", string(text.Line), "line, wide, path (rule by rule), json (one document) or jsonl (one object a line)")
	flags.StringVar(&f.packets, "packets", "", "trace rule by rule this many packets of each direction, or all (needs --for), and show them as -o path does unless -o says otherwise; 1 with -o path")
	flags.BoolVar(&f.summary, "summary", false, "count connections of the history instead of listing them, and end")
	flags.StringSliceVar(&f.by, "by", []string{"backend", "reason"}, "what --summary counts by: backend, node, client, client-node, zone, service, reason, outcome")
	flags.BoolVar(&f.noHeader, "no-header", false, "leave out scope and titles")
	addSocketFlag(cmd, &f.sockets)
	completeFrom(cmd, "outcome", outcomeWords())
	completeFrom(cmd, "output", []string{"line", "wide", "path", "json", "jsonl"})
	return cmd
}

func outcomeWords() []string {
	words := []string{"failed"}
	for _, o := range trace.Outcomes() {
		words = append(words, string(o))
	}
	return words
}

// completeFrom offers a flag's values to the shell.
func completeFrom(cmd *cobra.Command, flag string, words []string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // the flag is not there: a slip in this file
	}
}

// request makes the question of the words on the command line.
func (f *followFlags) request(args []string, now time.Time) (trace.Request, error) {
	req := trace.Request{Last: f.last, Wait: f.wait, Direct: f.direct}
	fail := func(err error) (trace.Request, error) { return trace.Request{}, err }
	ns := f.namespace
	if f.allNamespaces {
		ns = ""
	}
	for _, a := range args {
		s, err := trace.ParseResource(a, ns)
		if err != nil {
			return fail(err)
		}
		req.Filter.Resources = append(req.Filter.Resources, s)
	}
	if len(args) == 0 {
		req.Filter.Namespace = ns
	}
	for _, set := range []struct {
		flag  string
		words []string
		into  *[]trace.Selector
	}{{"from", f.from, &req.Filter.From}, {"to", f.to, &req.Filter.To}} {
		for _, w := range set.words {
			s, err := trace.ParseSelector(w, ns)
			if err != nil {
				return fail(fmt.Errorf("--%s %w", set.flag, err))
			}
			*set.into = append(*set.into, s)
		}
	}
	for _, w := range f.ports {
		p, err := trace.ParsePort(w)
		if err != nil {
			return fail(fmt.Errorf("--port: %w", err))
		}
		req.Filter.Ports = append(req.Filter.Ports, p)
	}
	for _, w := range f.outcomes {
		o, err := trace.ParseOutcomes(w)
		if err != nil {
			return fail(fmt.Errorf("--outcome: %w", err))
		}
		req.Filter.Outcomes = append(req.Filter.Outcomes, o...)
	}
	req.Filter.MinDuration = f.minDuration
	since, err := parseSince(f.since, now)
	if err != nil {
		return fail(err)
	}
	req.Since = since
	if req.Path, err = f.path(); err != nil {
		return fail(err)
	}
	return req, f.check(&req)
}

// path reads how many packets' paths are wanted.
func (f *followFlags) path() (trace.PathRequest, error) {
	switch f.packets {
	case "":
		if f.output == string(text.Path) {
			return trace.PathRequest{Packets: 1}, nil
		}
		return trace.PathRequest{}, nil
	case "all":
		if f.duration <= 0 {
			return trace.PathRequest{}, errors.New("--packets all traces every packet, which is heavy: say for how long, as --for 5s")
		}
		return trace.PathRequest{Packets: trace.AllPackets}, nil
	}
	n, err := strconv.Atoi(f.packets)
	if err != nil || n < 1 || n > maxPackets {
		return trace.PathRequest{}, fmt.Errorf("--packets %q: use a number from 1 to %d, or all", f.packets, maxPackets)
	}
	return trace.PathRequest{Packets: n}, nil
}

// maxPackets is the most --packets takes as a number: what is kept of a flow.
const maxPackets = 32

// check refuses what does not go together, with a sentence.
func (f *followFlags) check(req *trace.Request) error {
	formats := []string{string(text.Line), string(text.Wide), string(text.Path), string(text.JSON), string(text.JSONL)}
	switch {
	case !slices.Contains(formats, f.output):
		if near := trace.Similar(f.output, formats); len(near) > 0 {
			return fmt.Errorf("-o: unknown format %q: did you mean %s?", f.output, near[0])
		}
		return fmt.Errorf("-o: unknown format %q: use %s", f.output, strings.Join(formats, ", "))
	case f.direct && (f.summary || f.limited && f.duration == 0):
		return errors.New("--direct: connections past the Service are not kept in the history: it does not go with --summary or --for 0s")
	case f.byGiven && !f.summary:
		return errors.New("--by says what --summary counts by: add --summary")
	case f.summary && (f.output == string(text.Wide) || f.output == string(text.Path)):
		return fmt.Errorf("--summary prints a table, or JSON with -o json: it does not go with -o %s", f.output)
	case f.summary && (f.existing || f.updates || f.limited):
		return errors.New("--summary counts what is held: it does not go with --existing, --updates or --for")
	case f.last < 0:
		return fmt.Errorf("--last %d: use a number above 0", f.last)
	case f.duration < 0:
		return fmt.Errorf("--for %v: use a time above 0", f.duration)
	case f.existing && (f.since != "" || f.last > 0 || f.limited || f.updates):
		return errors.New("--existing lists what is open now: it does not go with --since, --last, --for or --updates")
	case f.packets != "" && (f.output == string(text.Line) || f.output == string(text.Wide)):
		return fmt.Errorf("--packets traces paths, which -o %s does not show: use -o path, json or jsonl", f.output)
	case req.Path.Wanted() && f.packets != "" && (f.existing || f.limited && f.duration == 0):
		return errors.New("--packets traces new connections: it does not go with --existing or --for 0s")
	case f.limited && f.duration == 0 && req.Since.IsZero() && f.last == 0:
		return errors.New("--for 0s shows the history only: say how much of it by --since or --last")
	}
	return nil
}

// parseSince reads an age ("10m") or a time (RFC 3339).
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return now.Add(-d), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	return time.Time{}, fmt.Errorf("--since %q: use an age such as 10m or 2h, or a time such as %s", s, now.Format(time.RFC3339))
}

// run connects, asks and shows until ctx ends or the time is over.
func (f *followFlags) run(ctx context.Context, req trace.Request, out, talk io.Writer) error {
	patience := beginPatience
	if f.wait {
		patience = 0 // the waiting is part of the time
	}
	ctx, begin, stop := limit(ctx, f.duration, patience)
	defer stop()
	clients, err := connect(ctx, f.sockets, f.wait, talk)
	if err != nil {
		return err
	}
	defer closeAll(clients)
	if f.summary {
		return summarise(ctx, out, clients, req, f.by, f.output)
	}
	t := terminalOf(out)
	history := f.limited && f.duration == 0
	cfg := text.Config{
		Out: out, Err: talk, Format: text.Format(f.output), TTY: t.is, Colour: t.colour, Size: t.size,
		Updates: f.updates, NoHeader: f.noHeader, List: f.existing || history, ByEndpoint: f.existing,
		Nodes: len(clients), Paths: req.Path.Wanted(),
	}
	if req.Path.Wanted() && (history || f.existing) {
		fmt.Fprintln(talk, "note: connections that are past have paths only if somebody followed these then")
	}
	if req.Path.Packets == trace.AllPackets {
		fmt.Fprintln(talk, "warning: every packet is traced, which slows these connections down; data of a busy Service is more than can be followed")
	}
	switch {
	case f.updates:
	case t.is:
		req.Interval = 100 * time.Millisecond
	default:
		req.Interval = time.Second
	}
	begun := make(map[*relay.Client]func(), len(clients))
	for _, c := range clients {
		begun[c] = sync.OnceFunc(begin) // not where a node comes back
	}
	return showAll(ctx, cfg, clients, f.wait, func(ctx context.Context, c *relay.Client, show func(trace.Message) error) error {
		fn := func(m trace.Message) error {
			if m.Header != nil {
				begun[c]()
			}
			return show(m)
		}
		switch {
		case f.existing:
			return c.Existing(ctx, req, fn)
		case history:
			return c.Flows(ctx, req, fn)
		}
		return c.Follow(ctx, req, fn)
	})
}

// beginPatience is how long nodes may take to begin with what they are asked for,
// beyond the time that it is to last.
const beginPatience = 30 * time.Second

// limit ends a context so long after the last call of begin, which says that what
// is to last so long has begun, and if that never is called after patience besides.
// A duration of 0 is no limit.
func limit(ctx context.Context, d, patience time.Duration) (limited context.Context, begin, stop func()) {
	ctx, stop = context.WithCancel(ctx)
	if d <= 0 {
		return ctx, func() {}, stop
	}
	timer := time.AfterFunc(d+patience, stop)
	return ctx, func() { timer.Reset(d) }, stop
}

type askFunc func(context.Context, *relay.Client, func(trace.Message) error) error

// showAll asks all nodes at once and shows what they say as one stream. What
// one node does not know another may: a Service unknown everywhere is an
// error, one unknown somewhere is not.
func showAll(ctx context.Context, cfg text.Config, clients []*relay.Client, wait bool, ask askFunc) error {
	stream := make(chan trace.Message, 4096)
	// What ends the asking at once is that nobody reads any more; the end of
	// ctx is an end in order, in which the nodes send the rest.
	quit := make(chan struct{})
	errs := make([]error, len(clients))
	var wg sync.WaitGroup
	asking, stop := context.WithCancel(ctx)
	defer stop()
	for i, c := range clients {
		wg.Go(func() {
			errs[i] = askOne(asking, c, wait, ask, func(m trace.Message) error {
				select {
				case stream <- m:
					return nil
				case <-quit:
					return errNobodyReads
				}
			})
		})
	}
	go func() {
		wg.Wait()
		close(stream)
	}()
	err := text.Run(context.WithoutCancel(ctx), cfg, stream)
	close(quit)
	stop()
	wg.Wait()
	if err != nil {
		return err
	}
	return verdict(errs)
}

var errNobodyReads = errors.New("nobody reads any more") //nolint:gochecknoglobals // a sentinel

// askOne asks one node, again and again with wait: what is not there yet may
// still come, and so may a node that restarts.
func askOne(ctx context.Context, c *relay.Client, wait bool, ask askFunc, fn func(trace.Message) error) error {
	for {
		err := ask(ctx, c, fn)
		again := errors.Is(err, relay.ErrGone) || errors.Is(err, relay.ErrNotReady)
		if !wait || !again {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// verdict makes one error of what the nodes said.
func verdict(errs []error) error {
	var missing error
	answered := false
	for _, err := range errs {
		switch {
		case err == nil:
			answered = true
		case errors.Is(err, relay.ErrNotFound), errors.Is(err, relay.ErrNoDecisions):
			missing = cmp.Or(missing, err)
		case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
			answered = true
		default:
			return err
		}
	}
	if answered {
		return nil
	}
	return missing
}
