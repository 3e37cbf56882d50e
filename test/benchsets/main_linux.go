// Command benchsets measures what many source ranges of one load balancer
// address cost: as plain rules, which is how kube-proxy and kptrace program
// them in iptables mode, and as one rule that looks into an ipset; and likewise
// many endpoints of one Service. It prints curves: what the first packet of a
// connection pays, and what a sync pays.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
)

// packets is how many first packets are sent; the median counts. changes is how
// often one range is changed.
const (
	packets = 301
	changes = 5
)

// The addresses: of the load balancer, of an endpoint and of two clients, of
// whom one is in the last range and the other in none.
var (
	vip      = netip.MustParseAddr("198.51.100.1")
	endpoint = netip.MustParseAddrPort("192.0.2.2:5353")
	inLast   = netip.MustParseAddr("192.0.2.3")
	inNone   = netip.MustParseAddr("192.0.2.4")
)

func main() {
	netns.Init()
	quick := flag.Bool("quick", false, "few entries only, to see that it works")
	flag.Parse()
	if err := run(*quick); err != nil {
		fmt.Fprintln(os.Stderr, "benchsets:", err)
		os.Exit(1)
	}
}

func run(quick bool) error {
	if os.Geteuid() != 0 || netns.Rootless() {
		return errors.New("this measures as root only: in a user namespace the kernel refuses forced socket buffers, and with them large commits of iptables-nft")
	}
	dir, err := os.MkdirTemp("", "benchsets")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv("XTABLES_LOCKFILE", filepath.Join(dir, "lock")); err != nil {
		return err
	}
	sizes := []int{1, 1000, 5000, 20000}
	if quick {
		sizes = []int{1, 50}
	}
	fmt.Println("entries  flavour  kind    all programmed  one changed   first packet, last range   no range")
	for _, flavour := range []string{"nft", "legacy"} {
		for _, n := range sizes {
			for kind, measure := range []func(context.Context, *world) (figures, error){plain, set} {
				f, err := measureIn(flavour, n, measure)
				if err != nil {
					return fmt.Errorf("%d entries, %s: %w", n, flavour, err)
				}
				fmt.Printf("%7d  %-7s  %-6s  %14s  %11s   %24s  %9s\n", n, flavour, []string{"rules", "ipset"}[kind],
					show(f.full), show(f.change), show(f.last), show(f.none))
			}
		}
	}
	return endpoints(sizes)
}

func show(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%.1f µs", float64(d)/1e3)
	case d < time.Second:
		return fmt.Sprintf("%.1f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

// figures are what was measured: programming everything, changing one entry,
// and the first packet of a client in the last range and of one in none.
type figures struct{ full, change, last, none time.Duration }

// world is a network namespace with a Service that has n source ranges.
type world struct {
	ns      *netns.NS
	flavour string
	n       int
}

func measureIn(flavour string, n int, measure func(context.Context, *world) (figures, error)) (figures, error) {
	ns, err := netns.New()
	if err != nil {
		return figures{}, err
	}
	defer ns.Close()
	w := &world{ns: ns, flavour: flavour, n: n}
	if err := w.addresses(); err != nil {
		return figures{}, err
	}
	sink, err := w.socket(endpoint)
	if err != nil {
		return figures{}, err
	}
	defer unix.Close(sink)
	return measure(context.Background(), w)
}

// addresses puts all of them on lo, and a route to the load balancer's.
func (w *world) addresses() error {
	nl, err := netlink.NewHandleAt(vnetns.NsHandle(w.ns.Fd()))
	if err != nil {
		return err
	}
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, ip := range []netip.Addr{endpoint.Addr(), inLast, inNone} {
		if err := nl.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(32, 32)}}); err != nil {
			return err
		}
	}
	return nl.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: vip.AsSlice(), Mask: net.CIDRMask(32, 32)}})
}

// entry is the i-th range; the last one is that of a client.
func (w *world) entry(i int) netip.Prefix {
	if i == w.n-1 {
		return netip.PrefixFrom(inLast, 32)
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], 10<<24|uint32(i)<<8)
	return netip.PrefixFrom(netip.AddrFrom4(b), 24)
}

func (w *world) snapshot(ranges ...netip.Prefix) *proxy.Snapshot {
	return &proxy.Snapshot{Node: proxy.Node{Name: "node1"}, Services: []proxy.Service{{
		Name: proxy.PortName{Namespace: "shop", Name: "dns", Port: "dns", Proto: conntrack.UDP}, Type: "LoadBalancer",
		ClusterIP: netip.MustParseAddr("172.30.0.1"), Port: 53, LoadBalancerIPs: []netip.Addr{vip}, SourceRanges: ranges,
		Endpoints: []proxy.Endpoint{{Addr: endpoint, Ready: true, Serving: true}},
	}}}
}

func (w *world) backend() *iptables.Backend {
	return iptables.New(iptables.Config{Flavour: w.flavour, Tools: xtables.Tools{Netns: w.ns.Fd()}})
}

// plain is the iptables mode as it is.
func plain(ctx context.Context, w *world) (f figures, err error) {
	b := w.backend()
	if _, _, err := b.Preflight(ctx); err != nil {
		return f, err
	}
	ranges := make([]netip.Prefix, w.n)
	for i := range ranges {
		ranges[i] = w.entry(i)
	}
	sync := func() (time.Duration, error) {
		start := time.Now()
		_, err := b.Apply(ctx, b.Render(w.snapshot(ranges...), proxy.Overlay{}))
		return time.Since(start), err
	}
	if f.full, err = sync(); err != nil {
		return f, err
	}
	var took []time.Duration
	for i := range changes {
		ranges = slices.Clone(ranges)
		ranges[0] = netip.PrefixFrom(netip.AddrFrom4([4]byte{11, 0, byte(i), 0}), 24)
		if w.n == 1 { // the client has to stay in it
			ranges[0] = netip.PrefixFrom(inLast, 31-i).Masked()
			if ranges[0].Contains(inNone) {
				ranges[0] = w.entry(0)
			}
		}
		d, err := sync()
		if err != nil {
			return f, err
		}
		took = append(took, d)
	}
	f.change = median(took)
	return f, w.send(&f)
}

// set has the same rules, but that one rule looks into a set.
func set(ctx context.Context, w *world) (f figures, err error) {
	b := w.backend()
	if _, _, err := b.Preflight(ctx); err != nil {
		return f, err
	}
	var list strings.Builder
	fmt.Fprintf(&list, "create ranges hash:net family inet hashsize 1024 maxelem 65536\n")
	for i := range w.n {
		fmt.Fprintf(&list, "add ranges %s\n", w.entry(i))
	}
	start := time.Now()
	prog := b.Render(w.snapshot(w.entry(w.n-1)), proxy.Overlay{})
	if _, err := b.Apply(ctx, prog); err != nil {
		return f, err
	}
	if err := w.tool(ctx, list.String(), "ipset", "restore"); err != nil {
		return f, err
	}
	rule, chain, err := w.ranged(prog)
	if err != nil {
		return f, err
	}
	text := fmt.Sprintf("*nat\n-R %s 1 %s\nCOMMIT\n", chain, rule)
	if err := w.tool(ctx, text, "iptables-"+w.flavour+"-restore", "-w", "5", "--noflush"); err != nil {
		return f, err
	}
	f.full = time.Since(start)
	var took []time.Duration
	for i := range changes {
		start := time.Now()
		if err := w.tool(ctx, "", "ipset", "add", "ranges", fmt.Sprintf("11.0.%d.0/24", i)); err != nil {
			return f, err
		}
		took = append(took, time.Since(start))
	}
	f.change = median(took)
	return f, w.send(&f)
}

// ranged returns the rule with the one range, made to look into the set, and its
// chain.
func (w *world) ranged(prog proxy.Program) (rule, chain string, err error) {
	source := "-s " + w.entry(w.n-1).String()
	for line := range strings.Lines(prog.Text()) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "-A KUBE-FW-")
		if !ok || !strings.Contains(rest, source) {
			continue
		}
		name, rule, _ := strings.Cut(rest, " ")
		return strings.Replace(rule, source, "-m set --match-set ranges src", 1), "KUBE-FW-" + name, nil
	}
	return "", "", errors.New("no rule for a source range")
}

func (w *world) tool(ctx context.Context, stdin, path string, args ...string) error {
	_, err := exec.Run(ctx, exec.Spec{Path: path, Args: args, Stdin: strings.NewReader(stdin), Netns: w.ns.Fd()})
	return err
}

// send measures first packets: what sendto(2) takes, which on lo is the whole
// way through the rules.
func (w *world) send(f *figures) (err error) {
	if f.last, err = w.from(inLast, nil); err != nil {
		return err
	}
	f.none, err = w.from(inNone, unix.EPERM) // dropped in OUTPUT
	return err
}

func (w *world) from(ip netip.Addr, want error) (time.Duration, error) {
	to := &unix.SockaddrInet4{Addr: vip.As4(), Port: 53}
	var took []time.Duration
	for i := range packets {
		fd, err := w.socket(netip.AddrPortFrom(ip, uint16(20000+i)))
		if err != nil {
			return 0, err
		}
		start := time.Now()
		err = unix.Sendto(fd, []byte("?"), 0, to)
		took = append(took, time.Since(start))
		unix.Close(fd)
		if !errors.Is(err, want) {
			return 0, fmt.Errorf("a packet from %s: %w, want %w", ip, err, want)
		}
	}
	return median(took), nil
}

// socket opens a UDP socket in the namespace.
func (w *world) socket(at netip.AddrPort) (fd int, err error) {
	err = w.ns.Do(func() error {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())})
	})
	return fd, err
}

func median(x []time.Duration) time.Duration {
	slices.Sort(x)
	return x[len(x)/2]
}
