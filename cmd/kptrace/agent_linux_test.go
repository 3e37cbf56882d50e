package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/internal/xtables"
)

// agent starts kptrace agent and waits until it watches.
func (w *world) agent(flags ...string) *child {
	w.t.Helper()
	a := w.start("kptrace", append([]string{"agent", "--manifests", w.manifests, "--node", "node1"}, flags...)...)
	w.synced(a)
	return a
}

// others gives the world the rules that a kube-proxy of its own would write for
// its manifests; nobody keeps them.
func (w *world) others(flavour string) {
	w.t.Helper()
	rules := w.must("proxy", "--manifests", w.manifests, "--node", "node1", "--trace=false", "--dry-run")
	dumps, err := xtables.ParseDumps(rules)
	if err != nil || len(dumps) == 0 {
		w.t.Fatalf("%d dumps: %v", len(dumps), err)
	}
	v4, _, _ := strings.Cut(rules, "# ip6tables")
	w.run(v4, "iptables-"+flavour+"-restore", "--noflush")
}

// visit connects from the client address and reads who answered, "" for nobody.
func (w *world) visit(at string) string {
	w.t.Helper()
	return w.run("", "sh", "-c", "curl -s --max-time 2 http://"+at+"/ || true")
}

// shown waits for a flow that fits.
func (w *world) shown(what string, fits func(*text.FlowJSON) bool) *text.FlowJSON {
	w.t.Helper()
	out := ""
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		out = w.must("follow", "-A", "-o", "jsonl", "--since", "1h", "--for", "0s")
		for line := range strings.Lines(out) {
			var f text.FlowJSON
			if err := json.Unmarshal([]byte(line), &f); err != nil {
				w.t.Fatalf("%v in line %s", err, line)
			}
			if fits(&f) {
				return &f
			}
		}
	}
	w.t.Fatalf("%s is not shown:\n%s", what, out)
	return nil
}

// TestAgent watches rules that another wrote, in both flavours: picks with the
// rules' odds, refusals and drops that connection tracking never shows, and an
// edit of the rules; nothing is left behind.
func TestAgent(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write(map[string]string{
				"foo.yaml":    manifest("foo", 10, 8080, "", 1, 2, 3),
				"sticky.yaml": manifest("sticky", 11, 8080, "sessionAffinity: ClientIP, ", 1, 2),
				"none.yaml":   manifest("none", 12, 8080, ""),
				"closed.yaml": manifest("closed", 13, 9999, "", 4),
			})
			w.serve(1, 2, 3)
			w.others(flavour)
			w.run("", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
			w.visit("10.96.0.11") // the kernel knows this client before the agent does
			before, settings := save(t, w.ns, flavour), w.run("", "cat", sysctlPaths()...)
			a := w.agent()
			if !strings.Contains(a.err.String(), "beside a kube-proxy in iptables mode") || !strings.Contains(a.err.String(), "variant="+flavour) {
				t.Errorf("said:\n%s", a.err)
			}
			for _, line := range strings.Split(before, "\n") {
				if !strings.Contains(save(t, w.ns, flavour), line) {
					t.Errorf("the agent took away %q", line)
				}
			}

			for _, at := range []string{"10.96.0.10", "10.96.0.11", "10.96.0.12", "10.96.0.13"} {
				w.visit(at)
			}
			f := w.shown("a connection to foo", func(f *text.FlowJSON) bool { return f.Service.Name == "foo" && f.Outcome == "closed" })
			if d := f.Decision; d.Mode != "iptables" || d.Algorithm != "random" || d.Candidates != 3 || d.Probability == nil || *d.Probability < 0.33 || *d.Probability > 0.34 {
				t.Errorf("decision %+v", d)
			}
			if len(f.Attempts) != 1 || f.Attempts[0].Retransmits != 0 {
				t.Errorf("attempts %+v", f.Attempts)
			}
			if f.Backend.Port != 8080 || !strings.HasPrefix(f.Backend.IP, "10.0.1.") || f.EstablishedMs == nil {
				t.Errorf("backend %+v, established %v", f.Backend, f.EstablishedMs)
			}
			hit := w.shown("a connection to sticky of a client that was there before", func(f *text.FlowJSON) bool {
				return f.Service.Name == "sticky" && f.Outcome == "closed" && f.Decision.Candidates == 2
			})
			if d := hit.Decision; d.Affinity != "hit" || d.AffinityAgeMs == nil || d.Note != "" {
				t.Errorf("affinity of a client that was there before: %+v", d)
			}
			w.run("", "curl", "-s", "--interface", "10.0.1.4", "http://10.96.0.11/")
			w.shown("a new client of sticky", func(f *text.FlowJSON) bool {
				return f.Service.Name == "sticky" && f.Outcome == "closed" && f.Client.IP == "10.0.1.4" && f.Decision.Affinity == "new"
			})
			if out := w.must("explain", "svc/sticky", "-n", "shop", "--from", "10.0.0.1"); !strings.Contains(out, "choice    affinity, 1 candidate") || !strings.Contains(out, "10.0.0.1 was sent to "+hit.Backend.IP+":8080 ") {
				t.Errorf("explain of a client that is kept: %s", out)
			}
			if out := w.must("explain", "svc/sticky", "-n", "shop", "--from", "10.0.0.99"); !strings.Contains(out, "choice    random, 2 candidates") {
				t.Errorf("explain of a client that is not kept: %s", out)
			}
			w.shown("a refusal for want of endpoints", func(f *text.FlowJSON) bool {
				return f.Service.Name == "none" && f.Outcome == "rejected" && f.Reason == "no-endpoints"
			})
			w.shown("a refusal by the endpoint", func(f *text.FlowJSON) bool {
				return f.Service.Name == "closed" && f.Outcome == "refused" && f.Backend.IP == "10.0.1.4"
			})

			// Somebody drops what goes to the endpoints of foo.
			w.run("", "iptables-"+flavour, "-A", "OUTPUT", "-p", "tcp", "--dport", "8080", "-m", "comment", "--comment", "cali:x", "-j", "DROP")
			w.visit("10.96.0.10")
			// The rule is looked up after the first word of the drop.
			w.shown("a dropped connection and the rule", func(f *text.FlowJSON) bool {
				return f.Service.Name == "foo" && f.Outcome == "dropped" && f.Reason == "dropped-by-rule" && strings.Contains(f.Cause, "--dport 8080")
			})
			w.run("", "iptables-"+flavour, "-D", "OUTPUT", "-p", "tcp", "--dport", "8080", "-m", "comment", "--comment", "cali:x", "-j", "DROP")

			if code, out, talk := w.kptrace("check"); code != 0 || out != "" {
				t.Errorf("a healthy node: exit %d, %s%s", code, out, talk)
			}
			if out := w.must("explain", "svc/foo", "-n", "shop", "--from", "10.0.0.1"); !strings.Contains(out, "10.0.1.2:8080") || !strings.Contains(out, "33") {
				t.Errorf("explain: %s", out)
			}

			if code := a.stop(syscall.SIGTERM); code != 0 {
				t.Errorf("exit %d:\n%s", code, a.err)
			}
			if after := save(t, w.ns, flavour); comparable(after) != comparable(before) {
				t.Errorf("left behind:\n%s\nwas:\n%s", after, before)
			}
			if now := w.run("", "cat", sysctlPaths()...); now != settings {
				t.Errorf("sysctls are %q, were %q", now, settings)
			}
		})
	}
}

// TestAgentKilled leaves what an agent had to a cleanup, which must not take the
// other kube-proxy's rules for ours.
func TestAgentKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
	w.serve(1, 2)
	w.others("nft")
	before := save(t, w.ns, "nft")
	a := w.agent()
	a.stop(syscall.SIGKILL)
	if w.visit("10.96.0.10") == "" {
		t.Error("without the agent, Services do not work")
	}
	for range 2 {
		w.must("cleanup")
		if after := save(t, w.ns, "nft"); comparable(after) != comparable(before) {
			t.Errorf("after cleanup:\n%s\nbefore the agent:\n%s", after, before)
		}
	}
}

// TestAgentElsewhere runs where nothing of a kube-proxy is, and somebody else's
// marks are: follow says so, and does not leave an empty screen. So it does where a
// mesh stands before a kube-proxy.
func TestAgentElsewhere(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, device, rules, status, head, idle string
	}{
		{"Cilium", "cilium_host", "", "Services seem to be handled by Cilium (device cilium_host)", "no rules of a kube-proxy were found here", "handled-elsewhere: Cilium seems to handle Services"},
		{"Calico", "bpfin.cali", "", "Services seem to be handled by Calico's eBPF data plane (device bpfin.cali)",
			"not seen here: connections to Services that Calico's eBPF data plane (device bpfin.cali) translates itself", "handled-elsewhere: Calico's eBPF data plane seems to handle Services"},
		{"mesh", "", "*nat\n:ISTIO_OUTPUT - [0:0]\n-A OUTPUT -p tcp -m tcp --dport 9 -j ISTIO_OUTPUT\n-A ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports 15001\nCOMMIT\n",
			"beside a kube-proxy in iptables mode", "", "handled-elsewhere: chains of nat (ISTIO_OUTPUT) send connections to Istio first"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
			if c.device != "" {
				w.run("", "ip", "link", "add", c.device, "type", "veth", "peer", "name", "other")
			} else {
				w.others("nft")
				w.run(c.rules, "iptables-nft-restore", "--noflush")
			}
			w.agent()
			if s := w.must("status"); !strings.Contains(s, c.status) {
				t.Errorf("status does not say %q:\n%s", c.status, s)
			}
			f := w.start("kptrace", "follow", "svc/foo", "-n", "shop")
			f.await(f.err, c.idle, 40*time.Second)
			if !strings.Contains(f.err.String(), c.head) {
				t.Errorf("the header does not say %q:\n%s", c.head, f.err)
			}
		})
	}
}

// TestAgentReadOnly adds nothing, and shows connections all the same.
func TestAgentReadOnly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
	w.serve(1, 2)
	w.others("nft")
	before, settings := save(t, w.ns, "nft"), w.run("", "cat", sysctlPaths()...)
	w.agent("--read-only")
	w.visit("10.96.0.10")
	f := w.shown("a connection", func(f *text.FlowJSON) bool { return f.Service.Name == "foo" && f.Backend.Port == 8080 })
	if f.Decision.Candidates != 2 {
		t.Errorf("decision %+v", f.Decision)
	}
	if after := save(t, w.ns, "nft"); after != before {
		t.Errorf("rules are\n%s\nwere\n%s", after, before)
	}
	if now := w.run("", "cat", sysctlPaths()...); now != settings {
		t.Errorf("sysctls are %q, were %q", now, settings)
	}
	_, _, talk := w.kptrace("follow", "svc/foo", "-n", "shop", "-o", "path", "--for", "1s")
	if !strings.Contains(talk, "read-only") {
		t.Errorf("follow -o path: %s", talk)
	}
	if want := "note: node1: not seen here: connections that were refused or dropped before they were tracked"; !strings.Contains(talk, want) {
		t.Errorf("the header does not say %q: %s", want, talk)
	}
	c, err := relay.Dial(filepath.Join(w.dir, "run", "k.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := c.Status(within(t, 5*time.Second))
	if err != nil || !strings.Contains(strings.Join(s.Blind, "\n"), "read-only") {
		t.Errorf("status does not say what is not seen: %v %q", err, s.Blind)
	}
}
