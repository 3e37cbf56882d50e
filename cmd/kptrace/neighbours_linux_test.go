package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/source/ctevent"
	"github.com/kptrace/kptrace/trace/source/nflog"
)

// patient is how long a connection that must be answered may take on a busy machine.
const patient = 20 * time.Second

// connect makes a connection to an address within a limit and says by which port,
// and whether somebody answered.
func (w *world) connect(to string, limit time.Duration) (port int, ok bool) {
	w.t.Helper()
	err := w.ns.Do(func() error {
		d := net.Dialer{Timeout: limit}
		c, err := d.DialContext(w.t.Context(), "tcp", to)
		if err != nil {
			return nil
		}
		defer c.Close()
		port = c.LocalAddr().(*net.TCPAddr).Port
		_ = c.SetDeadline(time.Now().Add(patient))
		_, _ = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
		b, _ := io.ReadAll(c)
		ok = len(b) > 0
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return port, ok
}

// flows are all that the node holds, by the client's port.
func (w *world) flows() map[int]text.FlowJSON {
	w.t.Helper()
	all := map[int]text.FlowJSON{}
	for line := range strings.Lines(w.must("follow", "-A", "-o", "jsonl", "--since", "1h", "--for", "0s")) {
		var f text.FlowJSON
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			w.t.Fatal(err)
		}
		all[int(f.Client.Port)] = f
	}
	return all
}

// TestFlushed wipes all rules of nf_tables under traffic, as firewalld does when it
// reloads. A proxy has its Services back within seconds; an agent has what it added
// back as soon, whenever the other proxy has its own. What is shown of the
// connections meanwhile is right or marked incomplete, and the gap is counted.
func TestFlushed(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"proxy", "agent"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2, 3)})
			w.serve(1, 2, 3)
			var k *child
			if kind == "proxy" {
				k = w.proxy()
				w.synced(k)
			} else {
				w.others("nft")
				k = w.agent()
			}
			good, bad := map[int]bool{}, 0
			visit := func(limit time.Duration) bool {
				port, ok := w.connect("10.96.0.10:80", limit)
				if good[port] = ok; !ok {
					delete(good, port)
					bad++
				}
				return ok
			}
			for range 20 {
				if !visit(patient) {
					t.Fatal("no answer before")
				}
			}
			w.run("", "nft", "flush", "ruleset")
			flushed := time.Now()
			visit(500 * time.Millisecond) // answered only if the repair is that quick
			if kind == "agent" {
				w.others("nft")
			}
			eventually(t, 30*time.Second, "Services again", func() bool { return visit(500 * time.Millisecond) })
			t.Logf("after %v", time.Since(flushed).Round(time.Millisecond))
			eventually(t, 30*time.Second, "the rules that report", func() bool {
				return strings.Contains(save(t, w.ns, "nft"), "-N KPTRACE") || strings.Contains(save(t, w.ns, "nft"), ":KPTRACE ")
			})
			if kind == "agent" {
				k.await(k.err, "others removed rules of ours that report; they are back", 30*time.Second)
			} else {
				k.await(k.err, "others changed our rules; repairing", 30*time.Second)
			}
			for range 20 {
				if !visit(patient) {
					t.Error("no answer afterwards")
				}
			}
			var held map[int]text.FlowJSON
			eventually(t, 30*time.Second, "the end of the connections made since", func() bool {
				held = w.flows()
				n := 0
				for port := range good {
					if f, ok := held[port]; ok && f.Outcome == "closed" {
						n++
					}
				}
				return n >= 40
			})
			for port, f := range held {
				if good[port] && f.Outcome != "closed" && f.Outcome != "open" && f.Outcome != "unknown" {
					t.Errorf("a good connection is shown as %s, %s", f.Outcome, f.Reason)
				}
				if !good[port] && (f.Outcome == "closed" || f.Outcome == "open") {
					t.Errorf("a connection that nobody answered is shown as %s", f.Outcome)
				}
			}
			missing := 0
			for port := range good {
				if _, ok := held[port]; !ok {
					missing++
				}
			}
			s := w.must("status", "-o", "json")
			if !strings.Contains(s, `"where": "rules"`) {
				t.Errorf("the gap is not counted, %d connections are missing: %s", missing, s)
			}
			t.Logf("%d good connections, %d of them not shown; %d without an answer", len(good), missing, bad)
			if code := k.stop(syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d", code)
			}
		})
	}
}

// TestGroupHeld starts beside a program that has our NFLOG group: Services work,
// status and check name it, and tracing begins when it goes.
func TestGroupHeld(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1)})
	w.serve(1)
	w.run("", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
	ctx, release := context.WithCancel(t.Context())
	held, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- w.ns.Do(func() error {
			return nflog.New(nflog.Config{Group: 100}).Run(ctx, func() { close(held) }, func(trace.Frame) {})
		})
	}()
	select {
	case <-held:
	case err := <-done:
		t.Fatal(err)
	}
	w.synced(w.proxy())
	if w.visit("10.96.0.10") == "" {
		t.Error("the Service does not work")
	}
	eventually(t, 20*time.Second, "status to say who holds the group", func() bool {
		s := w.must("status")
		return strings.Contains(s, "group 100") && strings.Contains(s, fmt.Sprint(syscall.Getpid()))
	})
	code, out, _ := w.kptrace("check")
	if code != 0 || !strings.Contains(out, "nflog-held") || !strings.Contains(out, fmt.Sprintf("(process %d) holds NFLOG group 100", syscall.Getpid())) {
		t.Errorf("check: exit %d: %s", code, out)
	}
	release()
	<-done
	eventually(t, 40*time.Second, "connections to be shown", func() bool {
		w.visit("10.96.0.10")
		for _, f := range w.flows() {
			if f.Outcome == "closed" && len(f.Evidence) == 2 {
				return true
			}
		}
		return false
	})
}

// TestConntrackListeners runs beside a program that does what conntrackd does: it
// listens to connection tracking, and reads the table again and again. Neither
// takes anything from the other.
func TestConntrackListeners(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
	w.serve(1, 2)
	ctx, stop := context.WithCancel(t.Context())
	var seen, dumps atomic.Int64
	listening, done := make(chan struct{}), make(chan error, 2)
	go func() {
		src := ctevent.New(ctevent.Config{})
		dec := src.Decoder()
		done <- w.ns.Do(func() error {
			return src.Run(ctx, func() { close(listening) }, func(f trace.Frame) {
				for _, e := range dec.Decode(f, nil) {
					if e.Kind == trace.KindNew && e.Tuple.Dst().Port() == 80 {
						seen.Add(1)
					}
				}
			})
		})
	}()
	go func() {
		done <- w.ns.Do(func() error {
			for ctx.Err() == nil {
				c, err := conntrack.Open(conntrack.Config{})
				if err != nil {
					return err
				}
				err = c.Dump(ctx, func(conntrack.Flow) error { return nil })
				_ = c.Close()
				if err != nil && ctx.Err() == nil {
					return err
				}
				dumps.Add(1)
				time.Sleep(10 * time.Millisecond)
			}
			return nil
		})
	}()
	<-listening
	w.synced(w.proxy())
	const n = 100
	ports := map[int]bool{}
	for range n {
		port, ok := w.connect("10.96.0.10:80", patient)
		if !ok {
			t.Fatal("no answer")
		}
		ports[port] = true
	}
	eventually(t, 20*time.Second, "all connections and their ends, here and there", func() bool {
		closed := 0
		for port, f := range w.flows() {
			if ports[port] && f.Outcome == "closed" && !f.Incomplete && len(f.Evidence) == 2 {
				closed++
			}
		}
		return closed == len(ports) && seen.Load() >= n
	})
	if seen.Load() != n || dumps.Load() == 0 {
		t.Errorf("the other listener saw %d connections, want %d, and read the table %d times", seen.Load(), n, dumps.Load())
	}
	stop()
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestNodeLocal keeps a Service's packets from connection tracking and answers at
// its address on the node, as NodeLocal DNSCache does: the Service's rules see
// nothing, and kptrace says so.
func TestNodeLocal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1)})
	w.serve(1)
	w.run("", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
	w.run("", "ip", "address", "add", "10.96.0.10/32", "dev", "lo")
	for _, rule := range []string{"PREROUTING -d", "OUTPUT -d", "OUTPUT -s"} {
		chain, way, _ := strings.Cut(rule, " ")
		w.run("", "iptables-nft", "-t", "raw", "-A", chain, way, "10.96.0.10/32", "-p", "tcp",
			"-m", "comment", "--comment", "NodeLocal DNS Cache: skip conntrack", "-j", "NOTRACK")
	}
	s := w.start("kptrace", "lab", "serve", "--listen", "10.96.0.10:80")
	s.await(s.out, "ready", 10*time.Second)
	w.synced(w.proxy())
	f := w.start("kptrace", "follow", "svc/foo", "-n", "shop")
	eventually(t, 20*time.Second, "a word on why nothing is shown", func() bool {
		if w.visit("10.96.0.10") == "" {
			t.Fatal("no answer from the cache")
		}
		return strings.Contains(f.err.String(), "kptrace check says: not-tracked shop/foo:http") && strings.Contains(f.err.String(), "NodeLocal DNSCache")
	})
	if got := w.flows(); len(got) != 0 {
		t.Errorf("shown: %+v", got)
	}
	if out := w.must("explain", "svc/foo", "-n", "shop", "--from", "10.0.0.1"); !strings.Contains(strings.ToLower(out), "not tracked") {
		t.Errorf("explain: %s", out)
	}
	code, out, _ := w.kptrace("check")
	if code != 0 || !strings.Contains(out, "not-tracked") || !strings.Contains(out, "NodeLocal DNSCache") {
		t.Errorf("check: exit %d: %s", code, out)
	}
}

// TestMarks has another program use marks of packets and connections, as CNIs do:
// bits of its own change nothing, and the bit by which a kube-proxy masquerades is
// noticed, by its effect and by a check that names the owner.
func TestMarks(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1)})
			w.serve(1)
			w.run("", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
			mangle := func(rules string) {
				w.run("*mangle\n:cali-OUTPUT - [0:0]\n"+rules+"COMMIT\n", "iptables-"+flavour+"-restore", "--noflush")
			}
			mangle(`-A OUTPUT -j cali-OUTPUT
-A cali-OUTPUT -j MARK --set-xmark 0x10000/0xf0000
-A cali-OUTPUT -j CONNMARK --save-mark --nfmask 0xf0000 --ctmask 0xf0000
-A POSTROUTING -j CONNMARK --restore-mark --nfmask 0xf0000 --ctmask 0xf0000
`)
			before := save(t, w.ns, flavour)
			w.synced(w.proxy("--cluster-cidr", "10.0.0.0/8", "--iptables-flavour", flavour))
			w.visit("10.96.0.10")
			w.shown("a connection as ever", func(f *text.FlowJSON) bool {
				return f.Service.Name == "foo" && f.Outcome == "closed" && f.Decision.Masquerade == "no"
			})
			if code, out, _ := w.kptrace("check"); code != 0 || out != "" {
				t.Errorf("check: exit %d: %s", code, out)
			}
			for _, line := range strings.Split(before, "\n") {
				if !strings.Contains(save(t, w.ns, flavour), line) {
					t.Errorf("the proxy took away %q", line)
				}
			}
			mangle("-A cali-OUTPUT -j MARK --set-xmark 0x4000/0x4000\n")
			w.visit("10.96.0.10")
			w.shown("a connection masqueraded for its mark", func(f *text.FlowJSON) bool {
				return f.Service.Name == "foo" && f.Outcome == "closed" && f.Decision.Masquerade == "marked"
			})
			code, out, _ := w.kptrace("check")
			if code != 0 || !strings.Contains(out, "mark-overlap") || !strings.Contains(out, "(Calico) sets the bit 0x4000") {
				t.Errorf("check: exit %d: %s", code, out)
			}
		})
	}
}
