package trace

import (
	"net/netip"
	"testing"
)

func TestSameRules(t *testing.T) {
	rule := func(chain, text, verdict string) Hop {
		return Hop{Kind: HopRule, Hook: "prerouting", Table: "nat", Chain: chain, Text: text, Verdict: verdict}
	}
	predicted := Path{Predicted: true, Hops: []Hop{
		{Kind: HopPolicy, Hook: "prerouting", Table: "mangle", Chain: "PREROUTING", Verdict: "accept"},
		rule("A", "-j B", "jump"),
		{Kind: HopEnd, Hook: "prerouting", Table: "nat", Chain: "B", Verdict: "return"},
		rule("A", "-j DNAT --to-destination 10.1.0.2:8080", "dnat"),
	}}
	observed := Path{Hops: []Hop{
		{Kind: HopWire, Hook: "in", In: "eth0"},
		{Kind: HopPolicy, Hook: "prerouting", Table: "raw", Chain: "PREROUTING", Verdict: "accept"},
		predicted.Hops[1], predicted.Hops[2], predicted.Hops[3],
	}}
	// Numbers, handles, times and devices differ from node to node.
	observed.Hops[2].Rule, observed.Hops[2].Handle, observed.Hops[2].In = 7, 42, "cbr0"
	if at, same := predicted.SameRules(&observed); !same {
		t.Errorf("the same rules differ at %d", at)
	}
	observed.Hops[3].Chain = "C"
	if at, same := predicted.SameRules(&observed); same || at != 1 {
		t.Errorf("another chain's end: same %v at %d, want a difference at 1", same, at)
	}
	observed.Hops = observed.Hops[:3]
	if at, same := predicted.SameRules(&observed); same || at != 1 {
		t.Errorf("a path cut off: same %v at %d, want a difference at 1", same, at)
	}
}

func TestPathEndpoint(t *testing.T) {
	p := Path{Hops: []Hop{
		{Changes: []Change{{Field: "mark", After: "0x4000"}}},
		{Changes: []Change{{Field: "dst", Before: "10.96.0.10:80", After: "10.1.0.2:8080"}}},
		{Changes: []Change{{Field: "src", After: "10.1.0.1:40000"}}},
	}}
	if got := p.Endpoint(); got != netip.MustParseAddrPort("10.1.0.2:8080") {
		t.Errorf("endpoint %v", got)
	}
	if got := (&Path{}).Endpoint(); got.IsValid() {
		t.Errorf("no translation, yet endpoint %v", got)
	}
}
