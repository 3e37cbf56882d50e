package redact

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// patterns are what text is searched for. They are compiled once, for a Redactor.
var (
	// reHash is the end of a chain's name or of a tag, made of a Service's name.
	reHash = regexp.MustCompile(`(KUBE-[A-Z-]+-|kp1:[a-z]+:)([A-Z2-7]{16})`)
	// reShort is the same in the nftables mode of kube-proxy.
	reShort = regexp.MustCompile(`(service|endpoint|external|firewall|affinity)-([A-Z2-7]{8})-`)
	reAddr  = regexp.MustCompile(`[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(/[0-9]{1,3})?|[0-9]{1,3}(\.[0-9]{1,3}){3}(/[0-9]{1,5})?`)
	reMAC   = regexp.MustCompile(`^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$`)
	reName  = regexp.MustCompile(`[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?`)
	rePath  = regexp.MustCompile(`(^|[\s"'=(])(/[^\s"',;:)]+)`)
	reURL   = regexp.MustCompile(`([a-z]+://)([^\s"'/]+)`)
	// reSaid are the parts of a rule in which names can be.
	reSaid   = regexp.MustCompile(`(--comment|--log-prefix|-i|-o|--physdev-in|--physdev-out) ("(?:[^"\\]|\\.)*"|\S+)|\bcomment "(?:[^"\\]|\\.)*"`)
	reString = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)
	// reHex and reFull are addresses in the tables of IPVS.
	reHex   = regexp.MustCompile(`\b[0-9A-F]{8}\b`)
	reFull  = regexp.MustCompile(`[0-9a-f]{4}(:[0-9a-f]{4}){7}`)
	reLabel = regexp.MustCompile(`="((?:[^"\\]|\\.)*)"`)
)

// Text replaces in what is for people.
func (r *Redactor) Text(s string) string {
	if r.level == None {
		return s
	}
	s = reURL.ReplaceAllString(s, "${1}(host)")
	s = rePath.ReplaceAllStringFunc(s, func(m string) string {
		at := strings.IndexByte(m, '/')
		for _, known := range []string{"/proc/", "/sys/", "/dev/", "/etc/kubernetes/", "/var/lib/kube-proxy/", "/healthz", "/metrics", "/run/kptrace/"} {
			if strings.HasPrefix(m[at:], known) {
				return m
			}
		}
		return m[:at] + "(path)"
	})
	return r.said(r.Addresses(r.codes(s)))
}

// Rules replaces in what iptables-save or ipset save prints, which stays readable
// by their kin.
func (r *Redactor) Rules(s string) string {
	if r.level == None {
		return s
	}
	return reSaid.ReplaceAllStringFunc(r.Addresses(r.codes(s)), func(m string) string {
		option, value, _ := strings.Cut(m, " ")
		return option + " " + r.said(value)
	})
}

// Addresses replaces addresses, ranges and MACs only.
func (r *Redactor) Addresses(s string) string {
	if r.level == None {
		return s
	}
	return replaceAll(reAddr, s, func(at, end int) string {
		m := s[at:end]
		// Within a longer word it is none, but for the names of nftables mode.
		if at > 0 && isWord(s[at-1]) || end < len(s) && isWord(s[end]) && s[end] != '_' {
			return m
		}
		text, bits, ranged := strings.Cut(m, "/")
		trail := ""
		for strings.HasSuffix(text, ".") || strings.HasSuffix(text, ":") && !strings.HasSuffix(text, "::") {
			text, trail = text[:len(text)-1], text[len(text)-1:]+trail
		}
		a, err := netip.ParseAddr(text)
		if err != nil && reMAC.MatchString(text) {
			return "02:00:00:00:00:00" + trail
		}
		if err != nil {
			return m
		}
		if !ranged {
			return r.Addr(a).String() + trail
		}
		n, err := strconv.Atoi(bits)
		if err != nil || n > a.BitLen() || at > 1 && s[at-2:at] == "__" {
			return r.Addr(a).String() + "/" + bits // a port
		}
		return r.Prefix(netip.PrefixFrom(a, n)).String()
	})
}

func isWord(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// replaceAll is ReplaceAllStringFunc for those that want to look around.
func replaceAll(re *regexp.Regexp, s string, f func(at, end int) string) string {
	var b strings.Builder
	last := 0
	for _, m := range re.FindAllStringIndex(s, -1) {
		b.WriteString(s[last:m[0]])
		b.WriteString(f(m[0], m[1]))
		last = m[1]
	}
	b.WriteString(s[last:])
	return b.String()
}

// codes replaces what is made of the names of Services. Lengths stay.
func (r *Redactor) codes(s string) string {
	s = reHash.ReplaceAllStringFunc(s, func(m string) string {
		head, code := m[:len(m)-16], m[len(m)-16:]
		if out, ok := r.hashes[code]; ok {
			return head + out
		}
		return head + r.code(code, 16)
	})
	return reShort.ReplaceAllStringFunc(s, func(m string) string {
		at := strings.IndexByte(m, '-') + 1
		return m[:at] + r.code(m[at:at+8], 8) + "-"
	})
}

// shortName is the least length of a name that is replaced in prose by itself.
const shortName = 3

// said replaces names, and what follows a namespace as its object's name.
func (r *Redactor) said(s string) string {
	last := -1 // where a namespace ended
	return replaceAll(reName, s, func(at, end int) string {
		m := s[at:end]
		after := last >= 0 && at == last+1 && s[last] == '/'
		if len(m) < shortName && !after && (end == len(s) || s[end] != '/') {
			return m // an article, a unit, a letter of an option
		}
		last = -1
		if r.namespaces[m] || r.namespaces[m[strings.LastIndexByte(m, '-')+1:]] {
			last = end
		}
		if out, ok := r.known(m); ok {
			return out
		}
		if slices.Contains(common, strings.ToLower(m)) {
			return m
		}
		if after {
			return r.name("obj", m)
		}
		if head, tail, ok := strings.Cut(m, "."); ok { // foo.shop.svc, node1.ktr
			labels := []string{head}
			labels = append(labels, strings.Split(tail, ".")...)
			for i, l := range labels {
				if out, ok := r.known(l); ok {
					labels[i] = out
				}
			}
			return strings.Join(labels, ".")
		}
		return m
	})
}

// known is the replacement of a name, or of one that begins with one as a pod's does
// with its workload's.
func (r *Redactor) known(m string) (string, bool) {
	if out, ok := r.names[m]; ok {
		return out, true
	}
	if slices.Contains(common, strings.ToLower(m)) {
		return "", false
	}
	for i := len(m) - 1; i > 0; i-- {
		if m[i] != '-' {
			continue
		}
		if _, ok := r.names[m[:i]]; ok && i >= shortName {
			return r.word("pod", m), true
		}
		if out, ok := r.names[m[i+1:]]; ok && len(m)-i > shortName { // behind the code of a chain
			return m[:i+1] + out, true
		}
	}
	return "", false
}

// JSON replaces in the strings of a document, but for its keys.
func (r *Redactor) JSON(s string) string {
	if r.level == None {
		return s
	}
	return replaceAll(reString, s, func(at, end int) string {
		if strings.HasPrefix(strings.TrimLeft(s[end:min(len(s), end+8)], " \t\n"), ":") {
			return s[at:end]
		}
		var text string
		if json.Unmarshal([]byte(s[at:end]), &text) != nil {
			return `""`
		}
		b, err := json.Marshal(r.Text(text))
		if err != nil {
			return `""`
		}
		return string(b)
	})
}

// Metrics replaces in the values of labels.
func (r *Redactor) Metrics(s string) string {
	if r.level == None {
		return s
	}
	return reLabel.ReplaceAllStringFunc(s, func(m string) string { return `="` + r.Text(m[2:len(m)-1]) + `"` })
}

// Virtual replaces in the tables of IPVS, where addresses are in hexadecimal.
func (r *Redactor) Virtual(s string) string {
	if r.level == None {
		return s
	}
	first, rest, ok := strings.Cut(s, "\n")
	if !ok {
		return s
	}
	rest = reHex.ReplaceAllStringFunc(rest, func(m string) string {
		n, err := strconv.ParseUint(m, 16, 32)
		if err != nil {
			return m
		}
		a := r.Addr(netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})).As4()
		return fmt.Sprintf("%X", a[:])
	})
	return first + "\n" + reFull.ReplaceAllStringFunc(rest, func(m string) string {
		a, err := netip.ParseAddr(m)
		if err != nil {
			return m
		}
		return r.Addr(a).StringExpanded()
	})
}
