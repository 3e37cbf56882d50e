package ipvs

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
)

// What is counted is cheap to read where the whole is not: it finds out that
// somebody took something away or added something.

// setKey is a set of a family.
type setKey struct {
	set set
	ip6 bool
}

// headersOnly is IPSET_FLAG_LIST_HEADER.
const headersOnly = 1 << 2

// countSets counts the members of our sets.
func countSets() (map[setKey]uint32, error) {
	req := nl.NewNetlinkRequest(nl.IPSET_CMD_LIST|unix.NFNL_SUBSYS_IPSET<<8, nl.GetIpsetFlags(nl.IPSET_CMD_LIST))
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_NETLINK, Version: nl.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, nl.Uint8Attr(nl.IPSET_PROTOCOL)))
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_FLAGS|int(nl.NLA_F_NET_BYTEORDER), binary.BigEndian.AppendUint32(nil, headersOnly)))
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return nil, fmt.Errorf("counting the members of ipsets: %w", err)
	}
	out := map[setKey]uint32{}
	for _, m := range msgs {
		name, members := "", uint32(0)
		for a := range nl.ParseAttributes(m[4:]) {
			switch a.Type &^ nl.NLA_F_NESTED {
			case nl.IPSET_ATTR_SETNAME:
				name = nl.BytesToString(a.Value)
			case nl.IPSET_ATTR_DATA:
				for d := range nl.ParseAttributes(a.Value) {
					if d.Type&nl.NLA_TYPE_MASK == nl.IPSET_ATTR_ELEMENTS && len(d.Value) == 4 {
						members = binary.BigEndian.Uint32(d.Value)
					}
				}
			}
		}
		if s, ip6, ok := setNamed(name); ok {
			out[setKey{s, ip6}] = members
		}
	}
	return out, nil
}

// otherSets says which of our sets others changed.
func otherSets(h *held, families []bool) (string, error) {
	now, err := countSets()
	if err != nil {
		return "", err
	}
	want := map[setKey]uint32{}
	for e := range h.entries {
		want[setKey{e.set, e.ip6}]++
	}
	for _, ip6 := range families {
		for s := range numSets {
			k := setKey{s, ip6}
			switch n, ok := now[k]; {
			case !ok:
				return "the set " + s.name(ip6) + " is gone", nil
			case n != want[k]:
				return fmt.Sprintf("the set %s has %d members, not %d", s.name(ip6), n, want[k]), nil
			}
		}
	}
	return "", nil
}

// serversOf is how many real servers a virtual server has, and their weights
// added up.
type serversOf struct {
	servers int
	weight  uint64
}

// countServers counts the real servers of all virtual ones.
func countServers() (map[key]serversOf, error) {
	f, err := os.Open("/proc/thread-self/net/ip_vs")
	if err != nil {
		return nil, fmt.Errorf("counting real servers: %w", err)
	}
	defer f.Close()
	return readCounts(f)
}

// readCounts reads the kernel's table: a line "TCP  0A60000A:0050 rr" for each
// virtual server, and "  -> 0AF40102:1F90      Masq    1      0          0" for each
// of its real ones.
func readCounts(r io.Reader) (map[key]serversOf, error) {
	out := map[key]serversOf{}
	var at key
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 2 {
			continue
		}
		switch proto, ok := protoNames[f[0]]; {
		case ok:
			addr, ok := hexAddr(f[1])
			if at = (key{}); ok {
				at = key{addr, proto}
				out[at] = serversOf{}
			}
		case f[0] == "->" && len(f) >= 4 && at != (key{}):
			n := out[at]
			weight, err := strconv.ParseUint(f[3], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("a line of /proc/net/ip_vs has no weight: %q", lines.Text())
			}
			out[at] = serversOf{n.servers + 1, n.weight + weight}
		case f[0] == "FWM":
			at = key{}
		}
	}
	return out, lines.Err()
}

var protoNames = map[string]conntrack.Proto{"TCP": conntrack.TCP, "UDP": conntrack.UDP, "SCTP": conntrack.SCTP} //nolint:gochecknoglobals // a table

// hexAddr reads "0A60000A:0050" or "[fd00:0000:...]:0050".
func hexAddr(s string) (netip.AddrPort, bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return netip.AddrPort{}, false
	}
	port, err := strconv.ParseUint(s[i+1:], 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	ip, err := netip.ParseAddr(strings.Trim(s[:i], "[]"))
	if err != nil {
		b, err := hex.DecodeString(s[:i])
		if err != nil {
			return netip.AddrPort{}, false
		}
		ip, _ = netip.AddrFromSlice(b)
	}
	return netip.AddrPortFrom(ip, uint16(port)), ip.IsValid()
}

// otherServers says of which virtual server others changed the real ones.
func otherServers(h *held) (string, error) {
	now, err := countServers()
	if err != nil {
		return "", err
	}
	for at, v := range h.virtuals {
		if v.foreign || v.draining {
			continue
		}
		want := serversOf{servers: len(v.reals)}
		for _, r := range v.reals {
			want.weight += uint64(r.weight)
		}
		if n := now[at]; n != want {
			return fmt.Sprintf("virtual server %s has %d real servers of weight %d in all, not %d of %d", at, n.servers, n.weight, want.servers, want.weight), nil
		}
	}
	return "", nil
}
