package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/ipvs"
	"github.com/kptrace/kptrace/proxy/userspace"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/record"
)

// replayFlags are the flags of kptrace replay: some of follow's, and its own.
type replayFlags struct {
	follow followFlags
	pcapng string
}

func newReplayCmd() *cobra.Command {
	f := &replayFlags{}
	cmd := &cobra.Command{
		Use:   "replay FILE [svc/NAME...]",
		Short: "Show what kptrace record kept; on any machine",
		Long: `Show what kptrace record kept, or a bug report holds, through the same decoders, filters and outputs as
follow. It needs no root and no Linux.

--pcapng writes the packets that rules reported, each with the decision about its
connection as a comment, for Wireshark and tshark. They are as long as was
copied: 64 bytes, which is headers.

A file that was cut off or damaged is shown as far as it is readable; that is
said, and the exit code is 1.`,
		Example: `  # Everything in it
  kptrace replay node1.ktr -A

  # What failed of one Service
  kptrace replay node1.ktr svc/foo -n shop --outcome failed -o wide

  # Of a bug report
  kptrace replay report.tar.gz -A -o wide

  # For Wireshark
  kptrace replay node1.ktr -A --pcapng node1.pcapng
  tshark -r node1.pcapng -T fields -e frame.time -e ip.dst -e frame.comment`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErr(errors.New("say which file: kptrace replay FILE"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd.Context(), args[0], args[1:], cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	fl := cmd.Flags()
	w := &f.follow
	fl.StringVarP(&w.namespace, "namespace", "n", cmp.Or(os.Getenv("KPTRACE_NAMESPACE"), "default"), "namespace of the resources ($KPTRACE_NAMESPACE)")
	fl.BoolVarP(&w.allNamespaces, "all-namespaces", "A", false, "all namespaces")
	fl.StringArrayVar(&w.from, "from", nil, "only from this client: pod/x, deploy/x, ns/x, node/x, an address or a range")
	fl.StringArrayVar(&w.to, "to", nil, "only to this endpoint (as --from), or svc/x, or the address dialled")
	fl.StringArrayVar(&w.ports, "port", nil, "only to this Service port, by number or name")
	fl.StringSliceVar(&w.outcomes, "outcome", nil, "only with this outcome, as of kptrace follow")
	fl.BoolVar(&w.direct, "direct", false, "show connections too that reached the Service's endpoints without the Service; the last line counts them anyway")
	fl.DurationVar(&w.minDuration, "min-duration", 0, "only if it lasted at least this long, as 500ms")
	fl.StringVarP(&w.output, "output", "o", string(text.Line), "line, wide, path (rule by rule, where paths were traced), json (one document) or jsonl (one object a line)")
	fl.BoolVar(&w.noHeader, "no-header", false, "leave out scope and titles")
	fl.StringVar(&f.pcapng, "pcapng", "", "write the packets to this file, with decisions as comments, instead of showing connections")
	completeFrom(cmd, "outcome", outcomeWords())
	completeFrom(cmd, "output", []string{"line", "wide", "path", "json", "jsonl"})
	return cmd
}

func (f *replayFlags) run(ctx context.Context, name string, args []string, stdin io.Reader, out, talk io.Writer) error {
	req, err := f.follow.request(args, time.Now())
	if err != nil {
		return usageErr(err)
	}
	in := stdin
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return err
		}
		defer file.Close()
		in = file
	}
	in, cut, err := openRecording(in)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	rec, err := record.NewReader(in)
	if err != nil {
		return fmt.Errorf("%s: %w", name, errors.Join(err, cut))
	}
	h := rec.Header()
	flows := newReplayed()
	cfg := node.ReplayConfig{Recording: rec, Program: programOf, Emit: flows.put, Loss: flows.lost, Direct: f.follow.direct}
	if f.pcapng != "" {
		cfg.Packet = flows.packet
	}
	stats, err := node.Replay(cfg)
	if err = errors.Join(err, cut); err != nil {
		err = fmt.Errorf("%s: %w", name, err)
	}
	if !f.follow.noHeader {
		fmt.Fprintf(talk, "%s: %s on %s, recorded from %s for %s by kptrace %s\n", name, h.Mode, h.Node,
			h.Started.Format(time.RFC3339), max(0, stats.Last.Sub(h.Started)).Round(100*time.Millisecond), h.Version)
	}
	if n := stats.Dropped; n > 0 {
		fmt.Fprintf(talk, "note: the recorder did not come to %d frames\n", n)
	}
	if n := stats.Skipped; n > 0 {
		fmt.Fprintf(talk, "note: %d frames are of sources that this kptrace does not know: a newer one wrote them\n", n)
	}
	if n := stats.StrayPaths; n > 0 {
		fmt.Fprintf(talk, "note: %d of %d paths are of connections that are not in the recording\n", n, stats.Paths)
	}
	if f.follow.output == string(text.Path) && stats.Paths == 0 {
		fmt.Fprintln(talk, "note: no paths were traced while this was recorded: kptrace record --packets 1 does")
	}
	if note := flows.unselected(&req.Filter); note != "" {
		fmt.Fprintln(talk, "note:", note)
	}
	if f.pcapng != "" {
		return errors.Join(err, flows.write(f.pcapng, &h, &req.Filter, talk))
	}
	return errors.Join(err, flows.show(ctx, f, h.Node, &req.Filter, &stats, out, talk))
}

// programOf makes the program of a mode whose rules do not tell what they mean,
// nil for others.
func programOf(s *record.State) proxy.Program {
	switch s.Mode {
	case proxy.Userspace:
		return userspace.New(userspace.Config{Trace: true}).Render(s.Snapshot, s.Overlay)
	case proxy.IPVS:
		if b, err := ipvs.New(ipvs.Config{Trace: true}); err == nil {
			return b.Render(s.Snapshot, s.Overlay)
		}
	}
	return nil
}

// replayed keeps what a replay brings.
type replayed struct {
	flows   map[trace.FlowID]*trace.Flow
	order   []trace.FlowID
	losses  []trace.Loss
	packets []packet
}

// packet is a packet that a rule reported.
type packet struct {
	time  int64
	tuple conntrack.Tuple
	data  []byte
	rule  string
}

func newReplayed() *replayed { return &replayed{flows: map[trace.FlowID]*trace.Flow{}} }

func (r *replayed) put(f *trace.Flow) {
	if r.flows[f.ID] == nil {
		r.order = append(r.order, f.ID)
	}
	r.flows[f.ID] = f
}

func (r *replayed) lost(l trace.Loss) { r.losses = append(r.losses, l) }

func (r *replayed) packet(e *trace.Event, data []byte) {
	p := packet{time: e.Time, tuple: e.Tuple, data: slices.Clone(data), rule: e.Kind.String()}
	if e.Rule != nil && e.Rule.Purpose != "" {
		p.rule += ": " + e.Rule.Purpose
	}
	r.packets = append(r.packets, p)
}

// unselected says that a filter selects nothing of what there is, empty if it does.
func (r *replayed) unselected(filter *trace.Filter) string {
	var names []string
	for _, id := range r.order {
		f := r.flows[id]
		if filter.Match(f) {
			return ""
		}
		if name := f.Service.Name.Namespace + "/" + f.Service.Name.Name; !f.Direct() && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	slices.Sort(names)
	what := strings.Join(names[:min(4, len(names))], ", ")
	if more := len(names) - 4; more > 0 {
		what += fmt.Sprintf(" and %d more", more)
	}
	return fmt.Sprintf("none of its %d connections is selected; they are to %s: -A shows all, -n those of a namespace", len(r.order), what)
}

// show prints the flows that a filter selects.
func (r *replayed) show(ctx context.Context, f *replayFlags, nodeName string, filter *trace.Filter, stats *node.ReplayStats, out, talk io.Writer) error {
	stream := make(chan trace.Message)
	go func() {
		defer close(stream)
		for _, id := range r.order {
			flow := r.flows[id]
			if flow.Direct() {
				flow = relay.NameDirect(stats.View, filter, flow)
			}
			if filter.Match(flow) {
				stream <- trace.Message{Node: nodeName, Flow: flow}
			}
		}
		stream <- trace.Message{Node: nodeName, End: &trace.End{Losses: r.losses, Direct: relay.SumDirect(stats.View, filter, stats.Direct)}}
	}()
	t := terminalOf(out)
	err := text.Run(context.WithoutCancel(ctx), text.Config{
		Out: out, Err: talk, Format: text.Format(f.follow.output), Colour: t.colour, Size: t.size,
		NoHeader: f.follow.noHeader, List: true, Recorded: true, Nodes: 1, Paths: f.follow.output == string(text.Path),
	}, stream)
	for range stream { // whoever writes is to end
	}
	return err
}

// write writes the packets of the flows that a filter selects.
func (r *replayed) write(name string, h *record.Header, filter *trace.Filter, talk io.Writer) error {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	of := map[conntrack.Tuple][]*trace.Flow{}
	for _, id := range r.order {
		f := r.flows[id]
		of[f.Tuple] = append(of[f.Tuple], f)
		if !f.Reply.IsZero() {
			of[f.Reply] = append(of[f.Reply], f)
			of[f.Reply.Reverse()] = append(of[f.Reply.Reverse()], f)
		}
	}
	out, n := record.NewPcapng(file, "kptrace "+version, h.Node), 0
	for i := range r.packets {
		p := &r.packets[i]
		f := nearest(of[p.tuple], p.time)
		if f == nil || !filter.Match(f) {
			continue
		}
		n++
		backend := "no endpoint"
		if f.Backend.Addr.IsValid() {
			backend = f.Backend.Addr.String()
		}
		out.Packet(p.time, packetLength(p.data), p.data,
			fmt.Sprintf("%s; flow %s: %s -> %s, %s, %s", p.rule, f.ID, f.Service.Name, backend, text.Why(f), f.Outcome))
	}
	if err := errors.Join(out.Close(), file.Close()); err != nil {
		return err
	}
	fmt.Fprintf(talk, "%s: %d packets of %d connections\n", name, n, len(r.flows))
	return nil
}

// nearest is the flow that began last before a time, for ports recur.
func nearest(list []*trace.Flow, at int64) *trace.Flow {
	var found *trace.Flow
	for _, f := range list {
		if found == nil || f.Start.UnixNano() <= at+int64(time.Millisecond) {
			found = f
		}
	}
	return found
}

// packetLength is how long a packet says it is.
func packetLength(b []byte) int {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		return int(b[2])<<8 | int(b[3])
	case len(b) >= 40 && b[0]>>4 == 6:
		return 40 + (int(b[4])<<8 | int(b[5]))
	}
	return len(b)
}
