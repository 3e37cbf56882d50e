package features

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// extension is a match or target, with a rule that needs it and the base
// chains it is reached from.
type extension struct{ name, rule, from string }

// natExtensions is what the nat table of an iptables proxy is made of.
func natExtensions() []extension {
	return []extension{
		{"comment", "-m comment --comment \"kptrace probe\"", "PREROUTING"},
		{"statistic", "-m statistic --mode random --probability 0.33333333349", "PREROUTING"},
		{"recent", "-m recent --name KP-PROBE --rcheck --seconds 10800 --reap --mask 255.255.255.255 --rsource", "PREROUTING"},
		{"mark", "-j MARK --or-mark 0x4000", "PREROUTING"},
		{"addrtype", "-m addrtype --dst-type LOCAL", "PREROUTING"},
		{"conntrack", "-m conntrack --ctstate DNAT", "PREROUTING"},
		{"connbytes", "-m connbytes --connbytes 1:4 --connbytes-dir original --connbytes-mode packets", "PREROUTING"},
		{"NFLOG", "-j NFLOG --nflog-group 7 --nflog-prefix kp --nflog-size 128 --nflog-threshold 1", "PREROUTING"},
		{"DNAT", "-p tcp -j DNAT --to-destination 127.0.0.1:1", "PREROUTING"},
		{"MASQUERADE", "-j MASQUERADE --random-fully", "POSTROUTING"},
	}
}

// iptables tries one flavour; first all extensions in one commit, and where
// that fails each alone, to name what is missing.
func iptables(flavour string) func(context.Context, *netns.NS) (found, error) {
	return func(ctx context.Context, ns *netns.NS) (found, error) {
		version, err := exec.Run(ctx, exec.Spec{Path: flavour, Args: []string{"--version"}, Grace: -1})
		if err != nil {
			return nil, err
		}
		text := strings.TrimSpace(string(version.Stdout))
		if err := restore(ctx, ns, flavour, natRules(natExtensions()...)); err != nil {
			if missing := missingExtensions(ctx, ns, flavour, natExtensions()); len(missing) > 0 {
				err = fmt.Errorf("features: %s without %s: %w", text, strings.Join(missing, ", "), err)
			}
			return nil, err
		}
		saved, err := exec.Run(ctx, exec.Spec{Path: flavour + "-save", Args: []string{"-t", "nat"}, Netns: ns.Fd(), Grace: -1})
		if err != nil {
			return nil, err
		}
		if want, got := len(natExtensions()), strings.Count(string(saved.Stdout), "\n-A KP-"); got != want {
			return nil, fmt.Errorf("features: %s took %d rules but shows %d", text, want, got)
		}
		var names []string
		for _, e := range natExtensions() {
			names = append(names, e.name)
		}
		return found{flavour: text + " with " + strings.Join(names, ", ")}, nil
	}
}

// missingExtensions tries each extension alone and returns those refused. It
// returns none when even a chain without rules is refused.
func missingExtensions(ctx context.Context, ns *netns.NS, flavour string, all []extension) []string {
	if restore(ctx, ns, flavour, natRules()) != nil {
		return nil
	}
	var missing []string
	for _, e := range all {
		if restore(ctx, ns, flavour, natRules(e)) != nil {
			missing = append(missing, e.name)
		}
	}
	return missing
}

func natRules(extensions ...extension) string {
	var b strings.Builder
	b.WriteString("*nat\n")
	for _, from := range []string{"PREROUTING", "POSTROUTING"} {
		fmt.Fprintf(&b, ":KP-%s - [0:0]\n-A %s -j KP-%s\n", from, from, from)
	}
	for _, e := range extensions {
		fmt.Fprintf(&b, "-A KP-%s %s\n", e.from, e.rule)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

func restore(ctx context.Context, ns *netns.NS, flavour, rules string) error {
	_, err := exec.Run(ctx, exec.Spec{Path: flavour + "-restore", Args: []string{"-w", "2"},
		Netns: ns.Fd(), Stdin: strings.NewReader(rules), Grace: -1})
	return err
}

// restoreAny loads rules with the first flavour that takes them, for probes
// that need a rule and not a flavour.
func restoreAny(ctx context.Context, ns *netns.NS, rules string) error {
	nft := restore(ctx, ns, "iptables-nft", rules)
	if nft == nil {
		return nil
	}
	if legacy := restore(ctx, ns, "iptables-legacy", rules); legacy != nil {
		return errors.Join(nft, legacy)
	}
	return nil
}

func ipset(ctx context.Context, ns *netns.NS) (found, error) {
	script := "create kp-probe hash:ip,port timeout 60\nadd kp-probe 10.0.0.1,tcp:80 timeout 30\n"
	for _, cmd := range []exec.Spec{
		{Args: []string{"restore"}, Stdin: strings.NewReader(script)},
		{Args: []string{"test", "kp-probe", "10.0.0.1,tcp:80"}},
	} {
		cmd.Path, cmd.Netns, cmd.Grace = "ipset", ns.Fd(), -1
		if _, err := exec.Run(ctx, cmd); err != nil {
			return nil, err
		}
	}
	rule := "*raw\n-A PREROUTING -m set --match-set kp-probe dst,dst -j ACCEPT\nCOMMIT\n"
	if err := restoreAny(ctx, ns, rule); err != nil {
		return nil, err
	}
	return found{IPSet: "hash:ip,port with timeout, matched by a rule"}, nil
}
