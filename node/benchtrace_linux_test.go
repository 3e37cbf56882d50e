//go:build benchtrace

package node

import (
	"bytes"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace/selection"
)

// TestBenchTrace makes the same burst of connections under the eyes of kptrace and
// of the programs that Debian has, one after the other on one machine, and prints
// how many of the connections each has seen. Times are not compared.
func TestBenchTrace(t *testing.T) {
	say := func(format string, args ...any) { t.Logf(format, args...) }
	say("%-34s %12s  %s", "reader", "connections", "what it says of the rest")
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		b := newBench(t, fl)
		rig := newPathRig(t, b.w.Node, fl, false)
		rig.sel = selection.New(selection.Config{Tools: rig.tools, Flavour: fl, Timeout: time.Minute, Rate: 10_000, Burst: 10_000})
		rig.follow(t.Context(), b.setup.Snapshot, 1)
		b.connect()
		rig.settled(0)
		paths, _ := rig.synPaths(burst)
		st := rig.source.Stats()
		say("%-34s %5d of %d  %d reports lost of %d, counted exactly", "kptrace, iptables-"+fl.String(), paths, burst, st.Lost, st.Lost+st.Events)
	}
	for _, tool := range []struct {
		name string
		args []string
		port *regexp.Regexp
	}{
		{"xtables-monitor", []string{"--trace"}, regexp.MustCompile(`(?:SPORT|SPT)=(\d+)`)},
		{"nft", []string{"monitor", "trace"}, regexp.MustCompile(`tcp sport (\d+)`)},
		{"conntrack", []string{"-E", "-e", "NEW", "-p", "tcp"}, regexp.MustCompile(`sport=(\d+) dport=80`)},
	} {
		b := newBench(t, xtables.NFT)
		tools := xtables.Tools{Netns: b.w.Node.Fd()}
		sel := selection.New(selection.Config{Tools: tools, Flavour: xtables.NFT, Timeout: time.Minute, Rate: 10_000, Burst: 10_000})
		w := b.want()
		w.Packets = 1
		if tool.name != "conntrack" {
			b.w.Must(b.w.Node.Do(func() error { return sel.Set(t.Context(), w) }))
		}
		var out, errs lockedBuffer
		p, err := exec.Start(exec.Spec{Path: tool.name, Args: tool.args, Stdout: &out, Stderr: &errs, Netns: b.w.Node.Fd()})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		b.connect()
		time.Sleep(4 * time.Second)
		how := "it says nothing"
		select {
		case <-p.Done():
			how = "it ended by itself"
		default:
			_ = p.Kill()
			<-p.Done()
		}
		if text := strings.TrimSpace(errs.String()); text != "" {
			how += ": " + strings.Split(text, "\n")[0]
		}
		ports := map[string]bool{}
		for _, m := range tool.port.FindAllStringSubmatch(out.String(), -1) {
			ports[m[1]] = true
		}
		seen := 0
		for i := range burst {
			if ports[fmt.Sprint(10000+i)] {
				seen++
			}
		}
		say("%-34s %5d of %d  %s", tool.name+" "+strings.Join(tool.args, " "), seen, burst, how)
		b.w.Must(b.w.Node.Do(func() error { return sel.Close(t.Context()) }))
	}
}

// bench is a node with one Service of one endpoint.
type bench struct {
	t     *testing.T
	w     *proxytest.World
	setup proxytest.Setup
}

func newBench(t *testing.T, fl xtables.Flavour) *bench {
	b := &bench{t: t, w: proxytest.NewWorld(t, false), setup: proxytest.Setup{
		Snapshot: proxytest.Services("shop/web:p tcp 10.96.3.10:80 c:8080"), ClusterCIDR: proxytest.ClusterCIDR,
	}}
	back := backendFor(b.setup, b.w.Node, fl, false)
	if _, err := back.Apply(t.Context(), back.Render(b.setup.Snapshot, proxy.Overlay{})); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) want() selection.Want {
	return selection.Want{
		To:   []selection.Entry{{Addr: netip.MustParseAddrPort("10.96.3.10:80"), Proto: conntrack.TCP}},
		From: []selection.Entry{{Addr: netip.MustParseAddrPort("10.244.2.2:8080"), Proto: conntrack.TCP}},
	}
}

// connect makes the burst.
func (b *bench) connect() {
	var wg sync.WaitGroup
	for part := range 4 {
		wg.Go(func() {
			_ = b.w.NS[proxytest.FromPod].Do(func() error {
				for i := range burst / 4 {
					proxytest.Send(conntrack.TCP, uint16(10000+part*burst/4+i), netip.MustParseAddrPort("10.96.3.10:80"), 5*time.Second)
				}
				return nil
			})
		})
	}
	wg.Wait()
}

// lockedBuffer is written to by a program and read by the test.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
