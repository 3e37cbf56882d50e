package node

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
)

// randomServices writes Services in proxytest's words. Names differ from round to
// round, for the kernel remembers the clients of an endpoint by its name.
func randomServices(r *rand.Rand, round int) string {
	var b strings.Builder
	for i := range 2 + r.IntN(4) {
		proto, port, target := "tcp", 80, "8080"
		if r.IntN(4) == 0 {
			proto, port, target = "udp", 53, "5353"
		}
		fmt.Fprintf(&b, "shop/r%ds%d:p %s 10.96.3.%d:%d", round, i, proto, 10+i, port)
		if r.IntN(2) == 0 {
			fmt.Fprintf(&b, " nodeport=%d", 30100+i)
		}
		if r.IntN(3) == 0 {
			fmt.Fprintf(&b, " external=198.51.100.%d", 20+i)
		}
		if r.IntN(3) == 0 {
			fmt.Fprintf(&b, " lb=198.51.100.%d", 40+i)
			if r.IntN(2) == 0 {
				b.WriteString(" range=203.0.113.0/24")
			}
		}
		switch r.IntN(5) {
		case 0:
			b.WriteString(" policy=external")
		case 1:
			b.WriteString(" policy=internal")
		}
		if r.IntN(4) == 0 {
			b.WriteString(" affinity=1h")
		}
		for _, pod := range []string{"a", "b", "c"} {
			switch r.IntN(8) {
			case 0:
			case 1:
				fmt.Fprintf(&b, " %s:%s,notready", pod, target)
			case 2:
				fmt.Fprintf(&b, " %s:%s,terminating", pod, target)
			default:
				fmt.Fprintf(&b, " %s:%s", pod, target)
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// trial is one packet that is sent.
type trial struct {
	from proxytest.Source
	pkt  proxy.Packet
}

// trials are packets from each source to each address of each Service. A client
// goes to a Service with affinity only once, for what is predicted is the way
// without an entry.
func trials(r *rand.Rand, snap *proxy.Snapshot, port *uint16) []trial {
	var out []trial
	for i := range snap.Services {
		svc := &snap.Services[i]
		to := []netip.AddrPort{netip.AddrPortFrom(svc.ClusterIP, svc.Port)}
		for _, a := range append(append([]netip.Addr(nil), svc.ExternalIPs...), svc.LoadBalancerIPs...) {
			to = append(to, netip.AddrPortFrom(a, svc.Port))
		}
		if svc.NodePort != 0 {
			to = append(to, netip.AddrPortFrom(proxytest.NodeAddr, svc.NodePort))
		}
		sources := proxytest.Sources()
		r.Shuffle(len(sources), func(i, j int) { sources[i], sources[j] = sources[j], sources[i] })
		for _, s := range sources[:4] {
			r.Shuffle(len(to), func(i, j int) { to[i], to[j] = to[j], to[i] })
			for n, dst := range to {
				if n > 0 && svc.Affinity > 0 {
					break
				}
				*port++
				out = append(out, trial{s, proxy.Packet{
					Proto: svc.Name.Proto, Src: netip.AddrPortFrom(s.Addr(), *port), Dst: dst, FromNode: s == proxytest.FromNode,
				}})
			}
		}
	}
	return out
}

// ways makes paths of a prediction: of those to endpoints, and of those to none.
func ways(out *proxy.Outcome, pkt proxy.Packet) (to map[netip.AddrPort]*trace.Path, none *trace.Path) {
	a := explain.Outcome(out, proxy.IPTables, pkt)
	to = map[netip.AddrPort]*trace.Path{}
	for i := range a.Cases[0].Choices {
		c := &a.Cases[0].Choices[i]
		to[c.Endpoint.Addr] = &c.Ways[0].Path
	}
	if len(a.Cases[0].Ways) > 0 {
		none = &a.Cases[0].Ways[0].Path
	}
	return to, none
}

// verdictOn holds an observed path against a prediction; "" is agreement.
func verdictOn(out *proxy.Outcome, pkt proxy.Packet, seen *trace.Path) string {
	to, want := ways(out, pkt)
	if ep := seen.Endpoint(); ep.IsValid() {
		if want = to[ep]; want == nil {
			return fmt.Sprintf("it went to %s, which is no choice", ep)
		}
	}
	if want == nil {
		return "it reached no endpoint, which was not predicted"
	}
	if at, same := want.SameRules(seen); !same {
		return fmt.Sprintf("the ways differ at step %d\npredicted:\n%sobserved:\n%s", at, steps(want, at), steps(seen, at))
	}
	return ""
}

// steps prints steps around one.
func steps(p *trace.Path, around int) string {
	var b strings.Builder
	for i, s := range p.Steps() {
		if i >= around-2 && i <= around+2 {
			fmt.Fprintf(&b, "  %d %+v\n", i, s)
		}
	}
	return b.String()
}

func seedOf(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KPTRACE_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("KPTRACE_SEED=%d repeats this", seed)
	return seed
}

// TestPredictedIsObserved generates Services, endpoints, policies and clients,
// asks what would become of each client's first packet, sends it, and wants the
// kernel to have done that, rule by rule, given the endpoint that was picked.
func TestPredictedIsObserved(t *testing.T) {
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		t.Run(fl.String(), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seedOf(t), uint64(fl)))
			w := proxytest.NewWorld(t, false)
			rig := newPathRig(t, w.Node, fl, false)
			port, n := uint16(20000), 0
			for round := range 8 {
				text := randomServices(r, round)
				setup := proxytest.Setup{Snapshot: proxytest.Services(text), MasqueradeAll: r.IntN(4) == 0}
				if r.IntN(4) > 0 {
					setup.ClusterCIDR = proxytest.ClusterCIDR
				}
				b := backendFor(setup, w.Node, fl, false)
				prog := b.Render(setup.Snapshot, proxy.Overlay{})
				if _, err := b.Apply(t.Context(), prog); err != nil {
					t.Fatal(err)
				}
				rig.follow(t.Context(), setup.Snapshot, 1)
				sent := trials(r, setup.Snapshot, &port)
				for i := range sent {
					w.Must(w.NS[sent[i].from].Do(func() error {
						send(sent[i].pkt.Proto, sent[i].pkt.Src.Port(), sent[i].pkt.Dst, 50*time.Millisecond)
						return nil
					}))
				}
				for i := range sent {
					pkt := sent[i].pkt
					out := prog.Walk(pkt)
					if out.Verdict == proxy.Pass {
						continue
					}
					odds := 0.0
					for _, c := range out.Choices {
						odds += c.Probability
					}
					if len(out.Choices) > 0 && math.Abs(odds-1) > 1e-8 {
						t.Errorf("round %d: %s to %s: odds add up to %v", round, sent[i].from, pkt.Dst, odds)
					}
					name := "SYN"
					if pkt.Proto != conntrack.TCP {
						name = pkt.Proto.String()
					}
					seen, ok := rig.find(pkt.Src.Port(), name)
					if !ok {
						t.Fatalf("round %d: no path of %s to %s was seen; Services:\n%s", round, sent[i].from, pkt.Dst, text)
					}
					n++
					if why := verdictOn(&out, pkt, &seen.Path); why != "" {
						t.Errorf("round %d: %s to %s: %s\nServices:\n%s", round, sent[i].from, pkt.Dst, why, text)
					}
				}
			}
			t.Logf("%d packets went as predicted", n)
			if n < 80 {
				t.Errorf("only %d packets", n)
			}
		})
	}
}

// TestPicksFollowOdds wants the endpoints that are picked to have the shares
// predicted: chi-squared with two degrees of freedom exceeds 23 by chance once in
// 100,000 runs.
func TestPicksFollowOdds(t *testing.T) {
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		t.Run(fl.String(), func(t *testing.T) {
			w := proxytest.NewWorld(t, false)
			rig := newPathRig(t, w.Node, fl, false)
			setup := proxytest.Setup{Snapshot: proxytest.Services("shop/web:p tcp 10.96.3.10:80 a:8080 b:8080 c:8080"), ClusterCIDR: proxytest.ClusterCIDR}
			b := backendFor(setup, w.Node, fl, false)
			prog := b.Render(setup.Snapshot, proxy.Overlay{})
			if _, err := b.Apply(t.Context(), prog); err != nil {
				t.Fatal(err)
			}
			rig.follow(t.Context(), setup.Snapshot, 1)
			const sent, first = 300, 30000
			to := netip.MustParseAddrPort("10.96.3.10:80")
			w.Must(w.NS[proxytest.FromPod].Do(func() error {
				for i := range sent {
					send(conntrack.TCP, uint16(first+i), to, time.Second)
				}
				return nil
			}))
			got := map[netip.AddrPort]float64{}
			for i := range sent {
				j, ok := rig.find(uint16(first+i), "SYN")
				if !ok {
					t.Fatalf("connection %d was not seen", i)
				}
				got[j.Path.Endpoint()]++
			}
			out := prog.Walk(proxy.Packet{Proto: conntrack.TCP, Src: netip.AddrPortFrom(proxytest.FromPod.Addr(), first), Dst: to})
			chi := 0.0
			for _, c := range out.Choices {
				want := c.Probability * sent
				chi += (got[c.Endpoint] - want) * (got[c.Endpoint] - want) / want
			}
			t.Logf("picks %v, chi-squared %.2f", got, chi)
			if len(out.Choices) != 3 || chi > 23 {
				t.Errorf("picks %v do not follow the odds: chi-squared %.2f", got, chi)
			}
		})
	}
}

// wrongRules are mistakes in live rules, one for each thing that can go wrong:
// what to look for in a chain and what stands there instead, "" being nothing.
func wrongRules() []struct{ name, table, chain, find, instead string } {
	return []struct{ name, table, chain, find, instead string }{
		{"DNAT to another port", "nat", "KUBE-SEP-", "--to-destination 10.244.1.2:8080", "--to-destination 10.244.1.2:8443"},
		{"DNAT to another endpoint", "nat", "KUBE-SEP-", "--to-destination 10.244.1.2:8080", "--to-destination 10.244.2.2:8080"},
		{"no DNAT", "nat", "KUBE-SEP-", "-j DNAT", ""},
		{"odds of the first pick", "nat", "KUBE-SVC-", "--probability 0.33333", "--probability 0.9"},
		{"odds of the second pick", "nat", "KUBE-SVC-", "--probability 0.50000", "--probability 0.9"},
		{"an endpoint is skipped", "nat", "KUBE-SVC-", "--probability 0.33333", ""},
		{"no masquerade of outside clients", "nat", "KUBE-SVC-", "-j KUBE-MARK-MASQ", ""},
		{"another mark", "nat", "KUBE-MARK-MASQ", "0x4000/0x4000", "0x8000/0x8000"},
		{"the mark is not looked for", "nat", "KUBE-POSTROUTING", "-j RETURN", ""},
		{"another service port", "nat", "KUBE-SERVICES", "--dport 80 -j", "--dport 81 -j"},
		{"another service address", "nat", "KUBE-SERVICES", "-d 10.96.3.10/32", "-d 10.96.3.99/32"},
		{"somebody accepts it before", "nat", "PREROUTING", "", "-j ACCEPT"},
		{"somebody drops it", "filter", "FORWARD", "", "-p tcp -m tcp --dport 8080 -j DROP"},
		{"not tracked", "raw", "PREROUTING", "", "-p tcp -m tcp --dport 80 -j CT --notrack"},
		{"the jump to the service chains is gone", "nat", "PREROUTING", "-j KUBE-SERVICES", ""},
	}
}

// TestWrongRulesAreCaught changes one rule at a time behind the proxy's back, and
// wants a packet whose path is not the predicted one.
func TestWrongRulesAreCaught(t *testing.T) {
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		t.Run(fl.String(), func(t *testing.T) {
			w := proxytest.NewWorld(t, false)
			rig := newPathRig(t, w.Node, fl, false)
			setup := proxytest.Setup{
				Snapshot:    proxytest.Services("shop/web:p tcp 10.96.3.10:80 a:8080 b:8080 c:8080"),
				ClusterCIDR: proxytest.ClusterCIDR,
			}
			b := backendFor(setup, w.Node, fl, false)
			prog := b.Render(setup.Snapshot, proxy.Overlay{})
			apply := func() {
				t.Helper()
				b.Forget()
				if _, err := b.Apply(t.Context(), prog); err != nil {
					t.Fatal(err)
				}
			}
			apply()
			rig.follow(t.Context(), setup.Snapshot, 1)
			port := uint16(20000)
			to := netip.MustParseAddrPort("10.96.3.10:80")
			// caught sends packets of a pod and from outside, and wants each to go
			// as predicted, and all together where the odds say.
			caught := func() string {
				const most = 30
				picks := map[netip.AddrPort]float64{}
				for _, from := range []proxytest.Source{proxytest.FromOutside, proxytest.FromPod} {
					first := port + 1
					port += most
					w.Must(w.NS[from].Do(func() error {
						for p := first; p <= port; p++ {
							send(conntrack.TCP, p, to, 20*time.Millisecond)
						}
						return nil
					}))
					for p := first; p <= port; p++ {
						pkt := proxy.Packet{Proto: conntrack.TCP, Src: netip.AddrPortFrom(from.Addr(), p), Dst: to}
						out := prog.Walk(pkt)
						seen, ok := rig.find(p, "SYN")
						if !ok {
							t.Fatalf("packet from port %d was not seen", p)
						}
						if why := verdictOn(&out, pkt, &seen.Path); why != "" {
							return why
						}
						picks[seen.Path.Endpoint()]++
					}
				}
				chi := 0.0
				for _, ep := range setup.Snapshot.Services[0].Endpoints {
					want := 2. * most / 3
					chi += (picks[ep.Addr] - want) * (picks[ep.Addr] - want) / want
				}
				if chi > 23 {
					return fmt.Sprintf("the picks %v do not follow the odds", picks)
				}
				return ""
			}
			if why := caught(); why != "" {
				t.Fatalf("right rules: %s", why)
			}
			n := 0
			for _, m := range wrongRules() {
				undo := mutate(t, w, fl, m.table, m.chain, m.find, m.instead)
				rig.reload(t.Context())
				if why := caught(); why == "" {
					t.Errorf("%s: not caught", m.name)
				} else {
					n++
				}
				undo()
				apply()
				rig.reload(t.Context())
			}
			if why := caught(); why != "" {
				t.Errorf("after the repair: %s", why)
			}
			t.Logf("%d of %d wrong rules caught", n, len(wrongRules()))
		})
	}
}

// mutate changes the first rule of the first chain that fits. undo takes back
// what the proxy would not repair.
func mutate(t *testing.T, w *proxytest.World, fl xtables.Flavour, table, chain, find, instead string) (undo func()) {
	t.Helper()
	tools := xtables.Tools{Netns: w.Node.Fd()}
	run := func(args ...string) {
		t.Helper()
		_, err := exec.Run(t.Context(), exec.Spec{
			Path: "sh", Args: append([]string{"-c", `exec "$0" "$@"`, xtables.Program(fl, xtables.IPv4, "")}, args...), Netns: w.Node.Fd(),
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if find == "" { // a rule of somebody else, at the head
		add := append([]string{"-w", "-t", table, "-I", chain}, strings.Fields(instead)...)
		run(add...)
		return func() {
			run(append([]string{"-w", "-t", table, "-D", chain}, strings.Fields(instead)...)...)
		}
	}
	have, err := tools.Save(t.Context(), fl, xtables.IPv4, table, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range have.Table(table).Chains {
		if !strings.HasPrefix(c.Name, chain) {
			continue
		}
		for i, r := range c.Rules {
			text := r.String()
			if !strings.Contains(text, find) {
				continue
			}
			at := strconv.Itoa(i + 1)
			if instead == "" {
				run("-w", "-t", table, "-D", c.Name, at)
				return func() {}
			}
			wrong := strings.Replace(text, find, instead, 1)
			if strings.Contains(find, "--probability") { // the digits behind
				words := strings.Fields(wrong)
				for j := range words {
					if words[j] == "--probability" {
						words[j+1] = strings.Fields(instead)[1]
					}
				}
				wrong = strings.Join(words, " ")
			}
			run("-w", "-t", table, "-D", c.Name, at)
			// The shell takes the rule apart as iptables printed it.
			_, err := exec.Run(t.Context(), exec.Spec{Path: "sh", Args: []string{"-c", fmt.Sprintf("%s -w -t %s -I %s %s %s",
				xtables.Program(fl, xtables.IPv4, ""), table, c.Name, at, wrong)}, Netns: w.Node.Fd()})
			if err != nil {
				t.Fatal(err)
			}
			return func() {}
		}
	}
	t.Fatalf("no rule with %q in %s %s", find, table, chain)
	return nil
}

// TestTableIsObserved sends the first packet of every row of the conformance
// table, of both families, and wants the path that the row's Program predicts.
func TestTableIsObserved(t *testing.T) {
	for i := range 4 {
		fl, six, cases := xtables.Flavour(i&1), i&2 != 0, proxytest.Cases()
		name := fl.String()
		if six {
			name, cases = name+" ipv6", proxytest.Cases6()
		}
		t.Run(name, func(t *testing.T) {
			w := proxytest.NewWorld(t, six)
			rig := newPathRig(t, w.Node, fl, six)
			port := uint16(20000)
			for _, c := range cases {
				b := backendFor(c.Setup, w.Node, fl, six)
				prog := b.Render(c.Setup.Snapshot, c.Setup.Overlay)
				if _, err := b.Apply(t.Context(), prog); err != nil {
					t.Fatal(err)
				}
				rig.follow(t.Context(), c.Setup.Snapshot, 1)
				for _, row := range c.Rows {
					pkt := row.Packet()
					out := prog.Walk(pkt)
					if out.Verdict == proxy.Pass {
						continue
					}
					port++
					w.Must(w.NS[row.From].Do(func() error {
						send(row.Proto, port, row.To, 50*time.Millisecond)
						return nil
					}))
					packet := "SYN"
					if row.Proto != conntrack.TCP {
						packet = row.Proto.String()
					}
					seen, ok := rig.find(port, packet)
					if !ok {
						t.Errorf("%s: %s: not seen", c.Name, row.Name())
					} else if why := verdictOn(&out, pkt, &seen.Path); why != "" {
						t.Errorf("%s: %s: %s", c.Name, row.Name(), why)
					}
				}
			}
		})
	}
}
