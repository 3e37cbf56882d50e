package dataplane

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/internal/nfnl"
)

// Look finds the signs there are in the calling thread's network namespace. What
// this user may not see is left out: eBPF programs that hang at no device here
// take the right to list those of the machine (CAP_BPF).
func Look() []Sign {
	var found []Sign
	add := func(s Sign) {
		if s.Who != "" && !slices.ContainsFunc(found, func(o Sign) bool { return o.Who == s.Who && (o.Sure || !s.Sure) }) {
			found = append(found, s)
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		name := l.Attrs().Name
		names[l.Attrs().Index] = name
		who, sure := device(name)
		add(Sign{who, "device " + name, sure})
	}
	for _, p := range attached(names) {
		who, sure := Program(p.name)
		add(Sign{who, fmt.Sprintf("eBPF program %s at %s", p.name, p.device), sure})
	}
	for _, name := range loaded() {
		who, sure := Program(name)
		add(Sign{who, "eBPF program " + name, sure})
	}
	return found
}

type program struct{ name, device string }

// attached lists the eBPF programs at the devices of this namespace. Only devices
// with a qdisc for them are asked.
func attached(names map[int]string) (out []program) {
	qdiscs, err := netlink.QdiscList(nil)
	if err != nil {
		return nil
	}
	for _, q := range qdiscs {
		if kind := q.Type(); kind != "clsact" && kind != "ingress" {
			continue
		}
		link := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: q.Attrs().LinkIndex}}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlink.FilterList(link, parent)
			if err != nil {
				continue
			}
			for _, f := range filters {
				if b, ok := f.(*netlink.BpfFilter); ok {
					out = append(out, program{b.Name, names[q.Attrs().LinkIndex]})
				}
			}
		}
	}
	return out
}

// maxPrograms bounds how many of the machine's eBPF programs are looked at.
const maxPrograms = 4096

// loaded names the machine's eBPF programs that can be in the way of connections,
// none where they may not be listed.
func loaded() (names []string) {
	id := ebpf.ProgramID(0)
	for range maxPrograms {
		next, err := ebpf.ProgramGetNextID(id)
		if err != nil {
			return names
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it has gone meanwhile
		}
		info, err := p.Info()
		_ = p.Close()
		if err == nil && (info.Type == ebpf.CGroupSockAddr || info.Type == ebpf.SchedCLS) {
			names = append(names, info.Name)
		}
	}
	return names
}

// Messages and attributes of linux/netfilter/nf_tables.h.
const (
	nftNewFlowtable   = 22
	nftGetFlowtable   = 23
	nftaFlowtableIn   = 1
	nftaFlowtableName = 2
	askBuffer         = 64 << 10
)

// Flowtables lists the flowtables of this namespace as "inet filter/ft": packets of
// the connections in them pass no hook but the first. It needs CAP_NET_ADMIN.
func Flowtables() ([]string, error) {
	s, err := nfnl.Open(askBuffer)
	if err != nil {
		return nil, fmt.Errorf("dataplane: %w", err)
	}
	defer s.Close()
	var out []string
	err = s.Dump(nfnl.Type(nfnl.SubsysNFTables, nftGetFlowtable), nfnl.FamilyUnspec, nil, func(data []byte) {
		out = append(out, readFlowtables(data)...)
	})
	if err != nil {
		return nil, fmt.Errorf("dataplane: listing flowtables: %w", err)
	}
	return out, nil
}

func readFlowtables(data []byte) (out []string) {
	families := map[uint8]string{1: "inet", nfnl.FamilyIPv4: "ip", nfnl.FamilyIPv6: "ip6"}
	for m := nfnl.NewMessages(data); m.Next(); {
		if m.Type != nfnl.Type(nfnl.SubsysNFTables, nftNewFlowtable) {
			continue
		}
		table, name := "", ""
		for a := m.Attrs(); a.Next(); {
			switch a.Type {
			case nftaFlowtableIn:
				table = text(a.Data)
			case nftaFlowtableName:
				name = text(a.Data)
			}
		}
		out = append(out, families[m.Family]+" "+table+"/"+name)
	}
	return out
}

// text is a string that ends with a zero.
func text(b []byte) string {
	if n := slices.Index(b, 0); n >= 0 {
		b = b[:n]
	}
	return string(b)
}
