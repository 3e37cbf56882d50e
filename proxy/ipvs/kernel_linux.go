package ipvs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	mobyipvs "github.com/moby/ipvs"
	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/nlbatch"
	"github.com/kptrace/kptrace/proxy"
)

// kernel is the thin edge: sockets in the namespace that is programmed.
type kernel struct {
	ipvs   *mobyipvs.Handle
	genl   *nlbatch.Conn
	sets   *nlbatch.Conn
	routes *nlbatch.Conn
	family uint16 // of generic netlink
	device uint32 // the index of Device
}

// inNetns runs f in the network namespace that is programmed.
func (b *Backend) inNetns(f func() error) error {
	if b.cfg.Tools.Netns == 0 {
		return f()
	}
	ns, err := netns.Open(fmt.Sprintf("/proc/self/fd/%d", b.cfg.Tools.Netns))
	if err != nil {
		return fmt.Errorf("proxy/ipvs: %w", err)
	}
	defer ns.Close()
	return ns.Do(f)
}

// withKernel opens the sockets for f. It costs three system calls each time and
// keeps nothing open in a namespace that may go.
func (b *Backend) withKernel(f func(*kernel) error) error {
	return b.inNetns(func() error {
		k := &kernel{}
		defer k.close()
		if err := k.open(); err != nil {
			return err
		}
		return f(k)
	})
}

func (k *kernel) open() error {
	family, err := loaded()
	if err != nil {
		return err
	}
	k.family = family
	if k.ipvs, err = openIPVS(); err != nil {
		return err
	}
	if k.genl, err = nlbatch.Open(unix.NETLINK_GENERIC); err != nil {
		return err
	}
	if k.sets, err = nlbatch.Open(unix.NETLINK_NETFILTER); err != nil {
		return err
	}
	k.routes, err = nlbatch.Open(unix.NETLINK_ROUTE)
	return err
}

// loaded returns the number of IPVS's netlink family; it loads the module where it
// can.
func loaded() (uint16, error) {
	family, err := netlink.GenlFamilyGet("IPVS")
	if err != nil {
		_, tried := exec.Run(context.Background(), exec.Spec{Path: "modprobe", Args: []string{"ip_vs"}})
		if family, err = netlink.GenlFamilyGet("IPVS"); err != nil {
			return 0, fmt.Errorf("the kernel has no IPVS: load the module ip_vs%s: %w", why(tried), err)
		}
	}
	return family.ID, nil
}

// why says in a few words why modprobe did not help.
func why(tried error) string {
	switch {
	case tried == nil:
		return ""
	case errors.Is(tried, fs.ErrNotExist):
		return " (there is no modprobe here)"
	}
	text, _, _ := strings.Cut(tried.Error(), "\n")
	return " (" + text + ")"
}

// openIPVS opens the library's handle. Only call it where IPVS is loaded: the
// library looks once and for all. What it logs we say ourselves.
func openIPVS() (*mobyipvs.Handle, error) {
	logrus.SetOutput(io.Discard)
	h, err := mobyipvs.New("")
	if err != nil {
		return nil, fmt.Errorf("opening IPVS: %w", err)
	}
	return h, nil
}

func (k *kernel) close() {
	if k.ipvs != nil {
		k.ipvs.Close()
	}
	for _, c := range []*nlbatch.Conn{k.genl, k.sets, k.routes} {
		if c != nil {
			_ = c.Close()
		}
	}
}

// ensureDevice makes the dummy device. It stays down: its addresses are the
// node's all the same.
func (k *kernel) ensureDevice() error {
	link, err := netlink.LinkByName(Device)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		err = netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: Device}})
		if err == nil || errors.Is(err, unix.EEXIST) {
			link, err = netlink.LinkByName(Device)
		}
	}
	if err != nil {
		return fmt.Errorf("making the dummy device %s (module dummy): %w", Device, err)
	}
	if link.Type() != "dummy" {
		return fmt.Errorf("the device %s is a %s and not ours: rename it", Device, link.Type())
	}
	k.device = uint32(link.Attrs().Index) //nolint:gosec // an index is positive
	return nil
}

// ensureSets makes the sets that are not there.
func (k *kernel) ensureSets(families []bool, there map[string]bool, most uint32) error {
	for _, ip6 := range families {
		family := uint8(unix.AF_INET)
		if ip6 {
			family = unix.AF_INET6
		}
		for s := range numSets {
			name, kind := s.name(ip6), s.def().kind
			if there[name] {
				continue
			}
			opts := netlink.IpsetCreateOptions{Family: family, MaxElements: most}
			if kind == typeBitmapPort {
				opts = netlink.IpsetCreateOptions{PortTo: 65535}
			}
			if err := netlink.IpsetCreate(name, kind, opts); err != nil {
				return fmt.Errorf("making the set %s of type %s (module ip_set): %w", name, kind, explainSet(err))
			}
		}
	}
	return nil
}

// readSets reads the members of our sets, and the names of all sets.
func (k *kernel) readSets(h *held) (names map[string]bool, err error) {
	list, err := netlink.IpsetListAll()
	if err != nil {
		return nil, fmt.Errorf("reading ipsets: %w", err)
	}
	names = map[string]bool{}
	for i := range list {
		set := &list[i]
		names[set.SetName] = true
		s, ip6, ours := setNamed(set.SetName)
		if !ours {
			continue
		}
		if set.TypeName != s.def().kind {
			return nil, fmt.Errorf("the set %s is of type %s and not ours, which would be %s: rename or destroy it", set.SetName, set.TypeName, s.def().kind)
		}
		for j := range set.Entries {
			h.entries[readEntry(s, ip6, &set.Entries[j])] = new(mark)
		}
	}
	return names, nil
}

func readEntry(s set, ip6 bool, from *netlink.IPSetEntry) entry {
	e := entry{set: s, ip6: ip6}
	if from.IP != nil {
		e.ip = addrOf(from.IP)
	}
	if from.Port != nil {
		e.port = *from.Port
	}
	if from.Protocol != nil {
		e.proto = protoOf(uint16(*from.Protocol))
	}
	if from.IP2 != nil {
		e.other = addrOf(from.IP2)
	}
	if s.def().kind == typeIPPortNet {
		e.bits = from.CIDR2
		if e.bits == 0 { // not told for a single address
			e.bits = uint8(e.other.BitLen()) //nolint:gosec // at most 128
		}
	}
	return e
}

// addrOf reads an address as libraries hold it.
func addrOf(b []byte) netip.Addr {
	ip, _ := netip.AddrFromSlice(b)
	return ip.Unmap()
}

// readAddrs reads the addresses of our device.
func (k *kernel) readAddrs(h *held) error {
	link, err := netlink.LinkByName(Device)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for %s: %w", Device, err)
	}
	list, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("reading the addresses of %s: %w", Device, err)
	}
	for i := range list {
		if ip := addrOf(list[i].IP); !ip.IsLinkLocalUnicast() && !ip.IsLoopback() {
			h.bound[ip] = new(mark)
		}
	}
	return nil
}

// LocalAddrs returns the addresses of the calling thread's network namespace but
// for those of the device kube-ipvs0.
func LocalAddrs() []netip.Addr {
	all := proxy.InterfaceAddrs()
	link, err := netlink.LinkByName(Device)
	if err != nil {
		return all
	}
	list, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return all
	}
	bound := make(map[netip.Addr]bool, len(list))
	for i := range list {
		bound[addrOf(list[i].IP)] = true
	}
	kept := all[:0]
	for _, ip := range all {
		if !bound[ip] && !ip.IsLinkLocalUnicast() {
			kept = append(kept, ip)
		}
	}
	return kept
}

// readServers reads all virtual servers with their real servers; takeOver makes
// all of them ours.
func (b *Backend) readServers(k *kernel, h *held, takeOver bool) error {
	services, err := k.virtualServers()
	if err != nil {
		return err
	}
	node := map[netip.Addr]bool{}
	for _, ip := range proxy.InterfaceAddrs() {
		node[ip] = true
	}
	for _, s := range services {
		at := s.key
		if at == (key{}) {
			continue // not the kind that we make
		}
		v := &heldVirtual{key: at, reals: map[netip.AddrPort]*heldReal{}, settings: s.settings}
		v.foreign = !takeOver && !h.owns(at, func(ip netip.Addr) bool { return node[ip] })
		for _, p := range b.cfg.ExcludeCIDRs {
			v.spared = v.spared || p.Contains(at.addr.Addr())
		}
		h.virtuals[at] = v
		if v.foreign {
			continue
		}
		list, err := k.realServers(at)
		if err != nil {
			return err
		}
		for _, r := range list {
			real := &heldReal{weight: r.weight, other: r.forward != forwardNAT}
			if r.weight == 0 { // it was on its way out, or out for a time
				real.leaving = b.until()
			}
			v.reals[r.addr] = real
		}
	}
	return nil
}

// service is a virtual server as the library names it.
func (k key) service() *mobyipvs.Service {
	return &mobyipvs.Service{Address: k.addr.Addr().AsSlice(), Port: k.addr.Port(), Protocol: uint16(k.proto), AddressFamily: familyOf(k.addr.Addr())}
}

// noIPv6 says why this network namespace has no IPv6, "" if it has.
func noIPv6() string {
	if _, err := os.Stat("/proc/thread-self/net/if_inet6"); err != nil {
		return "the kernel has no IPv6"
	}
	if off, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6"); err == nil && off[0] == '1' {
		return "net.ipv6.conf.all.disable_ipv6 is 1"
	}
	return ""
}

// Errors of ipset above those of errno (linux/netfilter/ipset/ip_set.h). The
// same number means other things to other types of sets; these are of hash.
const (
	errSetProtocol = 4097
	errSetType     = 4098
	errSetMax      = 4099
	errSetFull     = 4352
)

// explainSet gives ipset's own errors words.
func explainSet(err error) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return err
	}
	switch errno {
	case errSetProtocol:
		return errors.New("the kernel speaks another version of ipset")
	case errSetType:
		return errors.New("the kernel has no such type of set")
	case errSetMax:
		return errors.New("the kernel has no room for more sets")
	case errSetFull:
		return errSetIsFull
	}
	return err
}

var errSetIsFull = errors.New("the set is full")
