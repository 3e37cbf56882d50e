package xtables

import (
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The functions in this file bring one argument to the form iptables-save
// prints. What they do not understand they return as it is; what is already
// canonical they return without allocating.

var (
	ctStates   = []string{"INVALID", "NEW", "RELATED", "ESTABLISHED", "UNTRACKED", "SNAT", "DNAT"}
	ctStatuses = []string{"NONE", "EXPECTED", "SEEN_REPLY", "ASSURED", "CONFIRMED"}
	addrTypes  = []string{"UNSPEC", "UNICAST", "LOCAL", "BROADCAST", "ANYCAST", "MULTICAST",
		"BLACKHOLE", "UNREACHABLE", "PROHIBIT", "THROW", "NAT", "XRESOLVE"}
	ctEvents = []string{"new", "related", "destroy", "reply", "assured", "protoinfo", "helper", "mark",
		"natseqinfo", "secmark"}
	flagNames = []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG"}
)

// keep returns old if b spells the same.
func keep(old string, b []byte) string {
	if string(b) == old {
		return old
	}
	return string(b)
}

// parseMark reads "value" or "value/mask" as strtoul(3) with base 0 does.
func parseMark(s string) (value, mask uint32, ok bool) {
	v, m, masked := strings.Cut(s, "/")
	value, ok = parseUint32(v)
	mask = math.MaxUint32
	if masked && ok {
		mask, ok = parseUint32(m)
	}
	return value, mask, ok
}

func parseUint32(s string) (uint32, bool) {
	if strings.Contains(s, "_") {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 0, 32)
	return uint32(n), err == nil
}

func appendHex(b []byte, n uint32) []byte {
	return strconv.AppendUint(append(b, "0x"...), uint64(n), 16)
}

func hexText(s string) string {
	n, ok := parseUint32(s)
	if !ok {
		return s
	}
	var buf [16]byte
	return keep(s, appendHex(buf[:0], n))
}

// markText is --mark of the mark and connmark matches.
func markText(s string) string {
	value, mask, ok := parseMark(s)
	if !ok {
		return s
	}
	var buf [32]byte
	b := appendHex(buf[:0], value)
	if mask != math.MaxUint32 {
		b = appendHex(append(b, '/'), mask)
	}
	return keep(s, b)
}

// xmarkText turns the argument of any mark option into that of --set-xmark:
// mark = mark &^ mask ^ value.
func xmarkText(kind, s string) string {
	value, mask, ok := parseMark(s)
	if !ok {
		return s
	}
	switch kind {
	case "set-mark":
		mask |= value
	case "or-mark":
		mask = value
	case "and-mark":
		value, mask = 0, ^value
	case "xor-mark":
		mask = 0
	}
	var buf [32]byte
	b := appendHex(buf[:0], value)
	return keep(s, appendHex(append(b, '/'), mask))
}

// Probability rounds p to the 31 bits the kernel keeps (lround(p * 2^31)) and
// returns it as the kernel will use it.
func Probability(p float64) float64 { return math.Round(p*(1<<31)) / (1 << 31) }

func probabilityText(s string) string {
	p, err := strconv.ParseFloat(s, 64)
	if err != nil || !(p >= 0 && p <= 1) {
		return s
	}
	var buf [32]byte
	return keep(s, strconv.AppendFloat(buf[:0], Probability(p), 'f', 11, 64))
}

func parsePort(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

// parsePorts reads "5", "5:7", "5:" or ":7" with the given separator.
func parsePorts(s string, sep byte) (lo, hi uint16, ok bool) {
	i := strings.IndexByte(s, sep)
	if i < 0 {
		lo, ok = parsePort(s)
		return lo, lo, ok
	}
	lo, hi, ok = 0, math.MaxUint16, true
	if i > 0 {
		lo, ok = parsePort(s[:i])
	}
	if i < len(s)-1 && ok {
		hi, ok = parsePort(s[i+1:])
	}
	return lo, hi, ok
}

func portRange(s string, sep byte) string {
	lo, hi, ok := parsePorts(s, sep)
	if !ok {
		return s
	}
	var buf [16]byte
	b := strconv.AppendUint(buf[:0], uint64(lo), 10)
	if lo != hi {
		b = strconv.AppendUint(append(b, sep), uint64(hi), 10)
	}
	return keep(s, b)
}

// connbytesText is "from[:to]"; an open end is printed without colon.
func connbytesText(s string) string {
	from, to, ranged := strings.Cut(s, ":")
	switch {
	case ranged && to == "":
		return from
	case ranged && from == "":
		return "0:" + to
	}
	return s
}

// sortList puts the members of a comma list into the order of names.
func sortList(s string, names []string) string {
	var have uint32
	for word := range strings.SplitSeq(s, ",") {
		i := slices.IndexFunc(names, func(n string) bool { return strings.EqualFold(n, word) })
		if i < 0 {
			return s
		}
		have |= 1 << i
	}
	var buf [128]byte
	b := buf[:0]
	for i, name := range names {
		if have&(1<<i) != 0 {
			b = append(append(b, name...), ',')
		}
	}
	return keep(s, b[:len(b)-1])
}

func stateList(s string) string { return sortList(s, ctStates) }

// tcpFlagBits reads the flags of --tcp-flags as they lie in the header.
func tcpFlagBits(s string) (bits uint8, ok bool) {
	for word := range strings.SplitSeq(s, ",") {
		switch i := slices.Index(flagNames, strings.ToUpper(word)); {
		case i >= 0:
			bits |= 1 << i
		case strings.EqualFold(word, "ALL"):
			bits |= 0x3f
		case !strings.EqualFold(word, "NONE"):
			return 0, false
		}
	}
	return bits, true
}

func tcpFlags(s string) string {
	bits, ok := tcpFlagBits(s)
	if !ok {
		return s
	}
	if bits == 0 {
		return "NONE"
	}
	var buf [32]byte
	b := buf[:0]
	for i, name := range flagNames {
		if bits&(1<<i) != 0 {
			b = append(append(b, name...), ',')
		}
	}
	return keep(s, b[:len(b)-1])
}

// natText is --to-destination and --to-source: addr[-addr][:port[-port][/base]].
func natText(s string) string {
	if s == "" {
		return s
	}
	addrs, ports := s, ""
	if s[0] == '[' {
		end := strings.IndexByte(s, ']')
		if end < 0 || end+1 < len(s) && s[end+1] != ':' {
			return s
		}
		addrs = s[1:end]
		if end+1 < len(s) {
			ports = s[end+2:]
		}
	} else if i := strings.IndexByte(s, ':'); i >= 0 && i == strings.LastIndexByte(s, ':') {
		addrs, ports = s[:i], s[i+1:]
	}
	var buf [96]byte
	b, is6, ok := appendIPRange(buf[:0], addrs, ports != "")
	if !ok {
		return s
	}
	if ports != "" {
		if is6 {
			b = append(b, ']')
		}
		b = append(b, ':')
		base := ""
		if i := strings.IndexByte(ports, '/'); i >= 0 {
			ports, base = ports[:i], ports[i:]
		}
		b = append(append(b, portRange(ports, '-')...), base...)
	}
	return keep(s, b)
}

// appendIPRange prints "a" or "a-b", with an opening bracket before IPv6 if
// ports follow.
func appendIPRange(b []byte, s string, ports bool) (_ []byte, is6, ok bool) {
	if s == "" {
		return b, false, true
	}
	first, last, ranged := strings.Cut(s, "-")
	lo, err := netip.ParseAddr(first)
	if err != nil || lo.Zone() != "" {
		return b, false, false
	}
	if lo.Is6() && ports {
		b = append(b, '[')
	}
	b = appendIP(b, lo)
	if ranged {
		hi, err := netip.ParseAddr(last)
		if err != nil || hi.Zone() != "" || hi.BitLen() != lo.BitLen() {
			return b, false, false
		}
		if hi != lo {
			b = appendIP(append(b, '-'), hi)
		}
	}
	return b, lo.Is6(), true
}

// rateText is --limit as print_rate of libxt_limit prints it: in the largest
// unit that does not lose precision, after the kernel's rounding.
func rateText(s string) string {
	const scale = 10000 // XT_LIMIT_SCALE
	units := []struct {
		name string
		mult uint64
	}{{"day", 24 * 3600 * scale}, {"hour", 3600 * scale}, {"min", 60 * scale}, {"sec", scale}}
	count, unit, given := strings.Cut(s, "/")
	mult := uint64(scale)
	if given {
		mult = 0
		for _, u := range units {
			full := u.name
			if full == "min" || full == "sec" {
				full = map[string]string{"min": "minute", "sec": "second"}[full]
			}
			if unit != "" && strings.HasPrefix(full, strings.ToLower(unit)) {
				mult = u.mult
			}
		}
	}
	n, err := strconv.ParseUint(count, 10, 32)
	if err != nil || n == 0 || mult == 0 || mult/n == 0 {
		return s
	}
	period := mult / n
	i := 1
	for ; i < len(units); i++ {
		if period > units[i].mult || units[i].mult/period < units[i].mult%period {
			break
		}
	}
	u := units[i-1]
	return strconv.FormatUint(u.mult/period, 10) + "/" + u.name
}
