package beside

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// kubeRules are as few rules as show that a kube-proxy is there.
const kubeRules = "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n"

// TestFollow changes a policy and no rule, and makes the table of a kube-proxy in
// nftables mode. While nobody changes anything nothing is read.
func TestFollow(t *testing.T) {
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			ns, err := netns.New()
			if err != nil {
				t.Fatal(err)
			}
			defer ns.Close()
			lock := filepath.Join(t.TempDir(), "lock")
			if err := os.WriteFile(lock, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			env := []string{"XTABLES_LOCKFILE=" + lock}
			run := func(program, stdin string, args ...string) {
				t.Helper()
				if _, err := exec.Run(t.Context(), exec.Spec{Path: program, Args: args, Env: env, Netns: ns.Fd(), Stdin: strings.NewReader(stdin)}); err != nil {
					t.Fatal(err)
				}
			}
			run("iptables-"+flavour+"-restore", kubeRules)
			b := New(Config{Tools: xtables.Tools{Netns: ns.Fd(), Env: env}, Flavour: flavour, LookEvery: 20 * time.Millisecond,
				LocalAddrs: func() []netip.Addr { return nil }})
			if _, found, err := b.Preflight(t.Context()); err != nil || b.Mode() != proxy.IPTables {
				t.Fatalf("found %q: %v", found, err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			var reads atomic.Int32
			done := make(chan error, 1)
			go func() { done <- b.Follow(ctx, func() { reads.Add(1) }) }()
			defer func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}()
			wait := func(what string, ok func() bool) {
				t.Helper()
				for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("not seen: " + what)
					}
				}
			}
			wait("what was there before", func() bool { return reads.Load() > 0 })
			time.Sleep(2 * time.Second)
			if n := reads.Load(); n != 1 {
				t.Errorf("the rules were read %d times, and nobody changed them", n)
			}
			policy := func() string {
				for _, rs := range b.seen.Load().rulesets {
					if c := rs.Chain("filter", "FORWARD"); rs.Family == xtables.IPv4 && c != nil {
						return c.Policy
					}
				}
				return ""
			}
			if p := policy(); p != "ACCEPT" {
				t.Fatalf("the policy is %q", p)
			}
			run("iptables-"+flavour, "", "-w", "-P", "FORWARD", "DROP")
			wait("a policy", func() bool { return policy() == "DROP" })
			before := reads.Load()
			run("nft", "add table ip kube-proxy\nadd chain ip kube-proxy services\nadd rule ip kube-proxy services counter\n", "-f", "-")
			wait("a table of nf_tables", func() bool { return reads.Load() > before })
		})
	}
}
