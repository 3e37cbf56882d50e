package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

const readme = "../../README.md"

// kinds are the lines that the README shows, by what tells them.
func kinds() []*regexp.Regexp {
	var list []*regexp.Regexp
	for _, s := range []string{
		`foo:http .*random 33 %, 1 of 3 \(1 not ready\) .*closed`,
		`foo:http .*random 33 %, 1 of 3 \(1 not ready\) .*closed`,
		`web:.*sticky:http .*affinity new, random 33 %`,
		`batch:.*sticky:http .*affinity new, random 33 %`,
		`web:.*sticky:http .*affinity hit, .* left`,
		`batch:.*sticky:http .*affinity hit, .* left`,
		`front:http NodePort .*masqueraded \(external\)`,
		`flaky:http .*closed`,
		`flaky:http .*refused by endpoint`,
		`empty:http .*rejected: no endpoints`,
		`dns:dns .*answered`,
	} {
		list = append(list, regexp.MustCompile(s))
	}
	return list
}

// shape is a line without what differs from run to run.
func shape(line string) string {
	for _, r := range []struct{ what, with string }{
		{`\d\d:\d\d:\d\d\.\d{3}`, "TIME"},
		{`(\d+h)?\d+m(\d+s)? left`, "AGE left"},
		{`\b[\d.]+(µs|ms|s)\b`, "DURATION"},
		{`\b[\d.]+k?B\b`, "BYTES"},
		{`\b[\d.]+ / [\d.]+ ms`, "P50 / P99"},
		{`\b(foo|dns)-\d\b`, "$1-N"},
		{`:\d{5}\b`, ":PORT"},
		{`\b\d+\.\d %`, "SHARE"},
		{`\b\d+ (closed|refused|rejected|open)\b`, "N $1"},
		{`^(shop/\S+) +\d+ `, "$1 N "},
		{`^( +\S+) +\d+ `, "$1 N "},
		{`^(shop/dns:dns .* P99) .*`, "$1 OUTCOMES"}, // open or closed: the kernel forgets them at leisure
		{`all \d+ connections`, "all N connections"},
		{` +`, " "},
	} {
		line = regexp.MustCompile(r.what).ReplaceAllString(line, r.with)
	}
	return strings.TrimSpace(line)
}

// TestReadmeDemo keeps the README's demo true: each of its lines is like one
// that a real run prints. With -update it is written anew.
func TestReadmeDemo(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	seen := map[string]bool{}
	block := ""
	for try := 0; block == ""; try++ { // chance may spare the dead endpoint once
		out := d.must("lab", "run", "--for", "8s")
		rows, summary, ok := strings.Cut(out, "\n\n")
		if !ok || !strings.Contains(summary, "Events lost: conntrack 0, nflog 0\nChecked with the clients: all ") {
			t.Fatalf("no closing summary:\n%s", out)
		}
		if strings.Contains(out, "\x1b") {
			t.Error("colours in a pipe")
		}
		for line := range strings.Lines(out) {
			seen[shape(line)] = true
		}
		if picked, err := pickLines(rows); err == nil {
			block = picked + "\n" + summary
		} else if try == 2 {
			t.Fatal(err)
		}
	}
	text := readFile(t, readme)
	before, rest, ok := strings.Cut(text, "<!-- demo:begin -->\n")
	old, after, ok2 := strings.Cut(rest, "<!-- demo:end -->")
	if !ok || !ok2 {
		t.Fatal("the README has no place for the demo")
	}
	if *update {
		text = before + "<!-- demo:begin -->\n```\n" + block + "```\n<!-- demo:end -->" + after
		if err := os.WriteFile(readme, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	old = strings.TrimSuffix(strings.TrimPrefix(old, "```\n"), "```\n")
	if n := strings.Count(old, "\n"); n < 25 {
		t.Errorf("the README's demo has %d lines: make it by go test ./cmd/kptrace -run TestReadmeDemo -update", n)
	}
	for line := range strings.Lines(old) {
		if !seen[shape(line)] {
			t.Errorf("the README says\n%sand no line of a real run is like it (-update makes it anew)", line)
		}
	}
}

// pickLines takes one line of each kind, in their order of time, and aligns
// them as kptrace would have, had it known their widths.
func pickLines(rows string) (string, error) {
	lines := strings.Split(strings.TrimSpace(rows), "\n")
	var picked []string
	for _, kind := range kinds() {
		i := slices.IndexFunc(lines[1:], func(l string) bool { return kind.MatchString(l) && !slices.Contains(picked, l) })
		if i < 0 {
			return "", fmt.Errorf("no line like %v in:\n%s", kind, rows)
		}
		picked = append(picked, lines[1+i])
	}
	slices.Sort(picked) // the time comes first
	gap := regexp.MustCompile(`  +`)
	var table [][]string
	var widths []int
	for _, l := range append(lines[:1:1], picked...) {
		cells := gap.Split(l, 6)
		table = append(table, cells)
		for i, c := range cells {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	var b strings.Builder
	for _, cells := range table {
		for i, c := range cells {
			if i > 0 {
				b.WriteString("  ")
			}
			b.WriteString(c)
			if i < len(cells)-1 {
				fmt.Fprintf(&b, "%*s", widths[i]-utf8.RuneCountInString(c), "")
			}
		}
		b.WriteString("\n")
	}
	return b.String(), nil
}
