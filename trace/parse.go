package trace

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// kindWords lists what may stand before the slash, in kubectl's spellings.
func kindWords() map[string]SelectorKind {
	return map[string]SelectorKind{
		"svc": SelectService, "service": SelectService, "services": SelectService,
		"pod": SelectPod, "po": SelectPod, "pods": SelectPod,
		"node": SelectNode, "no": SelectNode, "nodes": SelectNode,
		"ns": SelectNamespace, "namespace": SelectNamespace, "namespaces": SelectNamespace,
	}
}

// workloads pairs the spellings of a workload's kind with the API's word for it.
func workloads() [][]string {
	return [][]string{
		{"Deployment", "deploy", "deployment", "deployments"},
		{"StatefulSet", "sts", "statefulset", "statefulsets"},
		{"DaemonSet", "ds", "daemonset", "daemonsets"},
		{"ReplicaSet", "rs", "replicaset", "replicasets"},
		{"Job", "job", "jobs"},
		{"CronJob", "cj", "cronjob", "cronjobs"},
	}
}

func workloadPrefix(owner string) string {
	for _, w := range workloads() {
		if w[0] == owner {
			return w[1]
		}
	}
	return strings.ToLower(owner)
}

// ParseResource reads "svc/foo", "svc/foo:http", "pod/x", "node/n", "ns/x" or
// "deploy/x", with kubectl's other spellings of the kinds. A "*" in the name
// stands for any text. The namespace given becomes that of namespaced kinds;
// empty means any.
func ParseResource(s, namespace string) (Selector, error) {
	word, name, ok := strings.Cut(s, "/")
	if !ok {
		if _, known := lookupKind(s); known {
			return Selector{}, fmt.Errorf("%q names no object: write %s/NAME, or %s/* for all", s, s, s)
		}
		if s == "" {
			return Selector{}, fmt.Errorf("empty resource: write svc/NAME, pod/NAME, node/NAME, ns/NAME or deploy/NAME")
		}
		return Selector{}, fmt.Errorf("%q does not say what it is: write svc/%s, pod/%s or node/%s", s, s, s, s)
	}
	sel, known := lookupKind(word)
	if !known {
		return Selector{}, unknownKind(word, s)
	}
	if ns, rest, ok := strings.Cut(name, "/"); ok {
		return Selector{}, fmt.Errorf("%q: a namespace goes into -n: write -n %s %s/%s", s, ns, word, rest)
	}
	if sel.Kind == SelectService {
		if n, port, ok := strings.Cut(name, ":"); ok {
			p, err := ParsePort(port)
			if err != nil {
				return Selector{}, fmt.Errorf("%q: %w", s, err)
			}
			name, sel.Port = n, p
		}
	}
	if err := checkName(name); err != nil {
		return Selector{}, fmt.Errorf("%q: %w", s, err)
	}
	sel.Name = name
	if sel.Kind != SelectNode && sel.Kind != SelectNamespace {
		sel.Namespace = namespace
	}
	return sel, nil
}

// ParseSelector reads what --from and --to take: all that ParseResource does,
// and an address, an address with a port, or a range ("10.0.0.0/8").
func ParseSelector(s, namespace string) (Selector, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return Selector{Kind: SelectAddress, Prefix: p.Masked()}, nil
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return Selector{Kind: SelectAddress, Prefix: netip.PrefixFrom(a, a.BitLen())}, nil
	}
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Port() != 0 && ap.Addr().Zone() == "" {
		a := ap.Addr().Unmap()
		return Selector{Kind: SelectAddress, Prefix: netip.PrefixFrom(a, a.BitLen()), Port: Port{Number: ap.Port()}}, nil
	}
	if first, _, _ := strings.Cut(s, "/"); first != "" && strings.Trim(first, "0123456789.") == "" {
		return Selector{}, fmt.Errorf("%q is neither an address nor a range such as 10.0.0.0/8", s)
	}
	return ParseResource(s, namespace)
}

func lookupKind(word string) (Selector, bool) {
	word = strings.ToLower(word)
	if k, ok := kindWords()[word]; ok {
		return Selector{Kind: k}, true
	}
	for _, w := range workloads() {
		if slices.Contains(w[1:], word) {
			return Selector{Kind: SelectWorkload, Owner: w[0]}, true
		}
	}
	return Selector{}, false
}

func unknownKind(word, whole string) error {
	known := []string{"svc", "service", "pod", "node", "namespace"}
	for _, w := range workloads() {
		known = append(known, w[1:]...)
	}
	if near := Similar(word, known); len(near) > 0 {
		return fmt.Errorf("%q: unknown kind %q: did you mean %s?", whole, word, near[0])
	}
	return fmt.Errorf("%q: unknown kind %q: use svc, pod, node, ns, deploy, sts, ds, rs, job or cj", whole, word)
}

// checkName allows what the API allows in names, and "*".
func checkName(name string) error {
	if name == "" {
		return fmt.Errorf("the name is missing after the slash")
	}
	for _, r := range name {
		if !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.' || r == '*') {
			return fmt.Errorf("%q cannot be in a name: names are lower-case letters, digits, dashes and dots", r)
		}
	}
	return nil
}

// matchName matches a name against a pattern in which "*" stands for any text.
func matchName(pattern, name string) bool {
	head, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == name
	}
	name, ok := strings.CutPrefix(name, head)
	if !ok {
		return false
	}
	for {
		part, after, more := strings.Cut(rest, "*")
		if !more {
			return strings.HasSuffix(name, part)
		}
		i := strings.Index(name, part)
		if i < 0 {
			return false
		}
		name, rest = name[i+len(part):], after
	}
}

// matchWorkload matches a selector against an owner as "Deployment/foo".
func matchWorkload(s *Selector, workload string) bool {
	owner, name, ok := strings.Cut(workload, "/")
	return ok && owner == s.Owner && matchName(s.Name, name)
}

// ParsePort reads a port number or the name of a Service port.
func ParsePort(s string) (Port, error) {
	if n, err := strconv.ParseUint(s, 10, 16); err == nil && n != 0 {
		return Port{Number: uint16(n)}, nil
	}
	const digits = "0123456789-"
	const letters = "abcdefghijklmnopqrstuvwxyz"
	if len(s) > 15 || !strings.ContainsAny(s, letters) || strings.Trim(s, letters+digits) != "" {
		return Port{}, fmt.Errorf("%q is no port: use a number from 1 to 65535 or a port's name", s)
	}
	return Port{Name: s}, nil
}

// String returns the number or the name.
func (p Port) String() string {
	if p.Number != 0 {
		return strconv.Itoa(int(p.Number))
	}
	return p.Name
}

// Outcomes lists the outcomes in the order in which documentation has them.
func Outcomes() []Outcome {
	return []Outcome{
		Open, Closed, Refused, Reset, Unanswered, Timeout, Rejected, Dropped, Unknown, Pending,
	}
}

// ParseOutcomes reads one outcome, or "failed" for all that are failures.
func ParseOutcomes(s string) ([]Outcome, error) {
	if s == "failed" {
		return slices.DeleteFunc(Outcomes(), func(o Outcome) bool { return !o.Failed() }), nil
	}
	if slices.Contains(Outcomes(), Outcome(s)) {
		return []Outcome{Outcome(s)}, nil
	}
	known := []string{"failed"}
	for _, o := range Outcomes() {
		known = append(known, string(o))
	}
	if near := Similar(s, known); len(near) > 0 {
		return nil, fmt.Errorf("unknown outcome %q: did you mean %s?", s, near[0])
	}
	return nil, fmt.Errorf("unknown outcome %q: use %s", s, strings.Join(known, ", "))
}
