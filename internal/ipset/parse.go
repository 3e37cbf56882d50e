package ipset

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Split takes what ipset save printed out of a text in which other tools' output
// is besides.
func Split(text string) (rest, sets string) {
	var other, saved strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "create ") || strings.HasPrefix(line, "add ") {
			saved.WriteString(line)
		} else {
			other.WriteString(line)
		}
	}
	return other.String(), saved.String()
}

// Parse reads what ipset save printed.
func Parse(text string) (Sets, error) {
	sets := make(Sets)
	return sets, sets.Read(text)
}

// Read adds what ipset save printed.
func (s Sets) Read(text string) error {
	n := 0
	for line := range strings.Lines(text) {
		n++
		if err := s.line(strings.TrimSpace(line)); err != nil {
			return fmt.Errorf("line %d of the sets: %w", n, err)
		}
	}
	return nil
}

func (s Sets) line(line string) error {
	if i := strings.Index(line, ` comment "`); i > 0 { // any words, and no quotes in it
		line = line[:i] + line[strings.LastIndex(line, `"`)+1:]
	}
	words := strings.Fields(line)
	switch {
	case len(words) == 0 || strings.HasPrefix(line, "#") || line == "COMMIT":
		return nil
	case words[0] == "create" && len(words) >= 3:
		x, err := newSet(words[2], words[3:])
		if err != nil {
			return fmt.Errorf("set %s: %w", words[1], err)
		}
		s[words[1]] = x
		return nil
	case words[0] == "add" && len(words) >= 3:
		x := s[words[1]]
		if x == nil {
			return fmt.Errorf("set %s is not created before", words[1])
		}
		e, err := x.entry(words[2])
		if err != nil {
			return fmt.Errorf("set %s, entry %s: %w", words[1], words[2], err)
		}
		e.nomatch = slices.Contains(words[3:], "nomatch")
		for i := range e.parts {
			e.parts[i].wildcard = slices.Contains(words[3:], "wildcard")
		}
		x.except = x.except || e.nomatch
		x.entries = append(x.entries, e)
		return nil
	}
	return fmt.Errorf("%q is not of ipset save: each line there begins with create or add", line)
}

func newSet(kind string, options []string) (*set, error) {
	storage, kinds, ok := strings.Cut(kind, ":")
	if !ok {
		return nil, fmt.Errorf("%q is no type of a set", kind)
	}
	x := &set{storage: storage, kinds: strings.Split(kinds, ","), markmask: math.MaxUint32}
	for _, k := range x.kinds {
		if !slices.Contains([]string{"ip", "net", "port", "iface", "mark", "mac", "set"}, k) {
			return nil, fmt.Errorf("type %s is not known", kind)
		}
	}
	for i := 0; i+1 < len(options); i++ {
		value := options[i+1]
		var err error
		switch options[i] {
		case "family":
			x.ip6 = value == "inet6"
		case "netmask":
			var bits int
			if bits, err = strconv.Atoi(value); err == nil {
				x.bitmask, err = prefixMask(bits, x.ip6)
			}
		case "bitmask":
			x.bitmask, err = netip.ParseAddr(value)
		case "markmask":
			x.markmask, err = number(value)
		}
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", options[i], value, err)
		}
	}
	return x, nil
}

func prefixMask(bits int, ip6 bool) (netip.Addr, error) {
	size := 32
	if ip6 {
		size = 128
	}
	a, ok := netip.AddrFromSlice(net.CIDRMask(bits, size))
	if !ok {
		return a, fmt.Errorf("is not within 0 to %d", size)
	}
	return a, nil
}

func number(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 0, 32)
	return uint32(n), err
}

func (x *set) entry(text string) (entry, error) {
	words := strings.Split(text, ",")
	if len(words) == len(x.kinds)-1 && x.kinds[len(words)] == "mac" {
		words = append(words, "") // bitmap:ip,mac may leave it out
	}
	if len(words) != len(x.kinds) {
		return entry{}, fmt.Errorf("has %d parts, and the type %d", len(words), len(x.kinds))
	}
	var e entry
	for i, kind := range x.kinds {
		p, err := x.read(kind, words[i])
		if err != nil {
			return e, err
		}
		e.parts = append(e.parts, p)
	}
	return e, nil
}

func (x *set) read(kind, text string) (p part, err error) {
	switch kind {
	case "ip", "net":
		return addresses(text)
	case "port":
		return ports(text, x.storage == "bitmap")
	case "iface":
		p.name, p.physdev = strings.CutPrefix(text, "physdev:")
	case "set":
		p.name = text
	case "mark":
		p.mark, err = number(text)
	}
	return p, err
}

// addresses reads an address, a prefix, or a range as a-b.
func addresses(text string) (p part, err error) {
	if from, to, ok := strings.Cut(text, "-"); ok {
		if p.from, err = netip.ParseAddr(from); err == nil {
			p.to, err = netip.ParseAddr(to)
		}
		return p, err
	}
	if !strings.Contains(text, "/") {
		if p.from, err = netip.ParseAddr(text); err == nil {
			p.to, p.bits = p.from, p.from.BitLen()
		}
		return p, err
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		return p, err
	}
	prefix = prefix.Masked()
	p.from, p.bits = prefix.Addr(), prefix.Bits()
	b, m := p.from.AsSlice(), net.CIDRMask(p.bits, p.from.BitLen())
	for i := range b {
		b[i] |= ^m[i]
	}
	p.to, _ = netip.AddrFromSlice(b)
	return p, nil
}

// ports reads tcp:80, 80 or 80-90; without a protocol it is TCP, but in a bitmap.
func ports(text string, bitmap bool) (part, error) {
	p := part{proto: "tcp"}
	proto, rest, ok := strings.Cut(text, ":")
	switch {
	case ok:
		p.proto, text = proto, rest
	case bitmap:
		p.proto = ""
	}
	if !slices.Contains([]string{"", "tcp", "udp", "udplite", "sctp"}, p.proto) {
		return p, nil // icmp and others, whose packets have no ports
	}
	low, top, ok := strings.Cut(text, "-")
	if !ok {
		top = low
	}
	a, err := strconv.ParseUint(low, 10, 16)
	b, err2 := strconv.ParseUint(top, 10, 16)
	p.low, p.top = uint16(a), uint16(b)
	return p, errors.Join(err, err2)
}
