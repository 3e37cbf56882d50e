package guesttest

import (
	"flag"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
)

// Here skips a test that boots guests where another run has it.
func Here(t *testing.T) {
	t.Helper()
	if elsewhere() {
		report("%s: %s: %s", packageName(), t.Name(), leftOut)
		t.Skip(leftOut)
	}
}

// Group runs f in a kernel that has IPVS: where this one has not, the test
// binary runs again for this test in a guest, one boot, and what f's subtests
// did there is reported under the same names here. The package's TestMain
// calls umlguest.Init and then netns.Main, so that f always runs in a sandbox.
func Group(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	GroupWith(t, 0, f)
}

// GroupWith is Group in a guest with so much memory, in MiB; 0 is the usual.
func GroupWith(t *testing.T, memory int, f func(t *testing.T)) {
	t.Helper()
	if umlguest.Inside() {
		f(t)
		return
	}
	if umlguest.Native() {
		if !netns.Inside() {
			t.Fatal("guesttest: TestMain must call netns.Main")
		}
		f(t)
		return
	}
	Here(t)
	args := []string{"-test.v=test2json", "-test.run=" + selection(t.Name()), "-test.count=1"}
	if f := flag.Lookup("test.timeout"); f != nil {
		args = append(args, "-test.timeout="+f.Value.String())
	}
	if testing.Short() {
		args = append(args, "-test.short=true")
	}
	log := &transcript{root: t.Name(), results: map[string]*result{}}
	run := guestRun{args: args, stdout: log, memory: memory}
	code, err := run.do(t.Context())
	t.Logf("%s, in a guest: %s", log.tally(), run.about())
	report("%s: %s: %s in a guest, %s", packageName(), t.Name(), log.tally(), run.about())
	if err != nil {
		t.Errorf("%v\n%s", err, log.loose.String())
	}
	log.mirror(t, t.Name())
	switch {
	case code != 0 && !t.Failed():
		t.Errorf("the tests in the guest ended with code %d:\n%s", code, log.loose.String())
	case len(log.results) == 0 && err == nil:
		t.Errorf("no test ran in the guest:\n%s", log.loose.String())
	}
}

// selection is the pattern that picks a test, and of its subtests those that
// -run asks for.
func selection(name string) string {
	parts := strings.Split(name, "/")
	for i, p := range parts {
		parts[i] = "^" + regexp.QuoteMeta(p) + "$"
	}
	if f := flag.Lookup("test.run"); f != nil && f.Value.String() != "" && !strings.Contains(f.Value.String(), "|") {
		if asked := strings.Split(f.Value.String(), "/"); len(asked) > len(parts) {
			parts = append(parts, asked[len(parts):]...)
		}
	}
	return strings.Join(parts, "/")
}

// result is what one test did in the guest.
type result struct {
	outcome  string // PASS, FAIL, SKIP, or empty: it did not end
	output   strings.Builder
	children []string // in order of their start
}

// transcript reads the output of -test.v=test2json, in which every line of the
// testing package begins with a control character.
type transcript struct {
	root    string
	rest    string
	current string
	results map[string]*result
	loose   strings.Builder // what belongs to no test
}

func (l *transcript) Write(b []byte) (int, error) {
	l.rest += string(b)
	for {
		line, rest, ok := strings.Cut(l.rest, "\n")
		if !ok {
			return len(b), nil
		}
		l.rest = rest
		l.line(line)
	}
}

func (l *transcript) line(line string) {
	text, marked := strings.CutPrefix(strings.TrimLeft(line, " "), "\x16")
	// Output without a newline may stand before the mark.
	if before, after, ok := strings.Cut(line, "\x16"); !marked && ok {
		l.say(before)
		text, marked = after, true
	}
	if marked {
		f := strings.Fields(text)
		switch {
		case len(f) == 3 && f[0] == "===":
			l.current = f[2]
			if f[1] == "RUN" {
				l.get(f[2])
			}
			return
		case len(f) >= 3 && f[0] == "---":
			l.get(f[2]).outcome = strings.TrimSuffix(f[1], ":")
			l.current = parent(f[2])
			return
		}
	}
	l.say(line)
}

func (l *transcript) say(line string) {
	to := &l.loose
	if r := l.results[l.current]; r != nil {
		to = &r.output
	}
	to.WriteString(line)
	to.WriteByte('\n')
}

func (l *transcript) get(name string) *result {
	r := l.results[name]
	if r == nil {
		r = &result{}
		l.results[name] = r
		if p := parent(name); l.results[p] != nil {
			l.results[p].children = append(l.results[p].children, name)
		}
	}
	return r
}

func parent(name string) string {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i]
	}
	return ""
}

// tally says how many tests there were below the group.
func (l *transcript) tally() string {
	n := map[string]int{}
	for name, r := range l.results {
		if name != l.root {
			n[r.outcome]++
		}
	}
	s := fmt.Sprintf("%d tests passed, %d failed, %d skipped", n["PASS"], n["FAIL"], n["SKIP"])
	if n[""] > 0 {
		s += fmt.Sprintf(", %d did not end", n[""])
	}
	return s
}

// mirror reports a test's result, and its children's under their names.
func (l *transcript) mirror(t *testing.T, name string) {
	r := l.results[name]
	if r == nil {
		return
	}
	if text := strings.TrimRight(r.output.String(), "\n"); text != "" {
		t.Log("in the guest:\n" + text)
	}
	for _, c := range r.children {
		t.Run(strings.TrimPrefix(c, name+"/"), func(t *testing.T) { l.mirror(t, c) })
	}
	switch r.outcome {
	case "FAIL":
		t.Fail()
	case "SKIP":
		t.SkipNow()
	case "":
		t.Error("it did not end in the guest")
	}
}
