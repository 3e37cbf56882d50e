package guesttest

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
	"github.com/vishvananda/netlink"
)

func TestMain(m *testing.M) {
	umlguest.Init()
	netns.Main(m)
}

// The subtests run where IPVS is, in a sandbox, and are reported here.
func TestGroup(t *testing.T) {
	Group(t, func(t *testing.T) {
		t.Run("ipvs", func(t *testing.T) {
			if !umlguest.Native() || !netns.Inside() {
				t.Errorf("IPVS %t, in a sandbox %t; want both", umlguest.Native(), netns.Inside())
			}
		})
		t.Run("dummy", func(t *testing.T) {
			if err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "kube-ipvs0"}}); err != nil {
				t.Error(err)
			}
			t.Run("deeper", func(t *testing.T) { t.Log("here") })
		})
	})
}

func TestTranscript(t *testing.T) {
	log := &transcript{root: "TestX", results: map[string]*result{}}
	count := &counter{to: log}
	for _, part := range []string{
		"noise\n\x16=== RUN   TestX\n\x16=== RUN   TestX/a", "\n    x_test.go:1: bad\nno newline\x16=== RUN   TestX/a/b\n",
		"\x16        --- PASS: TestX/a/b (0.00s)\n\x16    --- FAIL: TestX/a (0.01s)\n",
		"\x16=== RUN   TestX/c\n    x_test.go:2: why\n\x16    --- SKIP: TestX/c (0.00s)\n\x16=== RUN   TestX/d\npanic: oh\n",
	} {
		if _, err := count.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]string{"TestX": "", "TestX/a": "FAIL", "TestX/a/b": "PASS", "TestX/c": "SKIP", "TestX/d": ""}
	for name, outcome := range want {
		if r := log.results[name]; r == nil || r.outcome != outcome {
			t.Errorf("%s: %+v, want %q", name, r, outcome)
		}
	}
	if got := log.results["TestX/a"].output.String(); got != "    x_test.go:1: bad\nno newline\n" {
		t.Errorf("output of TestX/a: %q", got)
	}
	if got := log.results["TestX"].children; !slices.Equal(got, []string{"TestX/a", "TestX/c", "TestX/d"}) {
		t.Errorf("children: %v", got)
	}
	if log.loose.String() != "noise\n" || log.tally() != "1 tests passed, 1 failed, 1 skipped, 1 did not end" {
		t.Errorf("loose %q, tally %q", log.loose.String(), log.tally())
	}
	if got := count.String(); got != "1 tests passed, 1 failed, 1 skipped" {
		t.Errorf("counted %q", got)
	}
}

func TestArgs(t *testing.T) {
	args, verbose := testArgs([]string{"-test.testlogfile=/x/y", "-test.paniconexit0", "-test.timeout=1m", "-test.v=true"})
	if !slices.Equal(args, []string{"-test.paniconexit0", "-test.timeout=1m", "-test.v=true"}) || !verbose {
		t.Errorf("%q, %t", args, verbose)
	}
	if got := shares([]string{"-test.gocoverdir=/a", "-test.coverprofile=/b/c", "-test.run=x"}); !slices.Equal(got, []string{"/a", "/b"}) {
		t.Errorf("shares: %q", got)
	}
	if name := packageName(); !strings.HasSuffix(name, "guesttest") {
		wd, err := os.Getwd()
		t.Errorf("package %q in %s, %v", name, wd, err)
	}
}
