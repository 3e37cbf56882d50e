package ipset

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/xtables"
)

// saved has each type of a set, as ipset save prints it.
const saved = `create ips hash:ip family inet hashsize 1024 maxelem 65536 bucketsize 12 initval 0x1
add ips 10.0.0.1 timeout 0 packets 3 bytes 180
add ips 10.0.0.2 comment "not nomatch at all"
create six hash:ip family inet6 hashsize 1024 maxelem 65536
add six fd00::1
create halves hash:ip family inet hashsize 1024 maxelem 65536 netmask 24
add halves 10.1.2.0
create nets hash:net family inet hashsize 1024 maxelem 65536 comment
add nets 10.0.0.0/8 comment "all"
add nets 10.9.0.0/16 nomatch comment "but these"
add nets 10.9.9.9
create everything hash:net family inet hashsize 1024 maxelem 65536
add everything 0.0.0.0/1
add everything 128.0.0.0/1
create ports bitmap:port range 0-65535
add ports 80
create ipport hash:ip,port family inet hashsize 1024 maxelem 65536
add ipport 10.0.0.1,tcp:80
add ipport 10.0.0.1,udp:53
add ipport 10.0.0.1,icmp:8/0
create ipportip hash:ip,port,ip family inet hashsize 1024 maxelem 65536
add ipportip 10.0.0.1,tcp:80,10.0.0.1
create ipportnet hash:ip,port,net family inet hashsize 1024 maxelem 65536
add ipportnet 10.0.0.1,tcp:80,192.0.2.0/24
create netport hash:net,port family inet hashsize 1024 maxelem 65536
add netport 10.0.0.0/24,tcp:80
add netport 10.0.0.64/26,tcp:80 nomatch
create netnet hash:net,net family inet hashsize 1024 maxelem 65536
add netnet 10.0.0.0/8,192.0.2.0/24
create netiface hash:net,iface family inet hashsize 1024 maxelem 65536
add netiface 10.0.0.0/8,eth0
add netiface 172.16.0.0/12,veth wildcard
create marked hash:ip,mark family inet markmask 0x0000ffff hashsize 1024 maxelem 65536
add marked 10.0.0.1,0x00000063
create macs hash:mac hashsize 1024 maxelem 65536
add macs 01:02:03:04:05:06
create range bitmap:ip range 10.3.0.0-10.3.0.255
add range 10.3.0.7
create all list:set size 8
add all ipport
add all ips
create murky list:set size 8
add murky macs
add murky ips
COMMIT
`

func TestMatch(t *testing.T) {
	sets, err := Parse(saved)
	if err != nil {
		t.Fatal(err)
	}
	const tcp, udp = "tcp", "udp"
	for _, tt := range []struct {
		set, dirs, proto, src, dst string
		want                       xtables.Tri
	}{
		{"ips", "src", tcp, "10.0.0.1:9", "10.7.7.7:80", xtables.Yes},
		{"ips", "src", tcp, "10.0.0.2:9", "10.7.7.7:80", xtables.Yes},
		{"ips", "dst", tcp, "10.0.0.1:9", "10.7.7.7:80", xtables.No},
		{"ips", "src,dst", tcp, "10.0.0.1:9", "10.7.7.7:80", xtables.Yes}, // more than it asks for
		{"ips", "src", tcp, "[fd00::1]:9", "[fd00::2]:80", xtables.No},    // another family
		{"six", "src", tcp, "[fd00::1]:9", "[fd00::2]:80", xtables.Yes},
		{"halves", "src", tcp, "10.1.2.99:9", "10.7.7.7:80", xtables.Yes},
		{"halves", "src", tcp, "10.1.3.99:9", "10.7.7.7:80", xtables.No},
		{"nets", "src", tcp, "10.8.0.1:9", "192.0.2.1:80", xtables.Yes},
		{"nets", "src", tcp, "10.9.0.1:9", "192.0.2.1:80", xtables.No}, // nomatch
		{"nets", "src", tcp, "10.9.9.9:9", "192.0.2.1:80", xtables.Yes},
		{"nets", "dst", tcp, "10.8.0.1:9", "192.0.2.1:80", xtables.No},
		{"everything", "dst", tcp, "10.8.0.1:9", "192.0.2.1:80", xtables.Yes},
		{"ports", "dst", tcp, "10.0.0.1:9", "10.7.7.7:80", xtables.Yes},
		{"ports", "src", tcp, "10.0.0.1:9", "10.7.7.7:80", xtables.No},
		{"ports", "dst", "sctp", "10.0.0.1:9", "10.7.7.7:80", xtables.No},
		{"ipport", "dst,dst", tcp, "10.7.7.7:9", "10.0.0.1:80", xtables.Yes},
		{"ipport", "dst,dst", udp, "10.7.7.7:9", "10.0.0.1:80", xtables.No},
		{"ipport", "dst,dst", udp, "10.7.7.7:9", "10.0.0.1:53", xtables.Yes},
		{"ipport", "src,dst", tcp, "10.0.0.1:9", "10.7.7.7:80", xtables.Yes},
		{"ipport", "dst", tcp, "10.7.7.7:9", "10.0.0.1:80", xtables.No}, // too few directions
		{"ipportip", "dst,dst,src", tcp, "10.0.0.1:9", "10.0.0.1:80", xtables.Yes},
		{"ipportip", "dst,dst,src", tcp, "10.0.0.2:9", "10.0.0.1:80", xtables.No},
		{"ipportnet", "dst,dst,src", tcp, "192.0.2.77:9", "10.0.0.1:80", xtables.Yes},
		{"ipportnet", "dst,dst,src", tcp, "192.0.3.77:9", "10.0.0.1:80", xtables.No},
		{"netport", "dst,dst", tcp, "10.7.7.7:9", "10.0.0.1:80", xtables.Yes},
		{"netport", "dst,dst", tcp, "10.7.7.7:9", "10.0.0.65:80", xtables.No},
		{"netnet", "src,dst", tcp, "10.7.7.7:9", "192.0.2.1:80", xtables.Yes},
		{"netnet", "dst,src", tcp, "10.7.7.7:9", "192.0.2.1:80", xtables.No},
		{"netiface", "src,src", tcp, "10.7.7.7:9", "192.0.2.1:80", xtables.Yes},
		{"netiface", "src,dst", tcp, "10.7.7.7:9", "192.0.2.1:80", xtables.No},
		{"netiface", "dst,dst", tcp, "10.7.7.7:9", "172.16.1.1:80", xtables.Yes},
		{"marked", "src,src", tcp, "10.0.0.1:9", "192.0.2.1:80", xtables.Yes},
		{"marked", "src,src", tcp, "10.0.0.2:9", "192.0.2.1:80", xtables.No},
		{"macs", "src", tcp, "10.0.0.1:9", "192.0.2.1:80", xtables.Unknown},
		{"range", "src", tcp, "10.3.0.7:9", "192.0.2.1:80", xtables.Yes},
		{"range", "src", tcp, "10.3.0.8:9", "192.0.2.1:80", xtables.No},
		{"all", "src", tcp, "10.0.0.2:9", "192.0.2.1:80", xtables.Yes},
		{"all", "dst,dst", tcp, "10.7.7.7:9", "10.0.0.1:80", xtables.Yes},
		{"all", "src,src", tcp, "10.7.7.7:9", "10.0.0.1:80", xtables.No},
		{"murky", "src", tcp, "10.0.0.2:9", "192.0.2.1:80", xtables.Yes},
		{"murky", "src", tcp, "10.0.0.3:9", "192.0.2.1:80", xtables.Unknown},
		{"absent", "src", tcp, "10.0.0.1:9", "192.0.2.1:80", xtables.Unknown},
	} {
		src, dst := netip.MustParseAddrPort(tt.src), netip.MustParseAddrPort(tt.dst)
		p := xtables.Packet{Proto: tt.proto, Src: src.Addr(), Dst: dst.Addr(), SPort: src.Port(), DPort: dst.Port(),
			In: "eth0", Out: "veth12", Mark: 0xabc00063}
		if got := sets.Match(tt.set, strings.Split(tt.dirs, ","), &p); got != tt.want {
			t.Errorf("%s %s of %s %s to %s: %d, want %d", tt.set, tt.dirs, tt.proto, tt.src, tt.dst, got, tt.want)
		}
	}
	// An interface that is not known yet.
	p := xtables.Packet{Proto: tcp, Src: netip.MustParseAddr("10.7.7.7"), Dst: netip.MustParseAddr("192.0.2.1")}
	if got := sets.Match("netiface", []string{"src", "src"}, &p); got != xtables.Unknown {
		t.Errorf("without an interface: %d", got)
	}
}

func TestParseErrors(t *testing.T) {
	for text, want := range map[string]string{
		"Name: x\nType: hash:ip\n":                        `line 1 of the sets: "Name: x" is not of ipset save`,
		"create x hash:ip\nadd y 10.0.0.1\n":              "line 2 of the sets: set y is not created before",
		"create x hash:cloud\n":                           "set x: type hash:cloud is not known",
		"create x hash:ip,port\nadd x 10.0.0.1\n":         "entry 10.0.0.1: has 1 parts, and the type 2",
		"create x hash:ip\nadd x ten\n":                   "set x, entry ten: ",
		"create x hash:ip,port\nadd x 10.0.0.1,tcp:web\n": "entry 10.0.0.1,tcp:web: ",
		"create x hash:ip netmask 33\n":                   "netmask 33: is not within 0 to 32",
	} {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestSplit(t *testing.T) {
	rules := "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m set --match-set ips src -j ACCEPT\nCOMMIT\n"
	rest, sets := Split(rules + saved)
	if rest != rules+"COMMIT\n" || sets+"COMMIT\n" != saved {
		t.Errorf("rules %q, sets %q", rest, sets)
	}
}
