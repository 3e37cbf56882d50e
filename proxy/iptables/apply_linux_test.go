package iptables

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// eachFlavour runs a test in a namespace of its own per flavour.
func eachFlavour(t *testing.T, f func(t *testing.T, cfg Config)) {
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			ns, err := netns.New()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { ns.Close() })
			cfg := overallConfig()
			cfg.Trace, cfg.Flavour, cfg.Tools.Netns = true, flavour, ns.Fd()
			f(t, cfg)
		})
	}
}

var (
	noise    = regexp.MustCompile(`(?m)^#.*\n`)
	counters = regexp.MustCompile(`\[\d+:\d+\]`)
)

// save returns the live rules of the flavour as sorted text, for chains may
// come in any order.
func save(t *testing.T, cfg Config) string {
	t.Helper()
	fl, err := xtables.ParseFlavour(cfg.Flavour)
	if err != nil {
		t.Fatal(err)
	}
	text, err := cfg.Tools.SaveText(t.Context(), fl, cfg.Family, "", false)
	if err != nil {
		t.Fatal(err)
	}
	return counters.ReplaceAllString(noise.ReplaceAllString(text, ""), "[0:0]")
}

// restore gives a text to iptables-restore --noflush.
func restore(t *testing.T, cfg Config, text string) {
	t.Helper()
	restoreBy(t, cfg, "iptables-", text)
}

// restore6 gives a text to ip6tables-restore --noflush.
func restore6(t *testing.T, cfg Config, text string) {
	t.Helper()
	restoreBy(t, cfg, "ip6tables-", text)
}

func restoreBy(t *testing.T, cfg Config, program, text string) {
	t.Helper()
	_, err := exec.Run(t.Context(), exec.Spec{Path: program + cfg.Flavour + "-restore", Args: []string{"--noflush"},
		Stdin: strings.NewReader(text), Netns: cfg.Tools.Netns})
	if err != nil {
		t.Fatal(err)
	}
}

// mustApply applies and checks that the kernel holds the program and nothing
// else of ours.
func mustApply(t *testing.T, b *Backend, s *proxy.Snapshot) proxy.Report {
	t.Helper()
	p := b.Render(s, proxy.Overlay{})
	rep, err := b.Apply(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	mustMatch(t, b, p)
	return rep
}

func mustMatch(t *testing.T, b *Backend, p proxy.Program) {
	t.Helper()
	have, err := b.runner.Save(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range Diff(have, p) {
		t.Errorf("%s %s (%s) is %s: add %q, remove %q", c.Table, c.Chain, c.Service, c.Kind, c.Add, c.Remove)
	}
	if n, want := have.Rules(), countRules(p.(*program)); n != want {
		t.Errorf("the kernel has %d rules, want %d", n, want)
	}
}

func countRules(p *program) (n int) {
	for _, table := range tables {
		p.eachChain(table, renderAll(p.units), func(_ string, rules []string) { n += len(rules) })
	}
	return n + len(p.fixed.jumps)
}

// TestKernelPrintsItBack holds our text against iptables-save.
func TestKernelPrintsItBack(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		p := New(cfg).Render(overall(), proxy.Overlay{})
		restore(t, cfg, p.Text())
		var want, got []string
		for l := range strings.Lines(p.Text()) {
			if after, ok := strings.CutPrefix(l, "-I "); ok {
				l = "-A " + after
			}
			if strings.HasPrefix(l, "-A") {
				want = append(want, l)
			}
		}
		for l := range strings.Lines(save(t, cfg)) {
			if strings.HasPrefix(l, "-A") {
				got = append(got, l)
			}
		}
		slices.Sort(want)
		slices.Sort(got)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("rules (-rendered +saved):\n%s", d)
		}
	})
}

func TestApply(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		b := New(cfg)
		s := overall()
		if rep := mustApply(t, b, s); !rep.Full || rep.Commits == 0 || rep.Commits > 5 {
			t.Errorf("first: %+v", rep)
		}
		if rep := mustApply(t, b, s); rep.Full || rep.Commits != 0 {
			t.Errorf("no change: %+v", rep)
		}
		// A restart with the right rules writes nothing.
		b = New(cfg)
		if rep := mustApply(t, b, s); !rep.Full || rep.Commits != 0 {
			t.Errorf("restart: %+v", rep)
		}
		steps := []struct {
			name    string
			commits int
			change  func(s *proxy.Snapshot)
		}{
			{"endpoint added", 1, func(s *proxy.Snapshot) {
				s.Services[0] = service("ns1/svc1:p80", "tcp", "172.30.0.41", 80, "10.180.0.1:80", "10.180.0.7:80")
			}},
			{"endpoint replaced", 1, func(s *proxy.Snapshot) {
				s.Services[0] = service("ns1/svc1:p80", "tcp", "172.30.0.41", 80, "10.180.0.7:80", "10.180.0.8:80")
			}},
			{"last endpoint gone", 2, func(s *proxy.Snapshot) { s.Services[0].Endpoints = nil }},
			{"first endpoint back", 2, func(s *proxy.Snapshot) {
				s.Services[0] = service("ns1/svc1:p80", "tcp", "172.30.0.41", 80, "10.180.0.1:80")
			}},
			{"affinity on", 1, func(s *proxy.Snapshot) { s.Services[3].Affinity = 60e9 }},
			{"affinity off", 1, func(s *proxy.Snapshot) { s.Services[3].Affinity = 0 }},
			{"node port moved", 1, func(s *proxy.Snapshot) { s.Services[3].NodePort = 3999 }},
			{"local policy satisfied", 2, func(s *proxy.Snapshot) {
				s.Services[1].Endpoints = append([]proxy.Endpoint{}, s.Services[1].Endpoints...)
				s.Services[1].Endpoints[0].Local = true
			}},
			{"local policy starved", 2, func(s *proxy.Snapshot) {
				s.Services[1].Endpoints = append([]proxy.Endpoint{}, s.Services[1].Endpoints...)
				s.Services[1].Endpoints[0].Local = false
			}},
			{"Service deleted", 2, func(s *proxy.Snapshot) { s.Services = s.Services[1:] }},
			{"all deleted", 2, func(s *proxy.Snapshot) { s.Services = nil }},
		}
		for _, step := range steps {
			next := *s
			next.Services = slices.Clone(s.Services)
			step.change(&next)
			rep := mustApply(t, b, &next)
			if rep.Full || rep.Commits == 0 || rep.Commits > step.commits {
				t.Errorf("%s: %+v, want at most %d commits and no full sync", step.name, rep, step.commits)
			}
			s = &next
			// The same from the live tables.
			b2 := New(cfg)
			if rep := mustApply(t, b2, s); rep.Commits != 0 {
				t.Errorf("%s: a restart writes %+v", step.name, rep)
			}
		}
	})
}

// TestRepair breaks the live rules in every way and lets Apply put them right.
func TestRepair(t *testing.T) {
	breaks := []string{
		"*nat\n-F KUBE-SVC-XPGD46QRK7WJZT7O\nCOMMIT\n",
		"*nat\n-F KUBE-SERVICES\nCOMMIT\n",
		"*nat\n-F PREROUTING\nCOMMIT\n",
		"*nat\n-I KUBE-SERVICES -d 1.1.1.1/32 -j KUBE-SVC-XPGD46QRK7WJZT7O\nCOMMIT\n",
		"*nat\n-A KUBE-SERVICES -d 1.1.1.1/32 -j ACCEPT\nCOMMIT\n",
		"*nat\n-I KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n",
		"*nat\n:KUBE-SVC-STALESTALESTALE1 - [0:0]\n:KUBE-SEP-STALESTALESTALE1 - [0:0]\n-A KUBE-SVC-STALESTALESTALE1 -j KUBE-SEP-STALESTALESTALE1\n" +
			"-I KUBE-SERVICES -d 1.1.1.1/32 -j KUBE-SVC-STALESTALESTALE1\nCOMMIT\n",
		"*filter\n-D KUBE-SERVICES 1\nCOMMIT\n",
		"*filter\n-D KUBE-SERVICES 2\nCOMMIT\n",
		"*filter\n-I KUBE-SERVICES -d 172.30.0.46/32 -p tcp -m comment --comment \"ns6/svc6:p80 has no endpoints\" -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable\nCOMMIT\n",
		"*filter\n-F\nCOMMIT\n",
		"*mangle\n-F\n-X\nCOMMIT\n",
		"*filter\n-D KUBE-FIREWALL 1\nCOMMIT\n",
		"*mangle\n-I PREROUTING -j KPTRACE\n-D PREROUTING 1\n-D PREROUTING 1\nCOMMIT\n",
	}
	eachFlavour(t, func(t *testing.T, cfg Config) {
		b := New(cfg)
		mustApply(t, b, overall())
		for _, text := range breaks {
			restore(t, cfg, text)
			b.Forget()
			if rep := mustApply(t, b, overall()); !rep.Full || rep.Commits == 0 {
				t.Errorf("after %q: %+v", text, rep)
			}
		}
	})
}

// TestTornPlan ends a plan after every commit, as a kill -9 would, and starts
// anew.
func TestTornPlan(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		before, after := overall(), overall()
		after.Services[0].Endpoints = nil
		after.Services[5] = service("ns6/svc6:p80", "tcp", "172.30.0.46", 80, "10.180.0.9:80")
		after.Services[4].Affinity = 0
		after.Services = append(after.Services[:1:1], after.Services[2:]...)
		for n := 0; ; n++ {
			b := New(cfg)
			mustApply(t, b, before)
			p := b.Render(after, proxy.Overlay{}).(*program)
			first, second := plans(p.since(b.applied))
			whole := slices.Concat(first, second)
			var torn xtables.Plan
			left := n
			for _, ph := range whole {
				k := min(left, len(ph.Units))
				torn = append(torn, xtables.Phase{Name: ph.Name, Units: ph.Units[:k]})
				left -= k
			}
			if rep, err := b.runner.Apply(t.Context(), torn); err != nil || len(rep.Failed) > 0 {
				t.Fatalf("after %d units: %v %v", n, rep.Failed, err)
			}
			mustApply(t, New(cfg), after)
			if left > 0 {
				if n < 5 {
					t.Errorf("the plan has only %d units", n)
				}
				break
			}
		}
	})
}

// TestBadService has a Service that the kernel refuses; the others must not
// suffer, and it must come back when it is mended.
func TestBadService(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		b := New(cfg)
		mustApply(t, b, overall())
		s := overall()
		s.Services[0] = service("ns1/svc1:p80", "tcp", "172.30.0.41", 80, "10.180.0.1:80", "10.180.0.7:80")
		s.Services[2] = service("ns3/svc3:p80", "tcp", "172.30.0.43", 80, "10.180.0.3:80", "10.180.0.8:80")
		p := b.Render(s, proxy.Overlay{}).(*program)
		was := p.units[0]
		bad := &unit{svc: was.svc, sel: was.sel, hash: was.hash, by: was.by}
		bad.svc.ExternalIPs = ips("2001:db8::1")
		spoilt := program{cfg: p.cfg, node: p.node, fixed: p.fixed, claims: p.claims, walks: p.walks}
		spoilt.units = slices.Clone(p.units)
		spoilt.units[0] = bad
		_, err := b.Apply(t.Context(), &spoilt)
		if err == nil || !strings.Contains(err.Error(), "Service ns1/svc1:p80 tcp is not programmed") || strings.Contains(err.Error(), "svc3") {
			t.Fatalf("error = %v, want one that names ns1/svc1:p80", err)
		}
		var unit *xtables.UnitError
		if !errors.As(err, &unit) {
			t.Errorf("error %v wraps no UnitError", err)
		}
		live := save(t, cfg)
		for text, want := range map[string]bool{"10.180.0.8:80": true, "10.180.0.7:80": false, "--to-destination 10.180.0.1:80": true} {
			if strings.Contains(live, text) != want {
				t.Errorf("%q is there: %t, want %t", text, !want, want)
			}
		}
		if rep := mustApply(t, b, s); !rep.Full {
			t.Errorf("after an error: %+v, want a full sync", rep)
		}
	})
}

func TestManyEndpoints(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		b := New(cfg)
		many := func(from, to int) *proxy.Snapshot {
			var eps []string
			for i := from; i < to; i++ {
				eps = append(eps, fmt.Sprintf("10.180.%d.%d:80", i/200, i%200+1))
			}
			svc := service("ns1/many", "tcp", "172.30.0.41", 80, eps...)
			svc.Affinity = 60e9
			return &proxy.Snapshot{Services: []proxy.Service{svc}}
		}
		mustApply(t, b, many(0, 110))
		mustApply(t, b, many(50, 140))
		mustApply(t, b, &proxy.Snapshot{})
	})
}
