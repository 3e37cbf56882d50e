package xtables

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// both runs a test in a network namespace of its own for each flavour.
func both(t *testing.T, f func(t *testing.T, tools Tools, fl Flavour)) {
	for _, fl := range []Flavour{NFT, Legacy} {
		t.Run(fl.String(), func(t *testing.T) {
			f(t, newTools(t), fl)
		})
	}
}

func newTools(t *testing.T) Tools {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return Tools{Netns: ns.Fd(), Env: []string{"XTABLES_LOCKFILE=" + filepath.Join(t.TempDir(), "lock")}}
}

func run(t *testing.T, tools Tools, stdin, name string, args ...string) {
	t.Helper()
	s := tools.spec(name, args...)
	s.Stdin = strings.NewReader(stdin)
	if _, err := exec.Run(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

// TestKernelCanonical loads every rule shape and reads it back: what the
// kernel gives is what we print, for the rule as given and as we print it.
func TestKernelCanonical(t *testing.T) {
	both(t, func(t *testing.T, tools Tools, fl Flavour) {
		run(t, tools, `create KUBE-LOOP-BACK hash:ip,port,ip
create KUBE-CLUSTER-IP hash:ip,port
create KUBE-LOAD-BALANCER hash:ip,port
create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
create KUBE-IPVS-IPS hash:ip
`, "ipset", "restore")
		for _, f := range []Family{IPv4, IPv6} {
			for _, ours := range []bool{false, true} {
				checkCanonical(t, tools, fl, f, ours)
			}
		}
	})
}

func checkCanonical(t *testing.T, tools Tools, fl Flavour, f Family, ours bool) {
	t.Helper()
	cases := canonCases(t, f)
	tables := map[string]*strings.Builder{}
	var order []string
	want := map[string]string{}
	for i, c := range cases {
		if fl == NFT && strings.Contains(c.in, "! -d 0.0.0.0/0") {
			continue // matches nothing; iptables-nft refuses it
		}
		b := tables[c.table]
		if b == nil {
			b = &strings.Builder{}
			tables[c.table] = b
			order = append(order, c.table)
			fmt.Fprintf(b, "*%s\n", c.table)
		}
		rule, err := ParseRule(f, c.in)
		if err != nil {
			t.Fatal(err)
		}
		chain := fmt.Sprintf("T%d", i)
		fmt.Fprintf(b, ":%s - [0:0]\n", chain)
		if strings.HasPrefix(rule.Target, "KUBE-") {
			fmt.Fprintf(b, ":%s - [0:0]\n", rule.Target)
		}
		text := c.in
		if ours {
			text = rule.String()
		}
		fmt.Fprintf(b, "-A %s %s\n", chain, text)
		want[c.table+" "+chain] = c.out
	}
	var text strings.Builder
	for _, table := range order {
		text.WriteString(tables[table].String() + "COMMIT\n")
	}
	run(t, tools, text.String(), Program(fl, f, "restore"), "--noflush")
	for _, table := range order {
		saved, err := tools.SaveText(t.Context(), fl, f, table, false)
		if err != nil {
			t.Fatal(err)
		}
		rs, err := Parse(f, saved)
		if err != nil {
			t.Fatal(err)
		}
		// What we read prints as it was: chains, rules and order.
		var lines []string
		for line := range strings.SplitSeq(saved, "\n") {
			if line != "" && line[0] != '#' {
				lines = append(lines, line)
			}
		}
		if got := strings.Split(strings.TrimSpace(rs.String()), "\n"); !slices.Equal(got, lines) {
			for i := range min(len(got), len(lines)) {
				if got[i] != lines[i] {
					t.Errorf("%s: got %q, want %q", Program(fl, f, "save"), got[i], lines[i])
				}
			}
		}
		for _, c := range rs.Table(table).Chains {
			if out, ok := want[table+" "+c.Name]; ok {
				if len(c.Rules) != 1 || c.Rules[0].String() != out {
					t.Errorf("%v %v ours=%v: got %v, want %s", fl, f, ours, c.Rules, out)
				}
				delete(want, table+" "+c.Name)
			}
		}
	}
	if len(want) > 0 {
		t.Errorf("%v %v: not read back: %v", fl, f, want)
	}
}

func svcUnit(i, endpoints int) Unit {
	svc := fmt.Sprintf("KUBE-SVC-%016d", i)
	u := Unit{Table: "nat", Owner: fmt.Sprintf("ns/svc%d:http", i), Lines: []string{":" + svc + " - [0:0]"}}
	var rules []string
	for e := range endpoints {
		sep := fmt.Sprintf("KUBE-SEP-%011d%05d", i, e)
		ip := fmt.Sprintf("10.%d.%d.%d", i>>8&255, i&255, e+1)
		u.Lines = append(u.Lines, ":"+sep+" - [0:0]")
		rules = append(rules,
			fmt.Sprintf(`-A %s -s %s/32 -m comment --comment "ns/svc%d:http" -j MARK --set-xmark 0x4000/0x4000`, sep, ip, i),
			fmt.Sprintf(`-A %s -p tcp -m comment --comment "ns/svc%d:http" -m tcp -j DNAT --to-destination %s:8080`, sep, i, ip))
		pick := ""
		if left := endpoints - e; left > 1 {
			pick = fmt.Sprintf("-m statistic --mode random --probability %.10f ", 1/float64(left))
		}
		rules = append(rules, fmt.Sprintf(`-A %s -m comment --comment "ns/svc%d:http -> %s:8080" %s-j %s`, svc, i, ip, pick, sep))
	}
	u.Lines = append(u.Lines, rules...)
	return u
}

func svcPlan(n, endpoints int) Plan {
	chains := Phase{Name: "service chains"}
	dispatch := Unit{Table: "nat", Owner: "dispatch", Lines: []string{":KUBE-SERVICES - [0:0]"}}
	for i := range n {
		chains.Units = append(chains.Units, svcUnit(i, endpoints))
		dispatch.Lines = append(dispatch.Lines, fmt.Sprintf(
			`-A KUBE-SERVICES -d 172.30.%d.%d/32 -p tcp -m comment --comment "ns/svc%d:http cluster IP" -m tcp --dport 80 -j KUBE-SVC-%016d`,
			i>>8&255, i&255, i, i))
	}
	return Plan{chains, {Name: "dispatch", Units: []Unit{dispatch}}}
}

// planned is the ruleset a plan makes.
func planned(t *testing.T, p Plan) *Ruleset {
	t.Helper()
	rs, err := Parse(IPv4, p.Text())
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func checkApplied(t *testing.T, r *Runner, want *Ruleset) {
	t.Helper()
	have, err := r.Save(t.Context(), "nat")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range Diff(have, want, kubeOwned) {
		if d.Kind != Same {
			t.Fatalf("%v %s: add %v remove %v moved %v", d.Kind, d.Chain, d.Add, d.Remove, d.Moved)
		}
	}
}

func kubeOwned(_, chain string) bool { return strings.HasPrefix(chain, "KUBE-") }

// TestKernelApply applies a plan larger than one commit in a user namespace can
// be, in both flavours, and finds all of it in the kernel.
func TestKernelApply(t *testing.T) {
	both(t, func(t *testing.T, tools Tools, fl Flavour) {
		r := NewRunner(RunnerConfig{Tools: tools, Flavour: fl})
		plan := svcPlan(100, 5)
		rep, err := r.Apply(t.Context(), plan)
		if err != nil || len(rep.Failed) > 0 {
			t.Fatal(err, rep.Failed)
		}
		if rep.Units != 101 || rep.Rules != 1600 || rep.Commits < 2 {
			t.Errorf("report %+v", rep)
		}
		t.Logf("rootless %v: %+v", netns.Rootless(), rep)
		checkApplied(t, r, planned(t, plan))
		again, err := r.Apply(t.Context(), plan)
		if err != nil || again.Runs > again.Commits {
			t.Errorf("second time %+v %v: what a commit may have was forgotten", again, err)
		}
	})
}

// TestKernelBadUnits puts units that the program or the kernel refuses among
// good ones: they are named, and all others are applied, in the order of the
// phases.
func TestKernelBadUnits(t *testing.T) {
	bad := map[int]string{
		3:  "-A KUBE-SVC-0000000000000003 -j NOSUCH",
		7:  "-A KUBE-SVC-0000000000000007 -d 999.1.1.1 -j ACCEPT",
		8:  "-A NO-SUCH-CHAIN -j ACCEPT",
		20: "-A KUBE-SVC-0000000000000020 -m nfacct --nfacct-name kptrace-none -j ACCEPT",
		39: "-A KUBE-SVC-0000000000000039 -m statistic --mode random --probability 7 -j ACCEPT",
	}
	both(t, func(t *testing.T, tools Tools, fl Flavour) {
		for _, size := range []int{0, 3000} {
			r := NewRunner(RunnerConfig{Tools: tools, Flavour: fl, MaxCommitBytes: size})
			good := svcPlan(40, 2)
			plan := svcPlan(40, 2)
			for i, line := range bad {
				u := &plan[0].Units[i]
				u.Lines = append(u.Lines, line)
			}
			// The dispatch rules of the bad services cannot be made either.
			keepUnits := good[0].Units[:0:0]
			var lines []string
			for i, u := range good[0].Units {
				if _, isBad := bad[i]; !isBad {
					keepUnits = append(keepUnits, u)
				}
			}
			for i, l := range plan[1].Units[0].Lines {
				if _, isBad := bad[i-1]; !isBad || i == 0 {
					lines = append(lines, l)
				}
			}
			good[0].Units = keepUnits
			good[1].Units[0].Lines, plan[1].Units[0].Lines = lines, lines
			rep, err := r.Apply(t.Context(), plan)
			if err != nil {
				t.Fatal(err)
			}
			got := map[int]bool{}
			for _, f := range rep.Failed {
				got[f.Index] = true
				if f.Owner != fmt.Sprintf("ns/svc%d:http", f.Index) || f.Stderr == "" || f.Phase != "service chains" {
					t.Errorf("failed: %+v", f)
				}
			}
			if len(rep.Failed) != len(bad) || len(got) != len(bad) {
				t.Errorf("failed: %+v", rep.Failed)
			}
			for _, f := range rep.Failed {
				if strings.Contains(f.Stderr, "999.1.1.1") && f.Line != bad[7] {
					t.Errorf("line at fault: %+v", f)
				}
			}
			t.Logf("size %d: %d runs, %d commits", size, rep.Runs, rep.Commits)
			checkApplied(t, r, planned(t, good))
		}
	})
}

// TestKernelCancel ends the context: nothing more is committed, and it is no
// fault of any unit.
func TestKernelCancel(t *testing.T) {
	both(t, func(t *testing.T, tools Tools, fl Flavour) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		r := NewRunner(RunnerConfig{Tools: tools, Flavour: fl})
		rep, err := r.Apply(ctx, svcPlan(3, 2))
		if !errors.Is(err, context.Canceled) || rep.Units != 0 || len(rep.Failed) > 0 {
			t.Errorf("%+v %v", rep, err)
		}
	})
}

// TestKernelMissing tells a missing program from a bad rule.
func TestKernelMissing(t *testing.T) {
	tools := newTools(t)
	tools.Dir = t.TempDir()
	rep, err := NewRunner(RunnerConfig{Tools: tools}).Apply(t.Context(), svcPlan(3, 2))
	if err == nil || len(rep.Failed) > 0 {
		t.Errorf("%+v %v", rep, err)
	}
}
