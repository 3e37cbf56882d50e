package load

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/exporters/otlp"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/kube/manifests"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/source/ctevent"
	"github.com/kptrace/kptrace/trace/source/nflog"
)

// profileEnv names a folder to which nodes and observers write CPU profiles.
const profileEnv = "KPTRACE_BENCH_PROFILE"

// TestMain lets the test binary play a node's kptrace, an observer, and the
// program of a pod, and runs the tests in a sandbox.
func TestMain(m *testing.M) {
	netns.Init()
	if args := os.Args[1:]; len(args) > 0 {
		switch args[0] {
		case "lab":
			exitWith(lab.RunPod())
		case "proxy":
			exitWith(nodeRole(args[1:]))
		case "observe":
			exitWith(observeRole(args[1:]))
		}
	}
	netns.Main(m)
}

func exitWith(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// whileAsked runs f until SIGTERM. It answers each byte on stdin by a line on
// stdout: what memory has been allocated so far.
func whileAsked(name string, f func(context.Context) error) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	go func() {
		one := make([]byte, 1)
		for {
			if _, err := io.ReadFull(os.Stdin, one); err != nil {
				return
			}
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			_ = json.NewEncoder(os.Stdout).Encode(memory{m.Mallocs, m.TotalAlloc, m.NumGC, m.HeapInuse})
		}
	}()
	if dir := os.Getenv(profileEnv); dir != "" {
		out, err := os.Create(dir + "/" + name + "." + strconv.Itoa(os.Getpid()) + ".pprof")
		if err != nil {
			return err
		}
		defer out.Close()
		if err := pprof.StartCPUProfile(out); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	return f(ctx)
}

// memory is what a Go process has allocated so far.
type memory struct {
	Objects, Bytes uint64
	Cycles         uint32
	Heap           uint64
}

// nodeRole is kptrace proxy as far as measurements need it.
func nodeRole(args []string) error {
	fl := flag.NewFlagSet("proxy", flag.ExitOnError)
	dir := fl.String("manifests", "", "folder of manifests")
	name := fl.String("node", "", "name")
	socket := fl.String("socket", "", "socket")
	flavour := fl.String("iptables-flavour", "nft", "nft or legacy")
	rules := fl.Bool("rules", true, "rules that report")
	traced := fl.Bool("trace", true, "trace")
	metrics := fl.String("metrics", "", "where to serve metrics")
	collector := fl.String("otlp", "", "where to export to")
	sample := fl.Float64("sample", 1, "share to export")
	if err := fl.Parse(args); err != nil {
		return err
	}
	logger := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	var exported *otlp.Config
	if *collector != "" {
		exported = &otlp.Config{
			Endpoint: *collector, Logs: otlp.Signal{Off: true}, Sampling: otlp.Sampling{Ratio: *sample, Slow: time.Second},
		}
	}
	return whileAsked("node-"+*name, func(ctx context.Context) error {
		return node.Run(ctx, node.Config{
			HTTP: node.HTTPConfig{Metrics: *metrics}, OTLP: exported,
			Name: *name, Version: "benchmark",
			Backend: iptables.New(iptables.Config{Flavour: *flavour, Trace: *rules, NFLogGroup: nflog.DefaultGroup,
				LocalhostNodePorts: true, MasqueradeMark: 0x4000}),
			State: manifests.New(manifests.Config{Dir: *dir, Node: *name, Logger: logger}).Run,
			Trace: *traced, NFLogGroup: nflog.DefaultGroup, MasqueradeMark: 0x4000,
			Socket: *socket, Logger: logger,
		})
	})
}

// observeRole reads one of the streams, or both, and does nothing with them.
func observeRole(args []string) error {
	fl := flag.NewFlagSet("observe", flag.ExitOnError)
	what := fl.String("what", "", "nflog, conntrack, both or go-nflog")
	if err := fl.Parse(args); err != nil {
		return err
	}
	return whileAsked("observe-"+*what, func(ctx context.Context) error {
		g, ctx := errgroup.WithContext(ctx)
		run := func(s trace.Source, d trace.Decoder) {
			var events []trace.Event
			g.Go(func() error {
				return s.Run(ctx, func() {}, func(f trace.Frame) { events = d.Decode(f, events[:0]) })
			})
		}
		switch *what {
		case "go-nflog":
			return nflog.Tap(ctx, nflog.TapConfig{Group: nflog.DefaultGroup, CopyRange: 128, ReceiveBuffer: 16 << 20},
				func() {}, func(nflog.TapPacket) {})
		case "nflog", "both":
			s := nflog.New(nflog.Config{})
			run(s, s.Decoder())
		}
		switch *what {
		case "conntrack", "both":
			for _, name := range []string{"acct", "timestamp"} {
				if err := os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_"+name, []byte("1"), 0); err != nil {
					return err
				}
			}
			s := ctevent.New(ctevent.Config{})
			run(s, s.Decoder())
		}
		return g.Wait()
	})
}
