package ipvs

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	mobyipvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// balanced is a world with one Service, whose scheduler is under test, and three
// pods that answer at port 9999 and 8080.
type balanced struct {
	*proxytest.World
	t   *testing.T
	b   *Backend
	vip netip.AddrPort
}

var schedVIP = netip.MustParseAddrPort("10.96.0.10:80")

func newBalanced(t *testing.T) *balanced {
	w := newWorld(t, false)
	echo(t, w, proxytest.FromA, proxytest.FromB, proxytest.FromC)
	return &balanced{World: w, t: t, b: inWorld(t, w, Config{}), vip: schedVIP}
}

// program makes the Service anew, so that the scheduler begins at its beginning.
// Endpoints are "a:8080=3" with a weight.
func (b *balanced) program(t *testing.T, scheduler string, affinity time.Duration, endpoints ...string) {
	t.Helper()
	b.clear(t)
	b.change(t, scheduler, affinity, endpoints...)
}

func (b *balanced) clear(t *testing.T) {
	t.Helper()
	// Nobody's connections are to be waited for: it is another Service.
	inKernel(t, b.World, func(h *mobyipvs.Handle) { b.Must(h.Flush()) })
	b.b.Forget()
	mustApply(t, b.b, proxytest.Services(""), proxy.Overlay{})
}

func (b *balanced) change(t *testing.T, scheduler string, affinity time.Duration, endpoints ...string) {
	t.Helper()
	var names []string
	weights := map[string]uint16{}
	for _, ep := range endpoints {
		name, weight, _ := strings.Cut(ep, "=")
		names = append(names, name)
		var n uint16 = 1
		fmt.Sscan(weight, &n)
		weights[name] = n
	}
	aff := ""
	if affinity > 0 {
		aff = " affinity=" + affinity.String()
	}
	snap := proxytest.Services("t/s tcp 10.96.0.10:80" + aff + " " + strings.Join(names, " "))
	snap.Services[0].Scheduler = scheduler
	for i := range snap.Services[0].Endpoints {
		snap.Services[0].Endpoints[i].Weight = weights[names[i]]
	}
	mustApply(t, b.b, snap, proxy.Overlay{})
}

// picks makes n connections that end at once, and returns who answered.
func (b *balanced) picks(t *testing.T, from proxytest.Source, n int) string {
	t.Helper()
	var s []string
	for range n {
		r := b.From(from, conntrack.TCP, b.vip, 5*time.Second)
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		s = append(s, name(r.Endpoint.Addr()))
	}
	return strings.Join(s, "")
}

func name(ip netip.Addr) string {
	for _, s := range []proxytest.Source{proxytest.FromA, proxytest.FromB, proxytest.FromC} {
		if s.Addr() == ip {
			return string(s)
		}
	}
	return "?"
}

// held opens a connection that stays open and returns who took it.
func (b *balanced) held(t *testing.T) (net.Conn, string) {
	t.Helper()
	c := hold(t, b.World, proxytest.FromOutside, b.vip)
	return c, readLine(t, c)
}

func count(s string) string {
	return fmt.Sprintf("a%d b%d c%d", strings.Count(s, "a"), strings.Count(s, "b"), strings.Count(s, "c"))
}

// rotation reports whether s is a turn of the given order, begun anywhere.
func rotation(s, order string) bool {
	for i := range order {
		if s == strings.Repeat(order[i:]+order[:i], len(s)/len(order)) {
			return true
		}
	}
	return false
}

// TestSchedulers holds every scheduler against its definition, with real
// connections.
func TestSchedulers(t *testing.T) {
	b := newBalanced(t)
	pods := []string{"a:8080", "b:8080", "c:8080"}
	t.Run("rr", func(t *testing.T) { // each in turn, exactly
		b.program(t, "rr", 0, pods...)
		if s := b.picks(t, proxytest.FromOutside, 30); !rotation(s, "abc") && !rotation(s, "acb") {
			t.Errorf("no exact turn: %s", s)
		}
	})
	t.Run("wrr", func(t *testing.T) { // by weight, exactly in each round
		b.program(t, "wrr", 0, "a:8080", "b:8080=2", "c:8080=3")
		for range 3 {
			if s := b.picks(t, proxytest.FromOutside, 6); count(s) != "a1 b2 c3" {
				t.Errorf("one round: %s", s)
			}
		}
	})
	t.Run("lc", func(t *testing.T) { // who has the fewest connections
		b.program(t, "lc", 0, "a:9999", "b:9999", "c:9999")
		var all string
		conns := map[string][]net.Conn{}
		for range 6 {
			c, who := b.held(t)
			conns[who] = append(conns[who], c)
			all += who
		}
		if count(all) != "a2 b2 c2" {
			t.Errorf("six held: %s", all)
		}
		// b loses both: the next two are its own. A connection that is over
		// counts as 1/256 of one that is open.
		for _, c := range conns["b"] {
			cut(c)
		}
		b.settled(t, "b", 0)
		_, first := b.held(t)
		_, second := b.held(t)
		if first+second != "bb" {
			t.Errorf("after b lost two: %s%s", first, second)
		}
	})
	t.Run("wlc", func(t *testing.T) { // the fewest in relation to weight
		b.program(t, "wlc", 0, "a:9999", "b:9999=2", "c:9999=3")
		all := ""
		for range 12 {
			_, who := b.held(t)
			all += who
		}
		if count(all) != "a2 b4 c6" {
			t.Errorf("twelve held: %s", all)
		}
	})
	t.Run("sed", func(t *testing.T) { // (active + 1) / weight is least
		b.program(t, "sed", 0, "a:9999", "b:9999=3")
		all := ""
		for range 8 {
			_, who := b.held(t)
			all += who
		}
		// b: 1/3, 2/3, then 3/3 against 1/1 of a, and so on.
		if !strings.HasPrefix(all, "bb") || count(all) != "a2 b6 c0" {
			t.Errorf("eight held: %s", all)
		}
	})
	t.Run("nq", func(t *testing.T) { // an idle one first, whatever its weight; else sed
		b.program(t, "nq", 0, "a:9999", "b:9999=9")
		_, first := b.held(t)
		_, second := b.held(t)
		if first == second {
			t.Errorf("an idle one was passed over: %s%s", first, second)
		}
		for range 4 {
			if _, who := b.held(t); who != "b" {
				t.Errorf("with none idle: %s", who)
			}
		}
	})
	for _, scheduler := range []string{"sh", "mh,no-port"} {
		t.Run(scheduler, func(t *testing.T) { // by the client's address
			b.program(t, scheduler, 0, pods...)
			b.stable(t, true)
		})
	}
	t.Run("sh,port", func(t *testing.T) { // by its port too
		b.program(t, "sh,port", 0, pods...)
		if s := b.picks(t, proxytest.FromOutside, 40); strings.Trim(s, s[:1]) == "" {
			t.Errorf("one client always meets %s", s[:1])
		}
	})
	t.Run("mh", func(t *testing.T) { // as in kube-proxy by its port too
		b.program(t, "mh", 0, pods...)
		if s := b.picks(t, proxytest.FromOutside, 40); strings.Trim(s, s[:1]) == "" {
			t.Errorf("one client always meets %s", s[:1])
		}
	})
	for _, scheduler := range []string{"mh", "sh,port"} { // places of the table by weight
		t.Run(scheduler+" by weight", func(t *testing.T) {
			b.program(t, scheduler, 0, "a:8080", "b:8080", "c:8080=4")
			const n = 150 // of which c is due 100; the standard deviation is 5.8
			if c := strings.Count(b.picks(t, proxytest.FromOutside, n), "c"); c < 70 || c > 130 {
				t.Errorf("c, with 4 of 6 of all weight, has %d of %d", c, n)
			}
		})
	}
	t.Run("mh,no-port when one leaves", func(t *testing.T) { b.fewMove(t) })
	t.Run("sh when one is out", func(t *testing.T) { b.fallback(t) })
	t.Run("dh", func(t *testing.T) { // by the virtual server's address: all clients alike
		b.program(t, "dh", 0, pods...)
		b.stable(t, false)
	})
	for _, scheduler := range []string{"lblc", "lblcr"} {
		t.Run(scheduler, func(t *testing.T) { b.locality(t, scheduler) })
	}
	t.Run("fo", func(t *testing.T) { // the highest weight alone
		b.program(t, "fo", 0, "a:8080", "b:8080=5", "c:8080=2")
		if s := b.picks(t, proxytest.FromOutside, 8); count(s) != "a0 b8 c0" {
			t.Errorf("got %s", s)
		}
	})
	t.Run("ovf", func(t *testing.T) { // the highest weight until it has more connections than that
		b.program(t, "ovf", 0, "a:9999", "b:9999=3", "c:9999=2")
		all := ""
		for range 8 {
			_, who := b.held(t)
			all += who
		}
		if all != "bbbbccca" {
			t.Errorf("eight held: %s", all)
		}
	})
}

// fewMove holds that of the clients of endpoints that stay hardly any meet another
// one when an endpoint leaves. By a hash alone it would be a half.
func (b *balanced) fewMove(t *testing.T) {
	addrs := b.clients(48)
	b.program(t, "mh,no-port", 0, "a:8080", "b:8080", "c:8080")
	before := map[netip.Addr]string{}
	for _, a := range addrs {
		before[a] = b.meets(t, a)
	}
	b.change(t, "mh,no-port", 0, "a:8080", "b:8080")
	stay, moved := 0, 0
	for _, a := range addrs {
		switch now := b.meets(t, a); {
		case now != "a" && now != "b":
			t.Errorf("%s met %q, which left", a, now)
		case before[a] == "c":
		default:
			if stay++; now != before[a] {
				moved++
			}
		}
	}
	if stay == 0 || stay == len(addrs) || moved > stay/3 {
		t.Errorf("of %d clients %d were with endpoints that stay, and %d of them moved", len(addrs), stay, moved)
	}
}

// fallback holds that sh sends the clients of an endpoint that is out to another,
// and with no-fallback refuses them.
func (b *balanced) fallback(t *testing.T) {
	addrs := b.clients(24)
	for _, scheduler := range []string{"sh", "sh,no-fallback"} {
		b.program(t, scheduler, 0, "a:8080", "b:8080", "c:8080")
		before := map[netip.Addr]string{}
		for _, a := range addrs {
			before[a] = b.meets(t, a)
		}
		snap := proxytest.Services("t/s tcp 10.96.0.10:80 a:8080 b:8080 c:8080")
		snap.Services[0].Scheduler = scheduler
		out := netip.AddrPortFrom(proxytest.FromC.Addr(), 8080)
		mustApply(t, b.b, snap, proxy.Overlay{Out: map[netip.AddrPort]proxy.Outage{out: {Reason: "test"}}})
		for _, a := range addrs {
			now := b.meets(t, a)
			switch {
			case before[a] != "c" && now != before[a]:
				t.Errorf("%s: a client of %s met %q", scheduler, before[a], now)
			case before[a] == "c" && scheduler != "sh" && now != "":
				t.Errorf("%s: a client of c met %q", scheduler, now)
			case before[a] == "c" && scheduler == "sh" && now != "a" && now != "b":
				t.Errorf("%s: a client of c met %q", scheduler, now)
			}
		}
	}
}

// settled waits until IPVS counts so many active connections of a pod.
func (b *balanced) settled(t *testing.T, pod string, active int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s has %d active connections", pod, active), func() bool {
		ok := false
		inKernel(t, b.World, func(h *mobyipvs.Handle) {
			list, err := h.GetDestinations(key{b.vip, conntrack.TCP}.service())
			b.Must(err)
			for _, d := range list {
				ok = ok || name(addrOf(d.Address)) == pod && d.ActiveConnections == active
			}
		})
		return ok
	})
}

// clients gives the outside n addresses.
func (b *balanced) clients(n int) (addrs []netip.Addr) {
	b.t.Helper()
	for i := range n {
		addrs = append(addrs, netip.AddrFrom4([4]byte{203, 0, 113, byte(20 + 4*i)}))
	}
	b.Must(b.NS[proxytest.FromOutside].Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}}); err != nil {
				return err
			}
		}
		return nil
	}))
	b.Must(b.Node.Do(func() error {
		link, err := netlink.LinkByName("to-outside")
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}); err != nil {
				return err
			}
		}
		return nil
	}))
	return addrs
}

// meets makes a connection from an address of the outside, and returns who
// answered, "" if nobody did.
func (b *balanced) meets(t *testing.T, from netip.Addr) (who string) {
	t.Helper()
	b.Must(b.NS[proxytest.FromOutside].Do(func() error {
		d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
		c, err := d.Dial("tcp", b.vip.String())
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		if err != nil {
			return err
		}
		defer c.Close()
		who = readLine(t, c)[:1]
		return nil
	}))
	return who
}

// stable holds that one address always meets the same pod, and that different
// ones meet different pods: clients where clients are hashed, else virtual
// servers.
func (b *balanced) stable(t *testing.T, clients bool) {
	t.Helper()
	met := map[string]bool{}
	addrs := b.clients(12)
	for _, a := range addrs {
		seen := ""
		for range 4 {
			seen += b.meets(t, a)
		}
		if strings.Trim(seen, seen[:1]) != "" {
			t.Errorf("%s met %s", a, seen)
		}
		met[seen[:1]] = true
	}
	if clients && len(met) < 2 {
		t.Errorf("all clients met %v", met)
	}
	if !clients && len(met) != 1 {
		t.Errorf("clients of one virtual server met %v", met)
	}
	if clients {
		return
	}
	// Other virtual servers meet others.
	text := ""
	for i := range 12 {
		text += fmt.Sprintf("t/s%02d tcp 10.96.0.%d:80 a:8080 b:8080 c:8080\n", i, 20+7*i)
	}
	snap := proxytest.Services(text)
	for i := range snap.Services {
		snap.Services[i].Scheduler = "dh"
	}
	mustApply(t, b.b, snap, proxy.Overlay{})
	for i := range snap.Services {
		r := b.From(proxytest.FromOutside, conntrack.TCP, netip.AddrPortFrom(snap.Services[i].ClusterIP, 80), 5*time.Second)
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		met[name(r.Endpoint.Addr())] = true
	}
	if len(met) < 2 {
		t.Errorf("all virtual servers meet %v", met)
	}
}

// locality holds that lblc and lblcr send all for one destination to the same
// pod as long as it is not overloaded (more active connections than weight, and
// another with fewer than half its weight), and elsewhere when it is.
func (b *balanced) locality(t *testing.T, scheduler string) {
	b.program(t, scheduler, 0, "a:9999=2", "b:9999=2", "c:9999=2")
	first := ""
	for range 3 { // sticks: two or three held are no overload yet
		_, who := b.held(t)
		first += who
	}
	if strings.Trim(first, first[:1]) != "" {
		t.Errorf("it did not stick: %s", first)
	}
	rest := ""
	for range 6 { // spills
		_, who := b.held(t)
		rest += who
	}
	if strings.Trim(rest, first[:1]) == "" {
		t.Errorf("it never spilled: %s then %s", first, rest)
	}
}

// TestPersistence holds that a client stays with its endpoint for the time of the
// Service's affinity, and no longer.
func TestPersistence(t *testing.T) {
	b := newBalanced(t)
	// IPVS forgets a connection that was reset after 10 s. A client's entry goes
	// when its own time is up, if none of its connections is known any more;
	// else it gets another minute.
	b.program(t, "rr", 15*time.Second, "a:9999", "b:9999", "c:9999")
	meets := func(from proxytest.Source) string {
		c := hold(t, b.World, from, b.vip)
		defer cut(c)
		return readLine(t, c)
	}
	several := func(from proxytest.Source) string {
		first := meets(from)
		for range 9 {
			if who := meets(from); who != first {
				t.Errorf("%s met %s and %s", from, first, who)
			}
		}
		return first
	}
	first, other := several(proxytest.FromOutside), several(proxytest.FromElsewhere)
	if first == other {
		t.Errorf("both met %s: rr gives each the next", first)
	}
	eventually(t, "the persistence expires", func() bool {
		var raw []byte
		b.Must(b.Node.Do(func() (err error) { raw, err = os.ReadFile("/proc/thread-self/net/ip_vs_conn"); return err }))
		return strings.Count(string(raw), "\n") <= 1
	})
	if again := several(proxytest.FromOutside); again == first || again == other {
		t.Errorf("after it expired the client met %s, before that %s, and the other %s", again, first, other)
	}
}
