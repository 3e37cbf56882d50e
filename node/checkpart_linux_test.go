package node

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace/check"
)

// TestCheckByParts makes every mistake in live rules and looks at them at once and in
// parts: the parts find together what is found at once.
func TestCheckByParts(t *testing.T) {
	const parts = 3
	_, others, _ := strings.Cut(proxytest.RandomServices(rand.New(rand.NewPCG(7, 0)), 20, "r"), "\n")
	snap := proxytest.Services("shop/web:p tcp 10.96.3.10:80 nodeport=30099 a:8080 b:8080 c:8080\n" + others)
	snap.Node.Addrs = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	lock := filepath.Join(t.TempDir(), "lock")
	if err := os.WriteFile(lock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tools := xtables.Tools{Netns: ns.Fd(), Env: []string{"XTABLES_LOCKFILE=" + lock}}
	b := iptables.New(iptables.Config{Flavour: "legacy", Tools: tools, LocalhostNodePorts: true, ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}})
	p := b.Render(snap, proxy.Overlay{})
	if _, err := b.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	right, err := tools.SaveText(t.Context(), xtables.Legacy, xtables.IPv4, "", false)
	if err != nil {
		t.Fatal(err)
	}
	find := func(part int) map[string]bool {
		t.Helper()
		s := &check.State{Node: "node1", Snapshot: snap, Program: p, Addrs: snap.Node.Addrs, Now: time.Now()}
		var in func(string) bool
		if part >= 0 {
			in = func(service string) bool { return partOfService(service, parts) == part }
			s.Part = func(name proxy.PortName) bool { return in(name.String()) }
			s.Snapshot = partOf(snap, s.Part)
		}
		rs, err := readRules(t.Context(), &tools, xtables.Legacy, xtables.IPv4, in)
		if err != nil {
			t.Fatal(err)
		}
		s.Dumps = []xtables.Dump{{Family: xtables.IPv4, Flavour: xtables.Legacy, Rules: rs}}
		found := map[string]bool{}
		for _, f := range check.Run(s, check.Options{}) {
			found[f.Code+" "+f.Object] = true
		}
		return found
	}
	mistakes := append(proxytest.WrongRules(),
		proxytest.WrongRule{Name: "nothing"},
		proxytest.WrongRule{Name: "a chain of a Service is empty", Table: "nat", Chain: "KUBE-SVC-", Find: "-j KUBE-SEP-"},
		proxytest.WrongRule{Name: "a Service that is none", Table: "nat", Chain: "KUBE-SERVICES", Find: "shop/web:p", Instead: "shop/gone:p"},
		proxytest.WrongRule{Name: "a node port is taken", Table: "nat", Chain: "PREROUTING", Instead: "-p tcp -m tcp --dport 30099 -j DNAT --to-destination 192.0.2.9"})
	for _, m := range mistakes {
		t.Run(m.Name, func(t *testing.T) {
			if _, err := exec.Run(t.Context(), exec.Spec{Path: "iptables-legacy-restore", Args: []string{"-w"}, Env: tools.Env, Netns: ns.Fd(),
				Stdin: strings.NewReader(wrong(right, m))}); err != nil {
				t.Fatal(err)
			}
			whole, together := find(-1), map[string]bool{}
			for part := range parts {
				maps.Copy(together, find(part))
			}
			if (len(whole) == 0) != (m.Name == "nothing") {
				t.Errorf("at once %d findings", len(whole))
			}
			if !maps.Equal(whole, together) {
				t.Errorf("at once:\n%s\nin parts:\n%s", strings.Join(slices.Sorted(maps.Keys(whole)), "\n"), strings.Join(slices.Sorted(maps.Keys(together)), "\n"))
			}
		})
	}
}

// wrong makes a mistake in a save text: in the first rule that fits, or where nothing
// is to stand instead in all that fit and are of the same chain.
func wrong(text string, m proxytest.WrongRule) string {
	if m.Table == "raw" {
		return text + "*raw\n-A " + m.Chain + " " + m.Instead + "\nCOMMIT\n"
	}
	var out []string
	table, at := "", ""
	done := m.Name == "nothing"
	for l := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(l, "*"); ok {
			table = strings.TrimSpace(name)
		}
		rule, isRule := strings.CutPrefix(l, "-A ")
		chain, _, _ := strings.Cut(rule, " ")
		fits := table == m.Table && isRule && strings.HasPrefix(chain, m.Chain)
		if m.Find == "" && !done && table == m.Table && (isRule || l == "COMMIT\n") {
			out, done = append(out, "-A "+m.Chain+" "+m.Instead+"\n"), true
		}
		if m.Find != "" && fits && strings.Contains(l, m.Find) && (!done || m.Instead == "" && chain == at) {
			at, done = chain, true
			if m.Instead == "" {
				continue
			}
			l = strings.Replace(l, m.Find, m.Instead, 1)
		}
		out = append(out, l)
	}
	return strings.Join(out, "") + "*raw\nCOMMIT\n" // without what stood there before
}

// TestFindingsOfParts has findings come and go in two parts and three.
func TestFindingsOfParts(t *testing.T) {
	finding := func(code, object string) check.Finding {
		return check.Finding{Code: code, Severity: check.Breaks, Object: object}
	}
	var f findings
	count := func(code string) int {
		i := slices.IndexFunc(f.get(), func(x prom.Finding) bool { return x.Code == code })
		if i < 0 {
			return -1
		}
		return f.get()[i].Count
	}
	for i, step := range []struct {
		part, parts       int
		found             []check.Finding
		service, forwards int
	}{
		{0, 3, []check.Finding{finding("service-missing", "a"), finding("ip-forward", "x")}, 1, 1},
		{1, 3, []check.Finding{finding("service-missing", "b"), finding("ip-forward", "x")}, 2, 1},
		{2, 3, nil, 2, 0}, // what was in two parts is over
		{0, 3, nil, 1, 0},
		{1, 3, []check.Finding{finding("service-missing", "b"), finding("service-missing", "c")}, 2, 0},
		{0, 2, []check.Finding{finding("service-missing", "a")}, 1, 0}, // other parts
		{0, 1, nil, 0, 0},
	} {
		f.set(step.part, step.parts, step.found)
		if a, b := count("service-missing"), count("ip-forward"); a != step.service || b != step.forwards {
			t.Errorf("step %d: %d and %d, want %d and %d", i, a, b, step.service, step.forwards)
		}
	}
}
