package load

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/trace"
)

// plan says how long to measure: rounds of pairs, each half of which lasts
// so long.
type plan struct {
	rounds int
	each   time.Duration
}

// workload is what a connection does.
type workload struct {
	name string
	port uint16
	// wrk is the program that connects; empty for our own clients.
	wrk string
}

// workloads differ in what the connection itself costs: a bare one is as cheap
// as client and server can make it, http has a usual HTTP server, and wrk, if
// it is installed, a usual client too.
func workloads() []workload {
	list := []workload{{name: "http", port: 81}, {name: "bare", port: 80}}
	if path, err := exec.LookPath("wrk"); err == nil {
		list = append(list, workload{name: "wrk", port: 81, wrk: path})
	}
	return list
}

func thePlan() plan {
	if os.Getenv("BENCH_SHORT") != "" {
		return plan{1, 200 * time.Millisecond}
	}
	return plan{9, 500 * time.Millisecond}
}

// variant is a way to watch a node, to be compared with not watching it.
type variant struct {
	name string
	// rules says whether there are rules that report, kptrace whether it
	// traces, observer what else reads them.
	rules, kptrace bool
	observer       string
	// program is a peer with its arguments. It runs only while it is measured:
	// the kernel asks whether anybody on the machine listens to a kind of
	// conntrack event, so a peer that wants all of them costs every node.
	program []string
}

// variants are measured in both flavours where both is set.
var variants = []struct {
	variant
	both bool
}{
	{variant{name: "nothing (a second node without)"}, true},
	{variant{name: "rules, nobody listens", rules: true}, true},
	{variant{name: "rules, NFLOG read and decoded", rules: true, observer: "nflog"}, false},
	{variant{name: "conntrack events read and decoded", observer: "conntrack"}, false},
	{variant{name: "both read and decoded", rules: true, observer: "both"}, false},
	{variant{name: "kptrace: tracing always on", rules: true, kptrace: true}, true},
	{variant{name: "peer: go-nflog on the same rules", rules: true, observer: "go-nflog"}, false},
	{variant{name: "peer: conntrack -E", program: []string{"conntrack", "-E"}}, false},
}

// sample is one measured half of a pair.
type sample struct {
	conns   int
	elapsed time.Duration
	// all is the processor time of clients, servers and the watcher together,
	// watcher that of the watcher alone.
	all, watcher time.Duration
	// others is that of everybody else on the machine.
	others time.Duration
}

func (s sample) rate() float64 { return float64(s.conns) / s.elapsed.Seconds() }
func (s sample) cost() float64 { return float64(s.all) / float64(s.conns) }

// measure lets as many clients as there are processors connect as fast as
// they can.
func (p *place) measure(l workload, d time.Duration) sample {
	p.w.t.Helper()
	pids := []int{os.Getpid()}
	if p.watcher != nil {
		pids = append(pids, p.watcher.PID())
	}
	used := func() (all, watcher time.Duration) {
		for i, pid := range pids {
			c := cpu(p.w.t, pid)
			if all += c; i > 0 {
				watcher += c
			}
		}
		return all, watcher
	}
	all, watcher := used()
	busy := busyTime(p.w.t)
	start := time.Now()
	if l.wrk != "" {
		s := sample{conns: p.wrk(l, d)}
		p.flush()
		s.elapsed = time.Since(start)
		return s
	}
	results := make([]Result, runtime.NumCPU())
	var g errgroup.Group
	for i := range results {
		g.Go(func() (err error) {
			results[i], err = p.run(context.Background(), Config{
				Target:   netip.AddrPortFrom(p.service.Addr(), l.port),
				Duration: d, Concurrency: 32,
			})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		p.w.t.Fatal(err)
	}
	p.flush()
	s := sample{elapsed: time.Since(start)}
	now, _ := used()
	s.others = max(0, busyTime(p.w.t)-busy-(now-all))
	for i := range results {
		s.conns += results[i].Done
		if f := results[i].Failed(); f > 0 || results[i].Done == 0 {
			p.w.t.Errorf("%s: %s", p.name, results[i].String())
		}
	}
	if s.conns == 0 {
		p.w.t.FailNow()
	}
	// Whoever watches has some of it still to read.
	for last := time.Duration(-1); ; {
		s.all, s.watcher = used()
		if p.watcher == nil || s.watcher-last < time.Millisecond {
			break
		}
		last = s.watcher
		time.Sleep(100 * time.Millisecond)
	}
	s.all -= all
	s.watcher -= watcher
	return s
}

// wrk lets wrk connect with 32 connections, one request each, and returns how
// many it made. It measures in whole seconds. Its processor time is not ours
// to see.
func (p *place) wrk(l workload, d time.Duration) int {
	p.w.t.Helper()
	var out bytes.Buffer
	url := "http://" + netip.AddrPortFrom(p.service.Addr(), l.port).String() + "/"
	c, err := p.w.lab.Exec(lab.PodSpace(p.name, "client"), exec.Spec{
		Path: l.wrk, Args: []string{"-t2", "-c32", fmt.Sprintf("-d%ds", max(1, int(d.Seconds()+0.5))), "-H", "Connection: close", url},
		Stdout: &out, Stderr: &out,
	})
	if err != nil {
		p.w.t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		p.w.t.Fatalf("wrk: %v\n%s", err, &out)
	}
	var n int
	for line := range strings.Lines(out.String()) {
		if _, err := fmt.Sscanf(line, " %d requests in", &n); err == nil {
			return n
		}
	}
	p.w.t.Fatalf("wrk says no number:\n%s", &out)
	return 0
}

// busyTime is how long all processors have worked, to the hundredth of a
// second (proc_stat(5)).
func busyTime(t testing.TB) time.Duration {
	t.Helper()
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	var user, nice, system, idle, wait, irq, softirq int64
	if _, err := fmt.Sscanf(string(text), "cpu %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &wait, &irq, &softirq); err != nil {
		t.Fatalf("reading /proc/stat: %v", err)
	}
	return time.Duration(user+nice+system+irq+softirq) * 10 * time.Millisecond
}

// result is what the pairs of one variant came to.
type result struct {
	variant
	on, off        []sample
	objects, bytes float64 // allocated per connection
	heap           uint64
	path, absent   string // of the peer, or why there is none
	conns          int
	losses         []trace.Loss
	published      uint64
}

// BenchmarkTracing measures what watching costs: new connections per second
// through a ClusterIP on saturated processors, without and with, in pairs
// that alternate within one run. It prints a table of its own; the metrics
// are those of tracing always on.
func BenchmarkTracing(b *testing.B) {
	for _, flavour := range []string{"nft", "legacy"} {
		for _, l := range workloads() {
			b.Run(flavour+"/"+l.name, func(b *testing.B) {
				for b.Loop() { // once: it takes longer than a benchtime
					benchmark(b, flavour, l)
				}
			})
		}
	}
}

func benchmark(b *testing.B, flavour string, l workload) {
	b.Helper()
	var results []*result
	for _, v := range variants {
		if (v.both || flavour == "nft" && l.name == "bare") && strings.Contains(v.name, os.Getenv("BENCH_ONLY")) {
			results = append(results, &result{variant: v.variant})
		}
	}
	w := newWorld(b, len(results)+1)
	off := w.place(len(results))
	off.proxy("-iptables-flavour="+flavour, "-rules=false", "-trace=false")
	places := make([]*place, len(results))
	for i, r := range results {
		places[i] = w.place(i)
		places[i].set(r, flavour, l)
	}
	pl := thePlan()
	for range pl.rounds {
		for i, r := range results {
			if r.absent != "" {
				continue
			}
			// The order turns around each time: off, on, on, off, off, on …
			if len(r.on)%2 == 0 {
				r.off = append(r.off, off.measure(l, pl.each))
				r.on = append(r.on, places[i].watched(r, l, pl.each))
			} else {
				r.on = append(r.on, places[i].watched(r, l, pl.each))
				r.off = append(r.off, off.measure(l, pl.each))
			}
		}
	}
	for i, r := range results {
		r.finish(places[i])
	}
	printTable(os.Stdout, flavour, l, pl, results)
	for _, r := range results {
		if r.kptrace {
			rate, _, _ := spread(r.pairs(sample.rate))
			b.ReportMetric(rate, "conns/s-ratio")
			if l.wrk == "" {
				cost, _, _ := spread(r.pairs(sample.cost))
				b.ReportMetric(cost, "cpu-ratio")
			}
		}
	}
}

// watched measures while a variant watches.
func (p *place) watched(r *result, l workload, d time.Duration) sample {
	if r.path == "" {
		return p.measure(l, d)
	}
	p.watcher = p.start(r.path, r.program[1:]...)
	time.Sleep(100 * time.Millisecond)
	s := p.measure(l, d)
	p.watcher.stop()
	p.watcher = nil
	return s
}

// set starts what watches a node, and connects a little so that all is warm.
func (p *place) set(r *result, flavour string, l workload) {
	p.w.t.Helper()
	proxy := p.proxy("-iptables-flavour="+flavour, fmt.Sprintf("-rules=%v", r.rules), fmt.Sprintf("-trace=%v", r.kptrace))
	switch {
	case r.kptrace:
		p.watcher = proxy
	case r.observer != "":
		p.watcher = p.start("kptrace", "observe", "-what="+r.observer)
	case r.program != nil:
		var err error
		if r.path, err = exec.LookPath(r.program[0]); err != nil {
			r.absent = "peer not installed"
		}
	}
	if p.watcher != nil {
		time.Sleep(100 * time.Millisecond)
		p.measure(l, 200*time.Millisecond)
		m := p.watcher.memory(p.w.t)
		r.objects, r.bytes = -float64(m.Objects), -float64(m.Bytes)
	}
	if r.kptrace {
		r.published = p.status().Ring.Published
	}
}

func (r *result) finish(p *place) {
	for _, s := range r.on {
		r.conns += s.conns
	}
	if p.watcher == nil || r.conns == 0 {
		return
	}
	m := p.watcher.memory(p.w.t)
	r.objects, r.bytes, r.heap = (r.objects+float64(m.Objects))/float64(r.conns), (r.bytes+float64(m.Bytes))/float64(r.conns), m.Heap
	if r.kptrace {
		st := p.status()
		r.losses, r.published = st.Losses, st.Ring.Published-r.published
		if st.Ring.Published == 0 {
			p.w.t.Error("kptrace saw nothing")
		}
	}
}

// pairs are the ratios of a figure with to that without.
func (r *result) pairs(figure func(sample) float64) []float64 {
	var list []float64
	for i := range r.on {
		list = append(list, figure(r.on[i])/figure(r.off[i]))
	}
	return list
}

// spread returns the median, the least and the most.
func spread(list []float64) (median, least, most float64) {
	if len(list) == 0 {
		return 0, 0, 0
	}
	list = slices.Sorted(slices.Values(list))
	n := len(list)
	return (list[(n-1)/2] + list[n/2]) / 2, list[0], list[n-1]
}

func printTable(out io.Writer, flavour string, l workload, pl plan, results []*result) {
	fmt.Fprintf(out, "\nNew connections through a ClusterIP, %s, iptables-%s, %s, %d processors, %d pairs of %v each:\n\n",
		l.name, flavour, kernel(), runtime.NumCPU(), pl.rounds, pl.each)
	tw := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "what watches\tconn/s\trate against none\tcpu of all against none\twatcher's cpu s/1000\tallocations\tbytes\theap")
	for _, r := range results {
		if r.absent != "" {
			fmt.Fprintf(tw, "%s\t%s\n", r.name, r.absent)
			continue
		}
		var rates []float64
		var watcher time.Duration
		for _, s := range r.on {
			rates = append(rates, s.rate())
			watcher += s.watcher
		}
		rate, _, _ := spread(rates)
		cost := "not ours to see"
		if l.wrk == "" {
			cost = percent(spread(r.pairs(sample.cost)))
		}
		line := []string{r.name, fmt.Sprintf("%.0f", rate), percent(spread(r.pairs(sample.rate))), cost}
		if watcher > 0 {
			line = append(line, fmt.Sprintf("%.4f", watcher.Seconds()/float64(r.conns)*1000))
		}
		if r.objects > 0 {
			line = append(line, fmt.Sprintf("%.1f", r.objects), fmt.Sprintf("%.0f", r.bytes), fmt.Sprintf("%.0f MB", float64(r.heap)/1e6))
		}
		fmt.Fprintln(tw, strings.Join(line, "\t"))
	}
	tw.Flush()
	var none []float64
	for _, r := range results {
		for _, s := range r.off {
			none = append(none, s.rate())
		}
		for _, l := range r.losses {
			fmt.Fprintf(out, "lost with %s: %d of %s at %s\n", r.name, l.Events, l.Source, l.Where)
		}
		if r.kptrace {
			fmt.Fprintf(out, "%s: %d connections, %.2f updates each\n", r.name, r.conns, float64(r.published)/float64(r.conns))
		}
	}
	var others, elapsed time.Duration
	for _, r := range results {
		for _, s := range slices.Concat(r.on, r.off) {
			others += s.others
			elapsed += s.elapsed
		}
	}
	if share := others.Seconds() / elapsed.Seconds() / float64(runtime.NumCPU()); share > 0.03 {
		fmt.Fprintf(out, "CAUTION: other programs used %.0f %% of the processors meanwhile: the rates mean little, the processor times somewhat more\n", 100*share)
	}
	median, least, most := spread(none)
	fmt.Fprintf(out, "without: %.0f conn/s (%.0f to %.0f)\n", median, least, most)
}

func percent(median, least, most float64) string {
	return fmt.Sprintf("%+.1f %% (%+.1f to %+.1f)", 100*(median-1), 100*(least-1), 100*(most-1))
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "Linux"
	}
	return "Linux " + unix.ByteSliceToString(u.Release[:])
}
