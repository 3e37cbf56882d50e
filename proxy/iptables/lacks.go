package iptables

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
)

// needs are the matches that this mode cannot do without, and the userspace mode
// can, for it picks endpoints itself.
var needs = [...]struct{ match, what string }{
	{"statistic --mode random --probability 0.5", "by which endpoints are picked"},
	{"recent --rcheck --seconds 10 --reap --name KPTRACE-PROBE --rsource", "which keeps session affinity"},
}

// Lacks says what the kernel lacks of what this mode needs and the userspace mode
// does not, "" if nothing: a match of iptables or, where node ports are served on
// 127.0.0.0/8, the sysctl route_localnet, by which kube-proxy chose between the
// two. It finds out by doing it, in a network namespace of its own, and by the
// flavour that is configured or the first one that works there. Where no rule at
// all can be written it says nothing: the userspace mode writes rules too.
func (d *Dual) Lacks(ctx context.Context) (string, error) {
	b := d.v4
	if b.cfg.LocalhostNodePorts {
		err := b.inNetns(func() error {
			_, err := os.Stat(filepath.Join(b.sysctls, "net/ipv4/conf/all/route_localnet"))
			return err
		})
		if os.IsNotExist(err) {
			return "the kernel lacks the sysctl route_localnet, without which there are no node ports on 127.0.0.0/8 (--iptables-localhost-nodeports=false does without)", nil
		}
	}
	scratch, err := netns.New()
	if err != nil {
		return "", fmt.Errorf("proxy/iptables: looking at what the kernel has: %w", err)
	}
	defer scratch.Close()
	tools := b.cfg.Tools
	tools.Netns = scratch.Fd()
	flavours := []xtables.Flavour{xtables.NFT, xtables.Legacy}
	if fl, err := xtables.ParseFlavour(b.cfg.Flavour); err == nil {
		flavours = []xtables.Flavour{fl}
	}
	var rep xtables.Report
	for _, fl := range flavours {
		rep, err = xtables.NewRunner(xtables.RunnerConfig{Tools: tools, Flavour: fl, Family: b.cfg.Family}).Apply(ctx, probes())
		if err == nil && rep.Units > 0 {
			break
		}
	}
	if err != nil || rep.Units == 0 {
		return "", err
	}
	var missing []string
	for i := range rep.Failed {
		missing = append(missing, fmt.Sprintf("%s (%s)", rep.Failed[i].Owner, strings.Join(strings.Fields(rep.Failed[i].Stderr), " ")))
	}
	if missing == nil {
		return "", nil
	}
	return "the kernel lacks " + strings.Join(missing, ", and "), nil
}

// probes writes a rule that needs nothing, and one for each need.
func probes() xtables.Plan {
	phase := xtables.Phase{Name: "probe"}
	add := func(owner, rule string) {
		phase.Units = append(phase.Units, xtables.Unit{Table: "nat", Owner: owner,
			Chains: []xtables.ChainText{{Name: fmt.Sprintf("KPTRACE-PROBE%d", len(phase.Units)), Rules: []string{rule}}}})
	}
	add("nothing", "-j RETURN")
	for _, n := range needs {
		name, _, _ := strings.Cut(n.match, " ")
		add(fmt.Sprintf("the match %s, %s", name, n.what), "-m "+n.match+" -j RETURN")
	}
	return xtables.Plan{phase}
}
