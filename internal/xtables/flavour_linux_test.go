package xtables

import (
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const kubeChains = `*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SVC-STALE - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A KUBE-SERVICES -d 172.30.0.1 -p tcp -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A -j KUBE-MARK-MASQ
COMMIT
`

func TestKernelDetect(t *testing.T) {
	for _, tc := range []struct {
		name     string
		fl       Flavour
		fa       Family
		text     string
		want     Flavour
		reason   string
		wantLive []string
	}{
		{"empty", NFT, IPv4, "", NFT, "iptables is iptables v1", nil},
		{"more legacy rules", Legacy, IPv4, kubeChains, Legacy, "legacy has 3 rules, nft has 0", []string{"nat/KUBE-SERVICES", "nat/KUBE-SVC-A"}},
		{"more nft rules", NFT, IPv4, kubeChains, NFT, "nft has 3 rules, legacy has 0", []string{"nat/KUBE-SERVICES", "nat/KUBE-SVC-A"}},
		{"hint in legacy", Legacy, IPv4, "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n", Legacy, "KUBE-IPTABLES-HINT is in legacy (ipv4)", nil},
		{"hint in nft, IPv6", NFT, IPv6, "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n", NFT, "KUBE-KUBELET-CANARY is in nft (ipv6)", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tools := newTools(t)
			if tc.text != "" {
				run(t, tools, tc.text, Program(tc.fl, tc.fa, "restore"), "--noflush")
			}
			fl, reason, err := tools.Detect(t.Context())
			if err != nil || fl != tc.want || !strings.Contains(reason, tc.reason) {
				t.Errorf("got %v, %q, %v", fl, reason, err)
			}
			s, err := tools.Survey(t.Context(), tc.fl, tc.fa)
			if err != nil || s.Unavailable != "" || !slices.Equal(s.Live, tc.wantLive) {
				t.Errorf("survey %+v %v", s, err)
			}
			other, err := tools.Survey(t.Context(), tc.fl.Other(), tc.fa)
			if err != nil || other.Unavailable != "" || other.Rules != 0 || other.Live != nil {
				t.Errorf("survey of the other flavour %+v %v", other, err)
			}
		})
	}
}

// TestKernelSurveyMakesNothing looks at a namespace that has no tables: legacy
// must not get any by being looked at, for each costs every packet.
func TestKernelSurveyMakesNothing(t *testing.T) {
	tools := newTools(t)
	if _, _, err := tools.Detect(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, fl := range []Flavour{NFT, Legacy} {
		text, err := tools.SaveText(t.Context(), fl, IPv4, "", false)
		if err != nil || strings.Contains(text, "*") {
			t.Errorf("%v: %q %v", fl, text, err)
		}
	}
}

func TestDetectNothingInstalled(t *testing.T) {
	tools := Tools{Dir: t.TempDir()}
	if _, _, err := tools.Detect(t.Context()); err == nil || !strings.Contains(err.Error(), "not installed") {
		t.Error(err)
	}
	s, err := tools.Survey(t.Context(), Legacy, IPv4)
	if err != nil || s.Unavailable == "" {
		t.Errorf("%+v %v", s, err)
	}
}

// TestKernelLock has another program hold the lock of legacy: that is no fault
// of any unit, and the rest of the plan is left alone.
func TestKernelLock(t *testing.T) {
	tools := newTools(t)
	tools.Wait = time.Second
	_, path, _ := strings.Cut(tools.Env[0], "=")
	lock, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	r := NewRunner(RunnerConfig{Tools: tools, Flavour: Legacy})
	rep, err := r.Apply(t.Context(), svcPlan(3, 2))
	if err == nil || !strings.Contains(err.Error(), "lock") || len(rep.Failed) > 0 || rep.Runs != 1 || rep.LockWait < time.Second {
		t.Errorf("%+v %v", rep, err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if rep, err = r.Apply(t.Context(), svcPlan(3, 2)); err != nil || rep.Units != 4 {
		t.Errorf("%+v %v", rep, err)
	}
}
