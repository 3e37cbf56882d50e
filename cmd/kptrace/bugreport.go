package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/bundle"
	"github.com/kptrace/kptrace/trace/check"
	"github.com/kptrace/kptrace/trace/record"
	"github.com/kptrace/kptrace/trace/record/redact"
)

// bugreportFlags are the flags of kptrace bugreport.
type bugreportFlags struct {
	output   string
	duration time.Duration
	packets  string
	redact   string
	sockets  []string
}

func newBugreportCmd() *cobra.Command {
	f := &bugreportFlags{}
	cmd := &cobra.Command{
		Use:   "bugreport",
		Short: "Put all about a node into one file that can be sent to others",
		Long: `Put into one file what others need to understand what happens on a node: what
kptrace says of itself and finds, recent failures, metrics, the rules of both
kinds of iptables and of nft, ipsets, virtual servers, settings, versions, and a
recording of some seconds. Without a kptrace that runs here it holds what can be
read from the kernel, and says what is missing.

The file replays: kptrace replay shows its recording, kptrace explain --rules and
kptrace check --rules read its rules.

Names of namespaces, Services, pods, workloads and nodes, and addresses that are
not private, are replaced in all of it, everywhere by the same; so rules still
match, and odds and paths are what they were. Addresses keep common prefixes.
With --redact all every address is replaced. Nobody can go back: the key of the
replacement is not kept. Payload is never in it. Names of ports, of interfaces,
and of chains of other programs stay: look through it before you publish it.`,
		Example: `  # Ten seconds of this node
  kptrace bugreport

  # With the ways of first packets, and no address as it is
  kptrace bugreport --packets 1 --redact all -o report.tar.gz

  # Elsewhere, on any system
  kptrace replay report.tar.gz -A -o path
  kptrace explain --rules report.tar.gz`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return f.run(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	fl := cmd.Flags()
	fl.SortFlags = false
	fl.StringVarP(&f.output, "output", "o", "", "file to write, or - for stdout (default: kptrace-bugreport-TIME.tar.gz)")
	fl.DurationVar(&f.duration, "for", 10*time.Second, "how long to record; 0s records nothing")
	fl.StringVar(&f.packets, "packets", "", "trace rule by rule this many packets of each direction of new connections meanwhile")
	fl.StringVar(&f.redact, "redact", string(redact.Names), "what to replace: names (and public addresses), all (every address too), none")
	addSocketFlag(cmd, &f.sockets)
	completeFrom(cmd, "redact", []string{"names", "all", "none"})
	return cmd
}

func (f *bugreportFlags) run(ctx context.Context, out, talk io.Writer) error {
	level, err := redact.ParseLevel(f.redact)
	if err != nil {
		return usageErr(fmt.Errorf("--redact %q: use names, all or none", f.redact))
	}
	if f.duration < 0 {
		return usageErr(fmt.Errorf("--for %v: use a time of 0s or more", f.duration))
	}
	tracing, err := (&followFlags{packets: f.packets, duration: f.duration}).path()
	if err != nil {
		return usageErr(err)
	}
	made := time.Now()
	r := &report{ctx: ctx, talk: talk}
	clients, err := connect(ctx, f.sockets, false, talk)
	switch {
	case err == nil:
		defer closeAll(clients)
		if len(clients) != 1 {
			return usageErr(fmt.Errorf("%d nodes run here: say which by --socket", len(clients)))
		}
		err = r.ask(clients[0], f.duration, tracing)
	case len(f.sockets) > 0 || os.Getenv("KPTRACE_SOCKET") != "": // those were meant
	case errors.Is(err, relay.ErrNotRunning):
		fmt.Fprintln(talk, "note: no kptrace runs here: this is what the kernel says")
		err = r.look()
	case errors.Is(err, fs.ErrPermission):
		fmt.Fprintf(talk, "note: this is what the kernel says, for %v\n", err)
		err = r.look()
	}
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := r.write(&b, level, made); err != nil {
		return err
	}
	for _, file := range r.files {
		if file.Why != "" {
			fmt.Fprintf(talk, "note: without %s: %s\n", file.Name, file.Why)
		}
	}
	name := f.output
	if name == "-" {
		_, err = out.Write(b.Bytes())
		return err
	}
	if name == "" {
		name = "kptrace-bugreport-" + made.UTC().Format("20060102T150405Z") + ".tar.gz"
	}
	if err := os.WriteFile(name, b.Bytes(), 0o600); err != nil {
		return err
	}
	what := map[redact.Level]string{
		redact.None: "names and addresses are in it as they are", redact.Names: "names and public addresses are replaced",
		redact.All: "names and addresses are replaced",
	}[level]
	fmt.Fprintf(talk, "%s: %d bytes, %s; look through it before you send it on: tar -tzf, kptrace replay, kptrace explain --rules\n", name, b.Len(), what)
	return nil
}

// report is a bug report in the making.
type report struct {
	ctx    context.Context
	talk   io.Writer
	node   string
	files  []bundle.File
	status *relay.Status
}

func (r *report) add(name, about string, data []byte, err error) {
	f := bundle.File{Name: name, About: about, Data: data}
	if err != nil {
		f.Data, f.Why = nil, err.Error()
	}
	r.files = append(r.files, f)
}

func (r *report) addJSON(name, about string, v any, err error) {
	var b bytes.Buffer
	if err == nil {
		err = printJSON(&b, v)
	}
	r.add(name, about, b.Bytes(), err)
}

// recentFailures bounds the failed connections of a report.
const recentFailures = 1000

// ask gets all from a node that runs.
func (r *report) ask(c *relay.Client, duration time.Duration, tracing trace.PathRequest) error {
	s, err := c.Status(r.ctx)
	if err != nil {
		return err
	}
	r.status, r.node = s, s.Node
	r.addJSON("status.json", "what kptrace says of itself (kptrace status -o json)", toStatusJSON(s, c.Socket()), nil)
	found, err := c.Check(r.ctx, relay.CheckRequest{})
	r.addJSON("check.json", "what is wrong with the node (kptrace check -o json)", text.ToCheckJSON(s.Node, found.Findings), err)
	if duration > 0 {
		var rec bytes.Buffer
		err = recordNode(r.ctx, c, tracing, duration, &rec, r.talk)
		r.add(bundle.Recording, "a recording (kptrace replay)", rec.Bytes(), err)
	} else {
		r.add(bundle.Recording, "", nil, errors.New("--for 0s records nothing"))
	}
	var failures bytes.Buffer
	err = c.Flows(context.WithoutCancel(r.ctx), trace.Request{Filter: trace.Filter{Outcomes: failed()}, Last: recentFailures}, func(m trace.Message) error {
		if m.Flow == nil {
			return nil
		}
		return json.NewEncoder(&failures).Encode(text.ToJSON(m.Flow))
	})
	r.add("failures.jsonl", "the last failed connections (kptrace follow -o jsonl)", failures.Bytes(), err)
	got, err := c.Collect(context.WithoutCancel(r.ctx))
	if err != nil {
		r.add(bundle.RulesDir, "", nil, err)
		return nil
	}
	b, err := bundle.Read(bytes.NewReader(got.Bundle))
	if err != nil {
		return fmt.Errorf("what node %s read: %w", s.Node, err)
	}
	for _, e := range b.Manifest.Files {
		data, err := b.File(e.Name)
		r.add(e.Name, e.About, data, err)
	}
	for _, m := range b.Manifest.Missing {
		r.add(m.Name, "", nil, errors.New(m.Why))
	}
	return nil
}

func failed() []trace.Outcome {
	o, err := trace.ParseOutcomes("failed")
	if err != nil {
		panic(err) // the word is ours
	}
	return o
}

// look reads from the kernel what it can, where no kptrace runs.
func (r *report) look() error {
	none := errors.New("no kptrace runs here")
	for _, name := range []string{"status.json", "failures.jsonl", bundle.Recording, "metrics.txt", "config.txt"} {
		r.add(name, "", nil, none)
	}
	if s, _, err := node.Inspect(r.ctx); err != nil {
		r.add("check.json", "", nil, err)
	} else {
		r.addJSON("check.json", "what is wrong with the node (kptrace check -o json)", text.ToCheckJSON("", check.Run(s, check.Options{})), nil)
	}
	r.node, _ = nodeName("")
	r.files = append(r.files, node.Collect(r.ctx)...)
	why := ""
	for i := range r.files {
		switch f := &r.files[i]; {
		case !strings.HasPrefix(f.Name, bundle.RulesDir):
		case f.Why == "":
			return nil
		case why == "":
			why = f.Why
		}
	}
	return fmt.Errorf("no kptrace runs here, and no rules can be read, which takes root: %s", why)
}

// write redacts and writes it.
func (r *report) write(out io.Writer, level redact.Level, made time.Time) error {
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	red := redact.New(level, key)
	r.learn(red)
	for i := range r.files {
		f := &r.files[i]
		if f.Why != "" {
			f.Why = red.Text(f.Why)
			continue
		}
		switch {
		case f.Name == bundle.Recording:
			var b bytes.Buffer
			if err := red.Recording(&b, bytes.NewReader(f.Data)); err != nil && !errors.Is(err, record.ErrCut) {
				return fmt.Errorf("redacting the recording: %w", err)
			}
			f.Data = b.Bytes()
		case strings.HasSuffix(f.Name, "-save.txt"), f.Name == bundle.IPSets:
			f.Data = []byte(red.Rules(string(f.Data)))
		case strings.HasSuffix(f.Name, ".json"), strings.HasSuffix(f.Name, ".jsonl"):
			f.Data = []byte(red.JSON(string(f.Data)))
		case f.Name == "metrics.txt":
			f.Data = []byte(red.Metrics(string(f.Data)))
		case f.Name == "ipvs.txt":
			f.Data = []byte(red.Virtual(string(f.Data)))
		default:
			f.Data = []byte(red.Text(string(f.Data)))
		}
	}
	return bundle.Write(out, bundle.Manifest{Version: version, Made: made.UTC(), Node: red.Node(r.node), Redacted: string(level)}, r.files)
}

// learn takes all names there are, before anything is replaced.
func (r *report) learn(red *redact.Redactor) {
	red.Node(r.node)
	if host, err := os.Hostname(); err == nil {
		red.Node(host)
	}
	var saved strings.Builder
	for _, f := range r.files {
		switch {
		case f.Name == bundle.Recording:
			red.LearnRecording(bytes.NewReader(f.Data))
		case strings.HasSuffix(f.Name, "-save.txt"):
			saved.Write(f.Data)
		case f.Name == bundle.NFTRules:
			if p, err := nftables.Parse(nftables.Config{}, string(f.Data)); err == nil {
				red.LearnRules(p)
			}
		}
	}
	if r.status != nil {
		for _, p := range r.status.Problems {
			red.LearnObject(p.Object)
		}
		for _, s := range r.status.Skipped {
			red.LearnObject("Service " + s.Namespace + "/" + s.Name)
		}
	}
	dumps, err := xtables.ParseDumps(saved.String())
	if err != nil {
		return // there are none, or what is said of it is in the files
	}
	for _, d := range dumps {
		red.LearnRules(liverules.New(liverules.Config{}, d.Rules))
	}
}

// openRecording opens a recording, by itself or in a bug report.
func openRecording(in io.Reader) (rec io.Reader, cut error, err error) {
	buffered := bufio.NewReader(in)
	if !bundle.Is(buffered) {
		return buffered, nil, nil
	}
	b, err := bundle.Read(buffered)
	if b == nil {
		return nil, nil, err
	}
	data, missing := b.File(bundle.Recording)
	if missing != nil {
		return nil, nil, errors.Join(err, missing)
	}
	return bytes.NewReader(data), err, nil
}
