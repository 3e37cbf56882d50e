package xtables

import (
	"io"
	"slices"
	"testing"
	"testing/iotest"
)

func TestText(t *testing.T) {
	blocks := [][]Unit{
		{{Table: "nat", Lines: []string{":A - [0:0]", "-A A -j B"}}, {Table: "nat", Lines: []string{":B - [0:0]", "-A B -j ACCEPT", "-X C"}}},
		{{Table: "filter", Lines: []string{"-A INPUT -j DROP"}}},
	}
	const want = "*nat\n:A - [0:0]\n:B - [0:0]\n-A A -j B\n-A B -j ACCEPT\n-X C\nCOMMIT\n*filter\n-A INPUT -j DROP\nCOMMIT\n"
	for name, r := range map[string]io.Reader{
		"at once": &text{blocks: blocks}, "by bytes": iotest.OneByteReader(&text{blocks: blocks}),
	} {
		if got, err := io.ReadAll(r); err != nil || string(got) != want {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, got, want)
		}
	}
	if err := iotest.TestReader(&text{blocks: blocks}, []byte(want)); err != nil {
		t.Error(err)
	}
}

// TestMadeUnits has a unit that makes its lines late next to one that has them.
func TestMadeUnits(t *testing.T) {
	chains := []ChainText{{"A", []string{"-j B", "-s 192.0.2.1/32 -j B"}}, {"B", nil}}
	lines := []string{":C - [0:0]", "-I KUBE-SERVICES -j A", "-X C"}
	bare := []ChainText{{Name: "A"}, {Name: "B"}}
	early := Unit{Table: "nat", Chains: chains, Lines: lines}
	late := Unit{Table: "nat", Make: func(rules bool) ([]ChainText, []string) {
		if !rules {
			return bare, lines
		}
		return chains, lines
	}}
	if a, b := (Plan{{Units: []Unit{early}}}).Text(), (Plan{{Units: []Unit{late}}}).Text(); a != b {
		t.Errorf("made late:\n%s\nmade early:\n%s", b, a)
	}
	tx := &text{blocks: [][]Unit{{early, late}, {late}}}
	all, err := io.ReadAll(tx)
	if err != nil {
		t.Fatal(err)
	}
	half := early.bytes()
	want := []blockCount{{1, 6, 2 * half}, {17, 3, half}}
	if !slices.Equal(tx.counts, want) {
		t.Errorf("counts %v, want %v of\n%s", tx.counts, want, all)
	}
	if got := late.line(4, passChains, passRules); got != "-A A -s 192.0.2.1/32 -j B" {
		t.Errorf("line 4 is %q", got)
	}
}
