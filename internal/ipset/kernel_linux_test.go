package ipset

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
)

// TestKernel reads what the kernel's sets are saved as, and finds in them what the
// kernel finds.
func TestKernel(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	const want = `create ips hash:ip comment counters timeout 600
add ips 10.0.0.1 comment "not nomatch"
create halves hash:ip netmask 24
add halves 10.1.2.0
create ports bitmap:port range 0-65535
add ports 80
create ipport hash:ip,port
add ipport 10.0.0.1,tcp:80
add ipport 10.0.0.2,udp:80
create ipportip hash:ip,port,ip
add ipportip 10.0.0.1,tcp:80,10.0.0.3
create ipportnet hash:ip,port,net
add ipportnet 10.0.0.1,tcp:80,10.2.0.0/16
add ipportnet 10.0.0.1,tcp:80,10.2.3.0/24 nomatch
create nets hash:net
add nets 10.0.0.0/8
add nets 10.9.0.0/16 nomatch
add nets 10.9.9.9
create netport hash:net,port
add netport 10.0.0.0/24,tcp:80
add netport 10.0.0.64/26,tcp:80 nomatch
create six hash:net family inet6
add six fd00::/64
`
	if _, err := exec.Run(t.Context(), exec.Spec{Path: "ipset", Args: []string{"restore"}, Stdin: strings.NewReader(want), Netns: ns.Fd()}); err != nil {
		t.Fatal(err)
	}
	saved, err := exec.Run(t.Context(), exec.Spec{Path: "ipset", Args: []string{"save"}, Netns: ns.Fd()})
	if err != nil {
		t.Fatal(err)
	}
	sets, err := Parse(string(saved.Stdout))
	if err != nil {
		t.Fatalf("%v in %s", err, saved.Stdout)
	}
	found, tried := 0, 0
	for _, probe := range strings.Fields("10.0.0.1 10.0.0.2 10.1.2.3 10.0.0.65 10.8.8.8 10.9.1.1 10.9.9.9 192.0.2.1 fd00::1 fd01::1") {
		for _, port := range []string{"80", "81"} {
			for _, other := range strings.Fields("10.0.0.3 10.2.1.1 10.2.3.1") {
				for name, x := range sets {
					a, b := netip.MustParseAddr(probe), netip.MustParseAddr(other)
					if x.hasFamily() && a.Is6() != x.ip6 || len(x.kinds) < 3 && other != "10.0.0.3" {
						continue // nothing to ask the kernel for, or the same again
					}
					var entry, dirs []string
					for i, kind := range x.kinds {
						switch {
						case kind == "port" && x.storage == "bitmap":
							entry, dirs = append(entry, port), append(dirs, "dst")
						case kind == "port":
							entry, dirs = append(entry, "tcp:"+port), append(dirs, "dst")
						case i == 2:
							entry, dirs = append(entry, other), append(dirs, "src")
						default:
							entry, dirs = append(entry, probe), append(dirs, "dst")
						}
					}
					p := xtables.Packet{Proto: "tcp", Src: b, Dst: a, DPort: 80}
					if port == "81" {
						p.DPort = 81
					}
					_, err := exec.Run(t.Context(), exec.Spec{Path: "ipset", Args: []string{"test", name, strings.Join(entry, ",")}, Netns: ns.Fd()})
					if got := sets.Match(name, dirs, &p); got != tri(err == nil) {
						t.Errorf("%s in %s: %d, and the kernel says %v", entry, name, got, err)
					}
					tried++
					if err == nil {
						found++
					}
				}
			}
		}
	}
	if found < 25 || found > tried/2 {
		t.Errorf("%d of %d were found: that tells nothing", found, tried)
	}
}
