//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
)

// TestAgentBesideUpstream watches upstream kube-proxy, in iptables mode of both
// flavours and in nftables mode: connections, refusals, and nothing left behind.
func TestAgentBesideUpstream(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{RBAC: true})
	o := &objects{}
	o.add("web", "http:80", "a", nodePort)
	o.add("none", "http:80", "")
	o.slices = o.slices[:1]
	ns := map[string]*netns.NS{}
	variants := []struct {
		mode    string
		flavour xtables.Flavour
	}{{"iptables", xtables.NFT}, {"iptables", xtables.Legacy}, {"nftables", xtables.NFT}}
	for i, v := range variants {
		n := newNode(t, c)
		uplink(t, n)
		ready := serveAt(t, n, "192.0.2.1:18080")
		if i == 0 {
			o.slices[0].Endpoints[0].Addresses = []string{ready.Addr().String()}
			o.slices[0].Ports[0].Port = ptr(int32(ready.Port()))
			o.create(t, c.client)
		}
		ns[v.mode+v.flavour.String()] = n
	}
	for _, v := range variants {
		t.Run(v.mode+"-"+v.flavour.String(), func(t *testing.T) {
			ns := ns[v.mode+v.flavour.String()]
			startUpstream(t, c, ns, v.flavour, "--proxy-mode="+v.mode)
			web, none := service(t, c, "web"), service(t, c, "none")
			to := net.JoinHostPort(web.Spec.ClusterIP, "80")
			eventually(t, "an answer from "+to, func() error { return reaches(ns, to) })
			before := allRules(t, ns, v.flavour)

			a := startAgent(t, c, ns)
			for _, to := range []string{to, fmt.Sprintf("192.0.2.1:%d", web.Spec.Ports[0].NodePort)} {
				if err := reaches(ns, to); err != nil {
					t.Errorf("%s: %v", to, err)
				}
			}
			if _, err := dial(ns, net.JoinHostPort(none.Spec.ClusterIP, "80")); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a Service without endpoints: %v, want ECONNREFUSED", err)
			}
			for via, port := range map[string]uint16{"ClusterIP": 80, "NodePort": uint16(web.Spec.Ports[0].NodePort)} { //nolint:gosec // a port
				a.shows(t, "a connection by "+via, func(f *text.FlowJSON) bool {
					return f.Service.Name == "web" && string(f.Service.Via) == via && f.Service.PortNumber == port && string(f.Decision.Mode) == v.mode &&
						f.Backend != nil && f.Backend.IP == "192.0.2.1" && f.Backend.Port == 18080 && f.Decision.Candidates == 1 &&
						f.Outcome == "closed" && f.EstablishedMs != nil && len(f.Attempts) == 1
				})
			}
			a.shows(t, "a refusal", func(f *text.FlowJSON) bool {
				return f.Service.Name == "none" && f.Outcome == "rejected" && f.Reason == "no-endpoints"
			})
			if v.mode == "nftables" {
				a.showsPath(t, to)
			}
			end(t, a.Process)
			if after := allRules(t, ns, v.flavour); after != before {
				t.Errorf("the agent left:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

// showsPath wants the rules of nftables on the path of a connection to the Service
// web, with what they say and mean.
func (a *agent) showsPath(t *testing.T, to string) {
	t.Helper()
	want := map[string]string{"cluster IP of " + namespace + "/web:http": "vmap @service-ips", "pick 1 of 1, p = 1.000": "dnat "}
	done := make(chan error, 1)
	var out string
	go func() {
		var err error
		out, err = a.ask("follow", "svc/web", "-n", namespace, "-o", "jsonl", "--packets", "1", "--for", "8s")
		done <- err
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(out) {
				var f text.FlowJSON
				if err := json.Unmarshal([]byte(line), &f); err != nil {
					t.Fatal(err)
				}
				for _, h := range f.Path {
					for purpose, text := range want {
						if h.Table == "kube-proxy" && strings.HasPrefix(h.Purpose, purpose) && strings.Contains(h.Text, text) {
							delete(want, purpose)
						}
					}
				}
			}
			if len(want) > 0 {
				t.Errorf("no path has %v:\n%s", want, out)
			}
			return
		case <-time.After(300 * time.Millisecond):
			if err := reaches(a.ns, to); err != nil {
				t.Errorf("%s: %v", to, err)
			}
		}
	}
}

// reaches connects and reads an answer.
func reaches(ns *netns.NS, to string) error {
	text, err := dial(ns, to)
	if err == nil && text == "" {
		err = errors.New("no answer")
	}
	return err
}

// agent is a running `kptrace agent`.
type agent struct {
	*exec.Process
	socket string
	ns     *netns.NS
	out    *log
}

func startAgent(t *testing.T, c *cluster, ns *netns.NS) *agent {
	t.Helper()
	binary, err := filepath.Abs("../../bin/kptrace")
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{socket: filepath.Join(t.TempDir(), "k.sock"), ns: ns, out: &log{}}
	a.Process, err = exec.Start(exec.Spec{
		Path: binary, Netns: ns.Fd(), OwnGroup: true, Stdout: a.out, Stderr: a.out,
		Args: []string{"agent", "--kubeconfig=" + c.Kubeconfig(controlplane.KubeProxy), "--node=" + nodeName, "--socket=" + a.socket},
	})
	if err != nil {
		t.Fatalf("%v: build it by `make build`", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kptrace agent said:\n%s", a.out)
		}
		end(t, a.Process)
	})
	eventually(t, "the agent to watch", func() error {
		s, err := a.ask("status", "-o", "json")
		if err == nil && !regexp.MustCompile(`"endpoints": [1-9]`).MatchString(s) {
			err = errors.New(s)
		}
		return err
	})
	return a
}

func (a *agent) ask(args ...string) (string, error) {
	binary, err := filepath.Abs("../../bin/kptrace")
	if err != nil {
		return "", err
	}
	return asked(a.ns, binary, append(args, "--socket="+a.socket)...)
}

func (a *agent) shows(t *testing.T, what string, fits func(*text.FlowJSON) bool) {
	t.Helper()
	eventually(t, what, func() error {
		out, err := a.ask("follow", "-A", "-o", "jsonl", "--since", "1h", "--for", "0s")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			var f text.FlowJSON
			if err := json.Unmarshal([]byte(line), &f); err != nil {
				return err
			}
			if fits(&f) {
				return nil
			}
		}
		return errors.New("shown is only:\n" + out)
	})
}

// allRules are the rules of one flavour and, where nft is there, all of
// nf_tables.
func allRules(t *testing.T, ns *netns.NS, fl xtables.Flavour) string {
	t.Helper()
	all := ""
	for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		text, err := (&xtables.Tools{Netns: ns.Fd()}).SaveText(t.Context(), fl, fa, "", false)
		if err != nil {
			t.Fatal(err)
		}
		all += text
	}
	all = regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(all, "")
	return regexp.MustCompile(`\[\d+:\d+\]`).ReplaceAllString(all, "[0:0]")
}
