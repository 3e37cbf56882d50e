package features

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/netns"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { netns.Main(m) }

// The list is printed whatever happens: it is what a CI run could do.
func TestProbe(t *testing.T) {
	begin := time.Now()
	all := Probe(t.Context())
	took := time.Since(begin)
	var seen []string
	for _, f := range all {
		t.Log(f)
		seen = append(seen, f.Name)
		if f.Detail == "" || (f.Present && f.Fix != "") {
			t.Errorf("%s is present, yet has a fix or no detail: %+v", f.Name, f)
		}
		if strings.Contains(f.String(), "\n") {
			t.Errorf("%s prints on several lines", f.Name)
		}
	}
	want := []string{UserNamespace, NetNamespace, PIDNamespace, MountNamespace, Veth, Bridge, IPTablesNFT, IPTablesLegacy,
		IPSet, ConntrackEvents, ConntrackAccounting, ConntrackTimestamps, ConntrackEventTime, NFLOG, NFLOGTimestamp,
		NFLOGConntrack, NFTTrace, NFTTraceConntrack, LegacyTrace, IPVS, BTF}
	if !slices.Equal(seen, want) {
		t.Errorf("features %v\nwant     %v", seen, want)
	}
	if missing := Missing(all); len(missing) > 0 {
		t.Errorf("missing: %v", missing)
	}
	if took > 3*time.Second {
		t.Errorf("took %v", took)
	}
	t.Logf("took %v", took.Round(time.Millisecond))
}

// recorder is a TB that keeps what Require says.
type recorder struct {
	ctx  context.Context
	said string
}

func (r *recorder) Helper()                        {}
func (r *recorder) Context() context.Context       { return r.ctx }
func (r *recorder) Fatalf(format string, a ...any) { r.said += fmt.Sprintf(format, a...) }

func TestRequire(t *testing.T) {
	Require(t, NetNamespace, IPTablesNFT, IPTablesLegacy, ConntrackEvents, NFLOG)
	r := &recorder{ctx: t.Context()}
	Require(r, "no-such-feature")
	if !strings.Contains(r.said, `no feature "no-such-feature"`) {
		t.Errorf("unknown feature: %q", r.said)
	}
}

// Where namespaces run out, every probe says so, and Require fails.
func TestWithoutNamespaces(t *testing.T) {
	if os.Getenv("KPTRACE_TEST_FORBIDDEN") == "" {
		out := &strings.Builder{}
		code, err := netns.Reexec(t.Context(), netns.Sandbox{UserNS: true, Env: []string{"KPTRACE_TEST_FORBIDDEN=1"},
			Args: []string{"-test.run=^TestWithoutNamespaces$", "-test.v"}, Stdout: out, Stderr: out})
		if code != 0 || err != nil || !strings.Contains(out.String(), "--- PASS: TestWithoutNamespaces") {
			t.Errorf("exit code %d, %v\n%s", code, err, out)
		}
		return
	}
	if err := os.WriteFile("/proc/sys/user/max_net_namespaces", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	all := Probe(t.Context())
	for _, f := range all {
		if f.Present || !strings.Contains(f.Fix, "sysctl -w user.max_net_namespaces=") {
			t.Errorf("without network namespaces: %v", f)
		}
	}
	if len(all) != len(names()) || len(Missing(all)) == 0 {
		t.Errorf("%d features, missing %v", len(all), Missing(all))
	}
	r := &recorder{ctx: t.Context()}
	Require(r, NFLOG)
	if !strings.Contains(r.said, "this test needs: nflog") || !strings.Contains(r.said, "max_net_namespaces is 0") {
		t.Errorf("Require said %q", r.said)
	}
}

func TestUnavailable(t *testing.T) {
	err := &netns.HostError{Doing: "making namespaces", Cause: "forbidden here", Fix: "sysctl -w x=1", Err: unix.EPERM}
	all := Unavailable(err)
	for _, f := range all {
		if f.Present || f.Fix != err.Fix || !strings.Contains(f.Detail, err.Cause) {
			t.Errorf("%+v does not tell cause and fix", f)
		}
	}
	if len(all) != len(names()) {
		t.Errorf("%d features, want %d", len(all), len(names()))
	}
}

func TestMissingExtensionsAreNamed(t *testing.T) {
	bogus := extension{"nosuchmatch", "-m nosuchmatch --x 1", "PREROUTING"}
	all := append([]extension{bogus}, natExtensions()...)
	for _, flavour := range []string{"iptables-nft", "iptables-legacy"} {
		ns, err := netns.New()
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		if missing := missingExtensions(t.Context(), ns, flavour, all); !slices.Equal(missing, []string{"nosuchmatch"}) {
			t.Errorf("%s: missing %v, want only nosuchmatch", flavour, missing)
		}
	}
}

// A probe sees nothing where nothing is sent, and says so in time.
func TestSilence(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	c, err := dial(ctx, ns, groupNFTrace)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	begin := time.Now()
	if _, err := nextPacket(c); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) > time.Second {
		t.Errorf("silence: %v after %v", err, time.Since(begin))
	}
	// And a group that somebody holds is refused.
	held, err := dial(t.Context(), ns)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := bindGroup(held, 9); err != nil {
		t.Fatal(err)
	}
	second, err := dial(t.Context(), ns)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := bindGroup(second, 9); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EBUSY) {
		t.Errorf("a held group: %v, want EPERM", err)
	}
}
