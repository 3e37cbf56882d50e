package lab

import (
	"slices"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// variant is what an incident is in a mode other than iptables.
type variant struct {
	// never says why it cannot be there, and nothing else counts.
	never string
	// reason and also replace those of the incident where they are not empty.
	reason, also trace.Reason
	// late replaces how late it is known, where it is not zero.
	late time.Duration
	// own has its rules on the node's own way out instead of on that through it.
	own bool
}

// In returns an incident as it is in a mode, and where it cannot happen there why.
func (in Incident) In(mode proxy.Mode) (out Incident, never string) {
	var v variant
	known := true
	switch mode {
	case proxy.Userspace:
		v, known = userspaceIncidents()[in.Name]
	case proxy.IPVS:
		v, known = ipvsIncidents()[in.Name]
	}
	switch {
	case in.Userspace && mode != proxy.Userspace:
		return in, "only the userspace proxy ends connections with itself; it needs --mode userspace"
	case !known:
		return in, "it is made for the iptables mode"
	case v.never != "":
		return in, v.never
	}
	if v.reason != "" {
		in.Reason, in.Also = v.reason, ""
	}
	if v.also != "" {
		in.Also = v.also
	}
	if v.late != 0 {
		in.Late = v.late
	}
	if in.RulesOf && (mode == proxy.Userspace || mode == proxy.IPVS) {
		in.Check = "" // that looks at rules of the iptables mode
	}
	if v.own {
		in.do.node = ownWay(in.do.node)
	}
	if mode == proxy.Userspace {
		for _, f := range in.do.faults {
			in.at = append(in.at, f[1])
		}
	}
	return in, ""
}

// ownWay puts rules of FORWARD for packets to a pod into OUTPUT, and those for
// packets of a pod into INPUT.
func ownWay(commands [][]string) (out [][]string) {
	for _, args := range commands {
		args = slices.Clone(args)
		for i, a := range args {
			switch {
			case a != "FORWARD":
			case slices.Contains(args, "-s"):
				args[i] = "INPUT"
			default:
				args[i] = "OUTPUT"
			}
		}
		out = append(out, args)
	}
	return out
}

// userspaceIncidents: the node itself dials pods, so what stops packets on their way
// through the node stops none, and what loses an entry leads to the same port again.
func userspaceIncidents() map[string]variant {
	const (
		through = "no packet goes through the node: the proxy takes it there, and dials itself"
		again   = "a packet whose entry is gone is led to the proxy's port again"
		bounded = "the proxy's sockets heed the MTU by themselves"
		unseen  = "a first packet dropped before the proxy's port is not reported in this mode"
	)
	return map[string]variant{
		"closed-port": {}, "silent-pod": {}, "crash": {}, "selector": {}, "probes": {}, "port-name": {}, "local": {}, "ranges": {},
		"silent-dns": {}, "impatient": {}, "route": {}, "shadow": {}, "bypass": {}, "ports": {}, "rollout": {},
		"policy": {own: true}, "firewall": {own: true},
		"one-way":    {own: true, reason: trace.SynUnanswered},
		"stuck":      {reason: trace.EndpointRefused},                        // a client whose pod failed is kept there no more
		"vanished":   {reason: trace.SynUnanswered, also: trace.Unreachable}, // a dial ends before the node gives up
		"eviction":   {reason: trace.SynUnanswered, also: trace.EndpointGone},
		"restart":    {also: trace.Untranslated}, // of connections that begin while there are no rules
		"docker":     {never: through},
		"forwarding": {never: through},
		"guard":      {never: through},
		"two-ways":   {never: through},
		"hairpin":    {never: "the proxy dials the pod from the node's address"},
		"one-sided":  {never: "the node's own packets have no mark, so that they go elsewhere altogether"},
		"idle":       {never: again},
		"forgotten":  {never: again},
		"large":      {never: bounded},
		"narrow":     {never: "the proxy does not see that its socket sends again"},
		"detour":     {never: unseen},
		"full":       {never: unseen},
		"crowd":      {never: "it remembers 32,768 clients of each Service port"},
		"stopped":    {never: "the rules go with the proxy"},
		"kept":       {never: "sessions end with their endpoint"},
	}
}

// ipvsIncidents: IPVS takes packets in INPUT and sends them by OUTPUT; answers are
// forwarded.
func ipvsIncidents() map[string]variant {
	const guest = "the guest's kernel has no nf_tables"
	return map[string]variant{
		"closed-port": {}, "silent-pod": {}, "crash": {}, "selector": {}, "probes": {}, "port-name": {}, "local": {}, "ranges": {},
		"silent-dns": {}, "impatient": {}, "route": {}, "ports": {}, "stuck": {}, "rollout": {}, "vanished": {}, "eviction": {},
		"idle": {}, "two-ways": {}, "detour": {}, "large": {}, "shadow": {}, "hairpin": {}, "forwarding": {},
		"policy": {own: true}, "firewall": {own: true},
		"one-way":   {late: 15 * time.Second}, // the guest's TCP tries less often: its entry has to expire
		"docker":    {never: "first packets leave by OUTPUT, and KUBE-FORWARD accepts the answers"},
		"bypass":    {never: "IPVS takes what has a virtual server's address, whatever nat says"},
		"forgotten": {never: "IPVS knows its connections without conntrack's entries"},
		"one-sided": {never: "IPVS heeds no mark when it looks for a route"},
		"crowd":     {never: "IPVS remembers any number of clients"},
		"guard":     {never: guest},
		"narrow":    {never: guest},
	}
}
