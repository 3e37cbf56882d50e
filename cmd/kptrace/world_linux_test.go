package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// world is a desk in a network namespace of its own, which is client, node
// and endpoints in one: addresses of endpoints and cluster IPs are on lo.
type world struct {
	*desk
	manifests string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	w := &world{desk: newDesk(t)}
	w.ns, w.manifests = ns, filepath.Join(w.dir, "state")
	if err := os.Mkdir(w.manifests, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := ns.Do(loopback); err != nil {
		t.Fatal(err)
	}
	return w
}

// loopback gives lo the addresses 10.0.0.1 (the client), 10.0.1.1 to 10.0.1.4
// (endpoints), and a route for cluster IPs.
func loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, ip := range []net.IP{{10, 0, 0, 1}, {10, 0, 1, 1}, {10, 0, 1, 2}, {10, 0, 1, 3}, {10, 0, 1, 4}} {
		if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(32, 32)}}); err != nil {
			return err
		}
	}
	cluster := &net.IPNet{IP: net.IP{10, 96, 0, 0}, Mask: net.CIDRMask(16, 32)}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: cluster, Src: net.IP{10, 0, 0, 1}})
}

// manifest is a Service shop/NAME at 10.96.0.IP with endpoints 10.0.1.X:PORT.
func manifest(name string, ip, port int, more string, endpoints ...int) string {
	var list []string
	for _, e := range endpoints {
		list = append(list, fmt.Sprintf("{addresses: [10.0.1.%d]}", e))
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: shop}
spec: {clusterIP: 10.96.0.%[2]d, %[4]sports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-1, namespace: shop, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{name: http, port: %[3]d}]
endpoints: [%[5]s]
`, name, ip, port, more, strings.Join(list, ", "))
}

// proxy starts kptrace proxy.
func (w *world) proxy(flags ...string) *child {
	w.t.Helper()
	return w.start("kptrace", append([]string{"proxy", "--manifests", w.manifests, "--node", "node1"}, flags...)...)
}

// synced waits for the first sync of a proxy.
func (w *world) synced(p *child) {
	w.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if w.askSynced(p.PID()) {
			return
		}
		select {
		case <-p.Done():
			w.t.Fatalf("the proxy ended with %d:\n%s", p.ExitCode(), p.err)
		default:
		}
		if time.Now().After(end) {
			w.t.Fatalf("the proxy was not ready within a minute:\n%s", p.err)
		}
	}
}

func (w *world) askSynced(pid int) bool {
	c, err := relay.Dial(filepath.Join(w.dir, "run", "k.sock"))
	if err != nil {
		return false
	}
	defer c.Close()
	s, err := c.Status(within(w.t, 5*time.Second))
	return err == nil && s.PID == pid && !s.Synced.IsZero() && s.SyncError == ""
}

// serve answers at endpoint addresses, port 8080.
func (w *world) serve(endpoints ...int) {
	w.t.Helper()
	for _, e := range endpoints {
		s := w.start("kptrace", "lab", "serve", "--listen", fmt.Sprintf("10.0.1.%d:8080", e))
		s.await(s.out, "ready", 10*time.Second)
	}
}

// run runs any program in the namespace and returns its stdout.
func (w *world) run(stdin, name string, args ...string) string {
	w.t.Helper()
	return runIn(w.t, w.ns, stdin, name, args...)
}

func runIn(t *testing.T, ns *netns.NS, stdin, name string, args ...string) string {
	t.Helper()
	res, err := exec.Run(within(t, 30*time.Second), exec.Spec{Path: name, Args: args, Stdin: strings.NewReader(stdin), Netns: ns.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	return string(res.Stdout)
}

// save is iptables-save without what changes by itself.
func save(t *testing.T, ns *netns.NS, flavour string) string {
	t.Helper()
	text := runIn(t, ns, "", "iptables-"+flavour+"-save")
	text = regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(text, "")
	return regexp.MustCompile(`\[\d+:\d+\]`).ReplaceAllString(text, "[0:0]")
}

// comparable makes of a save what must be equal whatever went before: chains
// in any order, and rules of chains that Services share in any order.
func comparable(text string) string {
	chains := map[string][]string{}
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			chains[table+" "+name] = []string{}
		case strings.HasPrefix(line, "-A "):
			f := strings.Fields(line)
			key := table + " " + f[1]
			chains[key] = append(chains[key], line)
		}
	}
	var names []string
	for name, rules := range chains {
		if !strings.Contains(name, "KUBE-SVC-") && !strings.Contains(name, "KUBE-SEP-") {
			n := len(rules)
			if n > 0 && strings.HasSuffix(rules[n-1], "-j KUBE-NODEPORTS") {
				n-- // the last one must be the last
			}
			slices.Sort(rules[:n])
		}
		names = append(names, name)
	}
	slices.Sort(names)
	var b strings.Builder
	for _, name := range names {
		fmt.Fprintf(&b, "%s\n  %s\n", name, strings.Join(chains[name], "\n  "))
	}
	return b.String()
}

// processes lists what runs in a network namespace.
func processes(ns *netns.NS) []string {
	var list []string
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && to == ns.String() {
			dir := filepath.Dir(filepath.Dir(l))
			b, _ := os.ReadFile(dir + "/cmdline")
			list = append(list, filepath.Base(dir)+" "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return list
}
