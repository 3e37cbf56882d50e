package xtables

import (
	"os"
	"strings"
	"testing"
)

// canonCase is one pair of testdata/canon-*.txt.
type canonCase struct{ table, in, out string }

func canonCases(t *testing.T, f Family) []canonCase {
	t.Helper()
	file := "testdata/canon-v4.txt"
	if f == IPv6 {
		file = "testdata/canon-v6.txt"
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var cases []canonCase
	table := ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case strings.HasPrefix(line, "< "):
			cases = append(cases, canonCase{table: table, in: line[2:]})
		case strings.HasPrefix(line, "> "):
			cases[len(cases)-1].out = line[2:]
		}
	}
	return cases
}

func TestCanonical(t *testing.T) {
	for _, f := range []Family{IPv4, IPv6} {
		for _, c := range canonCases(t, f) {
			in, err := ParseRule(f, c.in)
			if err != nil {
				t.Errorf("%v: %v", f, err)
				continue
			}
			if got := in.String(); got != c.out {
				t.Errorf("%v %s\n got %s\nwant %s", f, c.in, got, c.out)
			}
			out, err := ParseRule(f, c.out)
			if err != nil {
				t.Errorf("%v: %v", f, err)
				continue
			}
			if !in.Equal(out) || !out.Equal(in) {
				t.Errorf("%v %s: not equal to %s", f, c.in, c.out)
			}
			if got := out.String(); got != c.out {
				t.Errorf("%v %s: changes when read back: %s", f, c.out, got)
			}
		}
	}
}
