package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/dataplane"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/recent"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
	"github.com/kptrace/kptrace/trace/source/ipvs"
)

// Inspect reads from this network namespace what a check looks at: the rules of
// both flavours and families, connection tracking, settings, interfaces. It
// changes nothing and needs CAP_NET_ADMIN. Parts that cannot be read are left out
// and named in notes; without any rules at all it is an error.
func Inspect(ctx context.Context) (*check.State, []string, error) {
	return inspectPart(ctx, nil)
}

// inspectPart is Inspect without the rules of iptables mode of Services that in
// leaves out, nil none; where it leaves out some, without those of nftables mode.
func inspectPart(ctx context.Context, in func(service string) bool) (*check.State, []string, error) {
	s, notes, err := look(ctx, in)
	if err == nil && in == nil && slices.ContainsFunc(s.NFTables, ofKubeProxy) {
		p, more, err := nftProgram(ctx, s, false)
		if err != nil {
			notes = append(notes, "the rules of the nftables mode were not looked at: "+err.Error())
		}
		s.NFT, notes = p, append(notes, more...)
	}
	return s, notes, err
}

// ofKubeProxy tells the tables of a kube-proxy in nftables mode.
func ofKubeProxy(table string) bool { return table == "ip kube-proxy" || table == "ip6 kube-proxy" }

// look is Inspect without the rules of nftables mode.
func look(ctx context.Context, in func(service string) bool) (s *check.State, notes []string, err error) {
	s = &check.State{Now: time.Now(), Sysctls: make(map[string]string)}
	var tools xtables.Tools
	var failed []error
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
			rs, err := readRules(ctx, &tools, fl, fa, in)
			if ctx.Err() != nil {
				return nil, nil, ctx.Err()
			}
			if bad := (*xtables.ParseError)(nil); errors.As(err, &bad) {
				return nil, nil, fmt.Errorf("node: %w", err)
			}
			if err != nil {
				failed = append(failed, err)
				continue
			}
			s.Dumps = append(s.Dumps, xtables.Dump{Family: fa, Flavour: fl, Rules: rs})
		}
	}
	if s.Dumps == nil {
		return nil, nil, fmt.Errorf("node: no rules can be read here: %w", errors.Join(failed...))
	}
	for _, part := range []struct {
		what string
		read func(*check.State) error
	}{{"connections", readEntries}, {"interfaces", readLinks}, {"tables of nf_tables", readNFTables}, {"lists of clients", readLists}, {"flowtables", readFlowtables}, {"NFLOG groups", readListeners}} {
		if err := part.read(s); err != nil {
			notes = append(notes, part.what+" were not looked at: "+err.Error())
		}
	}
	for _, name := range []string{
		"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter",
		"net/bridge/bridge-nf-call-iptables",
	} {
		if v, err := readSysctl(name); err == nil {
			s.Sysctls[name] = v
		}
	}
	s.VirtualServers, s.Balanced = virtualServers()
	s.Planes = dataplane.Look()
	return s, notes, nil
}

func readRules(ctx context.Context, tools *xtables.Tools, fl xtables.Flavour, fa xtables.Family, in func(string) bool) (*xtables.Ruleset, error) {
	if in != nil {
		return tools.SavePart(ctx, fl, fa, in)
	}
	return tools.Save(ctx, fl, fa, "", false)
}

// maxEntries bounds the connections a check looks at.
const maxEntries = 1 << 18

func readEntries(s *check.State) error {
	conn, err := conntrack.Open(conntrack.Config{})
	if err != nil {
		return err
	}
	defer conn.Close()
	counters, err := conn.Stats()
	if err != nil {
		return err
	}
	s.Counters = &counters
	if counters.Entries > maxEntries {
		return fmt.Errorf("there are %d of them", counters.Entries)
	}
	return conn.Dump(context.Background(), func(f conntrack.Flow) error {
		if f.Orig.Proto() == conntrack.UDP { // only these can be stale
			s.Entries = append(s.Entries, f)
		}
		return nil
	})
}

func readLinks(s *check.State) error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		s.Links = append(s.Links, l.Attrs().Name)
		if l.Type() == "bridge" {
			s.Bridges = append(s.Bridges, l.Attrs().Name)
		}
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			s.Addrs = append(s.Addrs, ip.Unmap())
		}
	}
	return nil
}

// Numbers of linux/netfilter/nf_tables.h.
const (
	nftMsgGetTable = 1
	nftaTableName  = 1
)

func readNFTables(s *check.State) error {
	conn, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	msgs, err := conn.Execute(mdnetlink.Message{
		Header: mdnetlink.Header{
			Type:  mdnetlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | nftMsgGetTable),
			Flags: mdnetlink.Request | mdnetlink.Dump,
		},
		Data: []byte{unix.AF_UNSPEC, 0, 0, 0},
	})
	if err != nil {
		return err
	}
	families := map[byte]string{unix.AF_INET: "ip", unix.AF_INET6: "ip6", 1: "inet", unix.AF_BRIDGE: "bridge", 3: "arp", 5: "netdev"}
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		ad, err := mdnetlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return err
		}
		for ad.Next() {
			if ad.Type() == nftaTableName {
				if name := ad.String(); name != xtables.EarlyTable {
					s.NFTables = append(s.NFTables, families[m.Data[0]]+" "+name)
				}
			}
		}
	}
	return nil
}

// readLists counts the clients in the lists of xt_recent.
func readLists(s *check.State) error {
	names, err := filepath.Glob("/proc/thread-self/net/xt_recent/*")
	if err != nil || len(names) == 0 {
		return err
	}
	s.ListMax = recent.Limit()
	s.Lists = make(map[string]int, len(names))
	for _, name := range names {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		s.Lists[filepath.Base(name)] = bytes.Count(b, []byte("\n"))
	}
	return nil
}

func readFlowtables(s *check.State) (err error) {
	s.Flowtables, err = dataplane.Flowtables()
	return err
}

// readListeners lists who holds NFLOG groups.
func readListeners(s *check.State) error {
	held, err := nfnl.Groups()
	for group, portID := range held {
		p := nfnl.Owner(portID)
		s.Listeners = append(s.Listeners, check.Listener{Group: group, PID: p.PID, Command: p.Command})
	}
	return err
}

// virtualServers counts those of IPVS and lists their servers; 0 where there is
// no IPVS.
func virtualServers() (n int, servers []check.Balanced) {
	b, err := os.ReadFile("/proc/thread-self/net/ip_vs")
	if err != nil {
		return 0, nil
	}
	for line := range strings.Lines(string(b)) {
		switch first, _, _ := strings.Cut(line, " "); first {
		case "TCP", "UDP", "SCTP", "FWM":
			n++
		}
	}
	for _, e := range ipvs.NewDecoder().Decode(trace.Frame{Data: b}, nil) {
		if e.Kind == trace.KindServer {
			servers = append(servers, check.Balanced{
				Proto: e.Tuple.Proto(), Virtual: e.Tuple.Dst(), Server: e.Tuple.Src(), Forwarding: e.IPVS.Method,
			})
		}
	}
	return n, servers
}

// route finds by the kernel's routes which interface a packet goes out by.
func route(p *xtables.Packet) { p.Out = deviceTo(p.Dst) }

// sourceTo is the address that packets of this node to an address come from.
func sourceTo(a netip.Addr) (netip.Addr, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil {
		return netip.Addr{}, err
	}
	for i := range routes {
		if src, ok := netip.AddrFromSlice(routes[i].Src); ok {
			return src.Unmap(), nil
		}
	}
	return netip.Addr{}, unix.ENODATA
}

// deviceTo is the interface by which packets to an address leave, "" if it is the
// node's own or there is no route.
func deviceTo(a netip.Addr) string {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 || routes[0].Type == unix.RTN_LOCAL {
		return ""
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return ""
	}
	return link.Attrs().Name
}
