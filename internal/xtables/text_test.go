package xtables

import (
	"io"
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
