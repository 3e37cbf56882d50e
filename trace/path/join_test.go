package path

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
)

const live = `*raw
:PREROUTING ACCEPT [0:0]
:KPTRACE-PATH - [0:0]
-A PREROUTING -p tcp -j KPTRACE-PATH
-A KPTRACE-PATH -p tcp -j TRACE
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-BBBBBBBBBBBBBBBB - [0:0]
:KUBE-SEP-CCCCCCCCCCCCCCCC - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/foo:http cluster IP" -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA
-A KUBE-SVC-AAAAAAAAAAAAAAAA ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p tcp -m comment --comment "shop/foo:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-AAAAAAAAAAAAAAAA -m comment --comment "shop/foo:http -> 10.1.0.2:8080" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-BBBBBBBBBBBBBBBB
-A KUBE-SVC-AAAAAAAAAAAAAAAA -m comment --comment "shop/foo:http -> 10.1.0.3:8080" -j KUBE-SEP-CCCCCCCCCCCCCCCC
-A KUBE-SEP-BBBBBBBBBBBBBBBB -p tcp -m comment --comment "shop/foo:http" -m tcp -j DNAT --to-destination 10.1.0.2:8080
-A KUBE-SEP-CCCCCCCCCCCCCCCC -p tcp -m comment --comment "shop/foo:http" -m tcp -j DNAT --to-destination 10.1.0.3:8080
COMMIT
*filter
:FORWARD DROP [0:0]
COMMIT
`

// generation makes one of an iptables-save, in which the handle of a rule is 100
// and its number among all rules.
func generation(t *testing.T, text string, from int64) *Generation {
	t.Helper()
	rs, err := xtables.Parse(xtables.IPv4, text)
	if err != nil {
		t.Fatal(err)
	}
	g := &Generation{
		From: from, Rules: map[uint8]*xtables.Ruleset{nfnl.FamilyIPv4: rs}, Index: map[HandleKey]int{},
		Program: liverules.New(liverules.Config{}, rs),
	}
	n := uint64(100)
	for _, table := range rs.Tables {
		for _, c := range table.Chains {
			for i := range c.Rules {
				g.Index[HandleKey{nfnl.FamilyIPv4, table.Name, c.Name, n}] = i
				n++
			}
		}
	}
	return g
}

// world is a Joiner with what it emits.
type world struct {
	t     *testing.T
	rules Rules
	j     *Joiner
	out   []Joined
	now   int64
	gen   *Generation
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, now: int64(time.Hour)}
	w.gen = generation(t, live, 1)
	w.rules.Add(w.gen)
	w.j = New(Config{
		Rules:  w.rules.Find,
		IPVS:   w.rules.IPVS,
		Device: func(i uint32) string { return map[uint32]string{2: "eth0", 3: "cbr0", 4: "veth1"}[i] },
		Names:  &Names{Endpoint: func(netip.AddrPort) string { return "foo-5c" }},
		Own:    func(table, chain string) bool { return table == "raw" && chain == "KPTRACE-PATH" },
		Emit:   func(j Joined) { w.out = append(w.out, j) },
	})
	return w
}

// nft hands over a hit of a rule, found by a part of its text; "" is the end of
// the chain, "policy" the policy.
func (w *world) nft(id uint32, table, chain, rule string, mark uint32, packet *trace.PacketHeader, in, out uint32) {
	w.t.Helper()
	h := trace.RuleHit{Source: trace.NFTrace, Time: w.now, Family: nfnl.FamilyIPv4, Table: table, Chain: chain, TraceID: id, Mark: mark, HasMark: true}
	if packet != nil {
		h.Packet, h.HasPacket, h.InDev, h.OutDev = *packet, true, in, out
	}
	switch rule {
	case "":
		h.Kind, h.Verdict = trace.HopEnd, "return"
	case "policy":
		h.Kind, h.Verdict = trace.HopPolicy, "accept"
	default:
		h.Kind = trace.HopRule
		for i, r := range w.gen.Rules[nfnl.FamilyIPv4].Chain(table, chain).Rules {
			if strings.Contains(r.String(), rule) {
				for k, at := range w.gen.Index {
					if k.Table == table && k.Chain == chain && at == i {
						h.Handle = k.Handle
					}
				}
			}
		}
		if h.Handle == 0 {
			w.t.Fatalf("no rule with %q in %s %s", rule, table, chain)
		}
	}
	w.j.Hit(&h, w.now)
	w.now += 1000
}

// after lets time pass and returns what was emitted meanwhile.
func (w *world) after(d time.Duration) []Joined {
	w.out = nil
	w.now += int64(d)
	w.j.Advance(time.Unix(0, w.now))
	return w.out
}

func header(src, dst string, ttl uint8, flags uint8, seq, ack uint32) *trace.PacketHeader {
	return &trace.PacketHeader{
		Tuple: conntrack.NewTuple(conntrack.TCP, netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)),
		TTL:   ttl, IPID: 7, Len: 60, TCPFlags: flags, Seq: seq, Ack: ack,
	}
}

const (
	syn    = 2
	synAck = 18
)

// walk sends a SYN of a client outside through the rules.
func (w *world) walk(id uint32, client string, seq uint32) {
	pre := header(client, "10.96.0.10:80", 64, syn, seq, 0)
	post := header(client, "10.1.0.2:8080", 63, syn, seq, 0)
	w.nft(id, "raw", "KPTRACE-PATH", "-j TRACE", 0, pre, 2, 0)
	w.nft(id, "raw", "KPTRACE-PATH", "", 0, nil, 0, 0)
	w.nft(id, "raw", "PREROUTING", "", 0, nil, 0, 0)
	w.nft(id, "raw", "PREROUTING", "policy", 0, nil, 0, 0)
	w.nft(id, "nat", "PREROUTING", "portals", 0, pre, 2, 0)
	w.nft(id, "nat", "KUBE-SERVICES", "cluster IP", 0, nil, 0, 0)
	w.nft(id, "nat", "KUBE-SVC-AAAAAAAAAAAAAAAA", "KUBE-MARK-MASQ", 0, nil, 0, 0)
	w.nft(id, "nat", "KUBE-MARK-MASQ", "MARK", 0x4000, nil, 0, 0)
	w.nft(id, "nat", "KUBE-MARK-MASQ", "", 0x4000, nil, 0, 0)
	w.nft(id, "nat", "KUBE-SVC-AAAAAAAAAAAAAAAA", "statistic", 0x4000, nil, 0, 0)
	w.nft(id, "nat", "KUBE-SEP-BBBBBBBBBBBBBBBB", "DNAT", 0x4000, nil, 0, 0)
	w.nft(id, "filter", "FORWARD", "policy", 0x4000, post, 2, 3)
	w.nft(id, "nat", "POSTROUTING", "MASQUERADE", 0x4000, post, 2, 3)
}

func TestJoinNFT(t *testing.T) {
	w := newWorld(t)
	w.walk(1, "10.9.0.2:40000", 1000)
	if got := w.after(100 * time.Millisecond); len(got) != 0 {
		t.Fatalf("emitted while more may come: %v", got)
	}
	got := w.after(60 * time.Millisecond)
	if len(got) != 1 {
		t.Fatalf("%d paths", len(got))
	}
	p := got[0].Path
	if p.Packet != "SYN" || p.Tuple.Dst() != netip.MustParseAddrPort("10.96.0.10:80") || p.Incomplete || p.Endpoint() != netip.MustParseAddrPort("10.1.0.2:8080") {
		t.Errorf("path %+v", p)
	}
	want := []struct{ kind, where, verdict, purpose, change string }{
		{"policy", "prerouting raw PREROUTING", "accept", "", ""},
		{"rule", "prerouting nat PREROUTING", "jump", "see whether it is for a Service", ""},
		{"rule", "prerouting nat KUBE-SERVICES", "jump", "cluster IP of shop/foo:http", ""},
		{"rule", "prerouting nat KUBE-SVC-AAAAAAAAAAAAAAAA", "jump", "masquerade it, because the client is outside the pod network", ""},
		{"rule", "prerouting nat KUBE-MARK-MASQ", "match", "mark it to be masqueraded", "mark 0x0 0x4000"},
		{"end", "prerouting nat KUBE-MARK-MASQ", "return", "", ""},
		{"rule", "prerouting nat KUBE-SVC-AAAAAAAAAAAAAAAA", "jump", "pick 1 of 2, p = 0.500: foo-5c 10.1.0.2:8080", ""},
		{"rule", "prerouting nat KUBE-SEP-BBBBBBBBBBBBBBBB", "dnat", "DNAT to foo-5c 10.1.0.2:8080", "dst 10.96.0.10:80 10.1.0.2:8080"},
		{"route", "  ", "", "routed", "ttl 64 63"},
		{"policy", "forward filter FORWARD", "accept", "", ""},
		{"rule", "postrouting nat POSTROUTING", "masquerade", "", ""},
	}
	if len(p.Hops) != len(want) {
		t.Fatalf("%d hops, want %d: %+v", len(p.Hops), len(want), p.Hops)
	}
	for i, x := range want {
		h := &p.Hops[i]
		change := ""
		if len(h.Changes) == 1 {
			change = h.Changes[0].Field + " " + h.Changes[0].Before + " " + h.Changes[0].After
		}
		if string(h.Kind) != x.kind || h.Hook+" "+h.Table+" "+h.Chain != x.where || h.Verdict != x.verdict || h.Purpose != x.purpose || change != x.change {
			t.Errorf("hop %d: %+v, want %+v", i, h, x)
		}
	}
	if !p.Left.IsZero() {
		t.Errorf("how it left is known before conntrack says: %v", p.Left)
	}
	orig := p.Tuple
	reply := conntrack.NewTuple(conntrack.TCP, netip.MustParseAddrPort("10.1.0.2:8080"), netip.MustParseAddrPort("10.1.0.1:5000"))
	p.Complete(orig, reply)
	if p.Reply || p.Left.Src() != netip.MustParseAddrPort("10.1.0.1:5000") || p.Hops[10].Changes[0].After != "10.1.0.1:5000" {
		t.Errorf("completed: %+v", p)
	}
	if len(got[0].Path.Hops[10].Changes) != 0 {
		t.Error("completing one path changed what others hold")
	}
}

// IPVS is a hop between input and output for a request, behind forward for an
// answer.
func TestIPVS(t *testing.T) {
	w := newWorld(t)
	w.gen = generation(t, strings.NewReplacer(":FORWARD DROP [0:0]\n", ":INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:KUBE-IPVS-FILTER - [0:0]\n").Replace(live), 1)
	w.rules.Add(w.gen)
	pre, picked := header("10.9.0.2:40000", "10.96.0.10:80", 64, syn, 9, 0), header("10.9.0.2:40000", "10.1.0.2:8080", 63, syn, 9, 0)
	w.nft(1, "raw", "KPTRACE-PATH", "-j TRACE", 0, pre, 2, 0)
	w.nft(1, "filter", "INPUT", "policy", 0, pre, 2, 0)
	w.nft(1, "filter", "OUTPUT", "policy", 0, picked, 0, 3)
	answer, translated := header("10.1.0.2:8080", "10.9.0.2:40000", 64, synAck, 70, 10), header("10.96.0.10:80", "10.9.0.2:40000", 63, synAck, 70, 10)
	w.nft(2, "raw", "KPTRACE-PATH", "-j TRACE", 0, answer, 3, 0)
	w.nft(2, "filter", "FORWARD", "policy", 0, answer, 3, 2)
	w.nft(2, "nat", "POSTROUTING", "policy", 0, translated, 0, 2)
	// What the node sends meets the rules of output twice, unless it stays here.
	mine, away := header("10.96.0.10:40001", "10.96.0.10:80", 64, syn, 11, 0), header("10.96.0.10:40001", "10.1.0.3:8080", 64, syn, 11, 0)
	w.nft(3, "raw", "OUTPUT", "policy", 0, mine, 0, 3)
	w.nft(3, "nat", "OUTPUT", "policy", 0, mine, 0, 3)
	w.nft(3, "raw", "OUTPUT", "policy", 0, away, 0, 3)
	w.nft(3, "filter", "OUTPUT", "policy", 0, away, 0, 3)
	mine, away = header("10.96.0.10:40002", "10.96.0.10:80", 64, syn, 12, 0), header("10.96.0.10:40002", "192.0.2.1:8080", 64, syn, 12, 0)
	w.nft(4, "nat", "OUTPUT", "policy", 0, mine, 0, 3)
	w.nft(4, "filter", "OUTPUT", "policy", 0, away, 0, 3)
	var got []string
	for _, j := range w.after(2 * time.Second) {
		for _, h := range j.Path.Hops {
			if h.Kind == trace.HopIPVS {
				got = append(got, h.Hook+" "+h.Verdict+" "+h.Changes[0].Before+" "+h.Changes[0].After)
			}
		}
	}
	want := []string{"input dnat 10.96.0.10:80 10.1.0.2:8080", "forward snat 10.1.0.2:8080 10.96.0.10:80",
		"output dnat 10.96.0.10:80 10.1.0.3:8080", "output dnat 10.96.0.10:80 192.0.2.1:8080"}
	if !slices.Equal(got, want) {
		t.Errorf("hops of IPVS: %q, want %q", got, want)
	}
}

// In the other modes it is connection tracking that translates an answer, of which
// no rule need tell.
func TestAnswerWithoutIPVS(t *testing.T) {
	w := newWorld(t)
	answer, translated := header("10.1.0.2:8080", "10.9.0.2:40000", 64, synAck, 70, 10), header("10.96.0.10:80", "10.9.0.2:40000", 63, synAck, 70, 10)
	w.nft(2, "raw", "KPTRACE-PATH", "-j TRACE", 0, answer, 3, 0)
	w.nft(2, "filter", "FORWARD", "policy", 0, answer, 3, 2)
	w.nft(2, "nat", "POSTROUTING", "policy", 0, translated, 0, 2)
	var got []string
	for _, j := range w.after(2 * time.Second) {
		for _, h := range j.Path.Hops {
			if len(h.Changes) > 0 && h.Changes[0].Field == "src" {
				got = append(got, string(h.Kind)+" "+h.Changes[0].Before+" "+h.Changes[0].After)
			}
		}
	}
	if want := []string{"conntrack 10.1.0.2:8080 10.96.0.10:80"}; !slices.Equal(got, want) {
		t.Errorf("translated by %q, want %q", got, want)
	}
}

func TestTraceIDRecurs(t *testing.T) {
	w := newWorld(t)
	w.walk(1, "10.9.0.2:40000", 1000)
	w.walk(1, "10.9.0.2:40001", 2000) // the same id for another packet
	got := w.after(200 * time.Millisecond)
	if len(got) != 2 || got[0].Path.Tuple == got[1].Path.Tuple || len(got[0].Path.Hops) != 11 || len(got[1].Path.Hops) != 11 {
		t.Fatalf("got %d paths: %+v", len(got), got)
	}
}

func TestCopyIsAnotherPacket(t *testing.T) {
	w := newWorld(t)
	w.walk(1, "10.9.0.2:40000", 1000)
	w.out = nil
	w.walk(2, "10.9.0.2:40000", 1000) // to the bit
	if len(w.out) != 1 {
		t.Errorf("%d paths after the copy came", len(w.out))
	}
	if got := w.after(200 * time.Millisecond); len(got) != 1 || len(got[0].Path.Hops) != 11 {
		t.Errorf("the copy: %+v", got)
	}
}

func TestReplyChangesTraceID(t *testing.T) {
	w := newWorld(t)
	pre := header("10.1.0.2:8080", "10.1.0.1:5000", 64, synAck, 5, 1001)
	post := header("10.1.0.2:8080", "10.9.0.2:40000", 63, synAck, 5, 1001)
	w.nft(1, "raw", "KPTRACE-PATH", "-j TRACE", 0, pre, 3, 0)
	w.nft(1, "raw", "PREROUTING", "policy", 0, nil, 0, 0)
	w.nft(2, "filter", "FORWARD", "policy", 0, post, 3, 2)
	got := w.after(500 * time.Millisecond)
	if len(got) != 1 {
		t.Fatalf("%d paths", len(got))
	}
	hops := got[0].Path.Hops
	if len(hops) != 4 || hops[1].Kind != trace.HopConntrack || hops[1].Changes[0].After != "10.9.0.2:40000" || hops[2].Kind != trace.HopRoute {
		t.Errorf("hops %+v", hops)
	}
}

func TestOrphansAndLoss(t *testing.T) {
	w := newWorld(t)
	w.nft(9, "nat", "KUBE-SERVICES", "cluster IP", 0, nil, 0, 0)
	if s := w.j.Stats(); s.Orphans != 1 {
		t.Errorf("stats %+v", s)
	}
	w.walk(1, "10.9.0.2:40000", 1000)
	w.j.Lost(trace.Loss{From: w.now - 500, To: w.now, Events: 3})
	got := w.after(200 * time.Millisecond)
	if len(got) != 1 || !got[0].Path.Incomplete || w.j.Stats().Incomplete != 1 {
		t.Errorf("after a loss: %+v", got)
	}
}

func TestWire(t *testing.T) {
	w := newWorld(t)
	in := header("10.9.0.2:40000", "10.96.0.10:80", 64, syn, 1000, 0)
	out := header("10.1.0.1:5000", "10.1.0.2:8080", 63, syn, 1000, 0)
	base := w.now
	w.j.Sighting(&trace.Sighting{Time: base, Device: 2, Packet: *in}, w.now)
	w.walk(1, "10.9.0.2:40000", 1000)
	w.j.Sighting(&trace.Sighting{Time: base + 50_000, Device: 4, Packet: *out}, w.now)
	w.j.Sighting(&trace.Sighting{Time: base + 40_000, Device: 3, Packet: *out}, w.now)
	// A packet that no rule met is nobody's path.
	w.j.Sighting(&trace.Sighting{Time: base, Device: 2, Packet: *header("10.9.0.9:1", "10.9.0.8:2", 64, syn, 77, 0)}, w.now)
	got := w.after(200 * time.Millisecond)
	if len(got) != 1 {
		t.Fatalf("%d paths", len(got))
	}
	p := got[0].Path
	n := len(p.Hops)
	first, last := p.Hops[0], p.Hops[n-1]
	if first.Kind != trace.HopWire || first.Hook != "in" || first.In != "eth0" || p.Hops[n-2].Out != "cbr0" || last.Out != "veth1" || last.Hook != "out" {
		t.Errorf("hops %+v", p.Hops)
	}
	if p.Left != out.Tuple {
		t.Errorf("left as %v", p.Left)
	}
	for i := range p.Hops {
		if p.Hops[i].Verdict == "masquerade" && (len(p.Hops[i].Changes) != 1 || p.Hops[i].Changes[0].After != "10.1.0.1:5000") {
			t.Errorf("the source that the wire shows is not the masquerade's: %+v", p.Hops[i])
		}
	}
}

// TestNewRuleIsWaitedFor meets a rule that is newer than the rules read.
func TestNewRuleIsWaitedFor(t *testing.T) {
	w := newWorld(t)
	syn1 := header("10.9.0.2:40000", "10.96.0.10:80", 64, syn, 1000, 0)
	w.nft(1, "raw", "KPTRACE-PATH", "-j TRACE", 0, syn1, 2, 0)
	h := trace.RuleHit{Source: trace.NFTrace, Time: w.now, Family: nfnl.FamilyIPv4, Table: "nat", Chain: "PREROUTING", TraceID: 1,
		Kind: trace.HopRule, Handle: 999, Verdict: "accept", HasMark: true}
	w.j.Hit(&h, w.now)
	if got := w.after(time.Second); len(got) != 0 || !w.rules.Stale() {
		t.Fatalf("not waited for: %+v", got)
	}
	next := generation(t, strings.Replace(live, "-A PREROUTING -m comment", "-A PREROUTING -s 10.9.0.2/32 -j ACCEPT\n-A PREROUTING -m comment", 1), w.now)
	next.Index[HandleKey{nfnl.FamilyIPv4, "nat", "PREROUTING", 999}] = 0
	w.rules.Add(next)
	got := w.after(time.Millisecond)
	if len(got) != 1 || got[0].Path.Hops[0].Text != "-s 10.9.0.2/32 -j ACCEPT" {
		t.Fatalf("got %+v", got)
	}
	// One that never appears is told as it is.
	h.Handle, h.Time = 998, w.now
	w.nft(1, "raw", "KPTRACE-PATH", "-j TRACE", 0, header("10.9.0.2:40001", "10.96.0.10:80", 64, syn, 2000, 0), 2, 0)
	w.j.Hit(&h, w.now)
	w.after(time.Second)
	got = w.after(3 * time.Second)
	if len(got) != 1 || got[0].Path.Hops[0].Verdict != "accept" || !strings.Contains(got[0].Path.Hops[0].Purpose, "rule 998") {
		t.Fatalf("got %+v", got)
	}
}

// TestLegacyNumbersHoldForTheirGeneration looks the same number up in two.
func TestLegacyNumbersHoldForTheirGeneration(t *testing.T) {
	w := newWorld(t)
	w.rules.Add(generation(t, strings.Replace(live, "-A PREROUTING -m comment", "-A PREROUTING -s 10.9.0.2/32 -j ACCEPT\n-A PREROUTING -m comment", 1), 5000))
	hit := func(at int64) Found {
		return w.rules.Find(&trace.RuleHit{Family: nfnl.FamilyIPv4, Table: "nat", Chain: "PREROUTING", Kind: trace.HopRule, Number: 1, Time: at})
	}
	if f := hit(4000); f.Effect != "jump" {
		t.Errorf("before the change: %+v", f)
	}
	if f := hit(6000); f.Effect != "accept" {
		t.Errorf("after the change: %+v", f)
	}
	if f := w.rules.Find(&trace.RuleHit{Family: nfnl.FamilyIPv4, Table: "nat", Chain: "PREROUTING", Kind: trace.HopRule, Number: 9, Time: 6000}); f.Rule != nil || f.Note == "" {
		t.Errorf("a number beyond the chain: %+v", f)
	}
	if f := w.rules.Find(&trace.RuleHit{Family: nfnl.FamilyIPv4, Table: "filter", Chain: "FORWARD", Kind: trace.HopPolicy, Number: 1, Time: 6000}); f.Policy != "DROP" {
		t.Errorf("policy: %+v", f)
	}
}

func TestBounded(t *testing.T) {
	w := newWorld(t)
	w.j.cfg.MaxPackets = 3
	for i := range 10 {
		w.walk(uint32(i), "10.9.0.2:40000", uint32(1000+i))
	}
	if len(w.j.byID) > 3 || len(w.out) != 7 {
		t.Errorf("%d under way, %d emitted", len(w.j.byID), len(w.out))
	}
	for _, j := range w.out {
		if !j.Path.Incomplete {
			t.Error("a path cut short is not called incomplete")
		}
	}
}

func BenchmarkJoin(b *testing.B) {
	w := newWorld(&testing.T{})
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		w.walk(uint32(i), "10.9.0.2:40000", uint32(i))
		if i%100 == 99 {
			w.after(time.Second)
		}
	}
}

func TestOldest(t *testing.T) {
	now := time.Unix(100, 0)
	j := New(Config{})
	if j.Oldest() != 0 {
		t.Errorf("nothing is under way, and the oldest is of %d", j.Oldest())
	}
	for i := range 3 {
		src := netip.AddrPortFrom(netip.MustParseAddr("10.1.0.1"), uint16(1000+i))
		p := trace.PacketHeader{Seq: uint32(i), Tuple: conntrack.NewTuple(conntrack.TCP, src, netip.MustParseAddrPort("10.1.0.2:80"))}
		j.Sighting(&trace.Sighting{Packet: p}, now.Add(time.Duration(i)*time.Second).UnixNano())
	}
	if want := now.UnixNano(); j.Oldest() != want {
		t.Errorf("oldest %d, want %d", j.Oldest(), want)
	}
	j.Advance(now.Add(999 * time.Millisecond))
	if want := now.Add(time.Second).UnixNano(); j.Oldest() != want {
		t.Errorf("the first is over: oldest %d, want %d", j.Oldest(), want)
	}
	j.Flush(now)
	if j.Oldest() != 0 {
		t.Errorf("all are over, and the oldest is of %d", j.Oldest())
	}
}
