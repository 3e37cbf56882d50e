package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/trace"
)

// recordFlags are the flags of kptrace record.
type recordFlags struct {
	output   string
	duration time.Duration
	packets  string
	sockets  []string
}

func newRecordCmd() *cobra.Command {
	f := &recordFlags{}
	cmd := &cobra.Command{
		Use:   "record -o FILE",
		Short: "Keep what a node sees, to look at it again elsewhere",
		Long: `Keep what a node sees from now on, until Ctrl-C or --for: the bytes its sources
read from the kernel, and the state and rules they are to be understood by.
kptrace replay shows it on any machine and system, with the filters and outputs
of follow, and writes it for Wireshark.

--packets N has the node trace the first N packets each way of every new
connection rule by rule, as kptrace follow --packets does with what that costs;
replay -o path shows them. What others have traced meanwhile is kept in any case.

The file holds names and addresses of the cluster, and the first 64 bytes of
packets from the IP header on: headers, and of UDP a few bytes of data.`,
		Example: `  # Ten seconds of a node, then on a laptop
  kptrace record -o node1.ktr --for 10s
  kptrace replay node1.ktr svc/foo -n shop -o wide

  # With the ways of first packets
  kptrace record -o node1.ktr --for 10s --packets 1
  kptrace replay node1.ktr -A -o path`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return f.run(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVarP(&f.output, "output", "o", "", "file to write, or - for stdout")
	cmd.Flags().DurationVar(&f.duration, "for", 0, "end after this time (10s), counted from when the node records, and traces paths if asked to")
	cmd.Flags().StringVar(&f.packets, "packets", "", "trace rule by rule this many packets of each direction, or all (needs --for)")
	addSocketFlag(cmd, &f.sockets)
	return cmd
}

func (f *recordFlags) run(ctx context.Context, out, talk io.Writer) (err error) {
	switch {
	case f.output == "":
		return usageErr(errors.New("say where to: -o FILE"))
	case f.duration < 0:
		return usageErr(fmt.Errorf("--for %v: use a time above 0", f.duration))
	}
	tracing, err := (&followFlags{packets: f.packets, duration: f.duration}).path()
	if err != nil {
		return usageErr(err)
	}
	clients, err := connect(ctx, f.sockets, false, talk)
	if err != nil {
		return err
	}
	defer closeAll(clients)
	if len(clients) != 1 {
		return usageErr(fmt.Errorf("%d nodes run here: say which by --socket", len(clients)))
	}
	if f.output == "-" {
		return recordNode(ctx, clients[0], tracing, f.duration, out, talk)
	}
	file, err := os.OpenFile(f.output, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if f.duration == 0 {
		fmt.Fprintln(talk, "recording; end it by Ctrl-C")
	}
	counted := &counter{w: file}
	err = errors.Join(recordNode(ctx, clients[0], tracing, f.duration, counted, talk), file.Close())
	if errors.Is(err, relay.ErrGone) {
		err = fmt.Errorf("%w; what was recorded until then is in %s", err, f.output)
	}
	if err == nil {
		fmt.Fprintf(talk, "%s: %d bytes; look at it by kptrace replay %s\n", f.output, counted.n, f.output)
	}
	return err
}

// recordNode records a node for a time, or until ctx ends, and meanwhile is a follower
// of paths if they are wanted, which has the node trace them. The time begins when both
// are at work. The paths of what was seen until its end are waited for.
func recordNode(ctx context.Context, c *relay.Client, tracing trace.PathRequest, duration time.Duration, out, talk io.Writer) error {
	ctx, begin, stop := limit(ctx, duration, beginPatience)
	defer stop()
	var missing atomic.Int32
	begun := func() {
		if missing.Add(-1) == 0 {
			begin()
		}
	}
	missing.Store(1)
	recorded := &firstWrite{w: out, first: sync.OnceFunc(begun)}
	if !tracing.Wanted() {
		return c.Record(ctx, recorded)
	}
	missing.Store(2)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		traced := sync.OnceFunc(begun)
		defer traced() // then it is recorded without
		req := trace.Request{Path: tracing, Interval: time.Minute}
		err := c.Follow(ctx, req, func(m trace.Message) error {
			if m.Header != nil {
				traced()
				for _, n := range m.Header.Notes {
					fmt.Fprintln(talk, "note:", n)
				}
			}
			return nil
		})
		if err != nil && ctx.Err() == nil {
			fmt.Fprintln(talk, "note: paths are not traced:", err)
		}
	}()
	recording, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	go func() {
		<-ctx.Done()
		<-ended
		end()
	}()
	err := c.Record(recording, recorded)
	stop()
	<-ended
	return err
}

// firstWrite calls first before what is first written.
type firstWrite struct {
	w     io.Writer
	first func()
}

func (f *firstWrite) Write(b []byte) (int, error) {
	f.first()
	return f.w.Write(b)
}

// counter counts what is written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
