package selection

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Entry is one address, port and protocol.
type Entry struct {
	Addr  netip.AddrPort
	Proto conntrack.Proto
}

// Want is what is to be traced.
type Want struct {
	// To are the addresses of Services, From those of endpoints.
	To, From []Entry
	// Packets is how many of each direction of a connection, from the first;
	// trace.AllPackets is all.
	Packets int
}

// Merge returns what two ask for together.
func (w Want) Merge(o Want) Want {
	out := Want{Packets: max(w.Packets, o.Packets)}
	if w.Packets == trace.AllPackets || o.Packets == trace.AllPackets {
		out.Packets = trace.AllPackets
	}
	out.To = merge(w.To, o.To)
	out.From = merge(w.From, o.From)
	return out
}

func merge(a, b []Entry) []Entry {
	all := slices.Concat(a, b)
	slices.SortFunc(all, compare)
	return slices.Compact(all)
}

func compare(a, b Entry) int {
	if c := a.Addr.Compare(b.Addr); c != 0 {
		return c
	}
	return int(a.Proto) - int(b.Proto)
}

// Of returns the entries for the Services that a filter names, or for all where
// it names none. local are the node's addresses, which serve node ports. What
// else the filter asks for is for flows to meet, not for packets.
func Of(snap *proxy.Snapshot, filter *trace.Filter, local []netip.Addr) Want {
	w := Want{}
	for i := range snap.Services {
		svc := &snap.Services[i]
		ways := fronts(svc, local)
		if !names(filter) {
			w.To = append(w.To, ways...)
		} else {
			n := len(w.To)
			for _, e := range ways {
				if filter.MatchService(trace.ServiceRef{Name: svc.Name, Addr: e.Addr}) {
					w.To = append(w.To, e)
				}
			}
			if len(w.To) == n {
				continue
			}
		}
		for j := range svc.Endpoints {
			w.From = append(w.From, Entry{svc.Endpoints[j].Addr, svc.Name.Proto})
		}
	}
	w.To, w.From = merge(w.To, nil), merge(w.From, nil)
	return w
}

// names reports whether every flow that a filter selects is of a Service that it
// names.
func names(f *trace.Filter) bool {
	return f.Names() && !slices.ContainsFunc(f.Resources, func(s trace.Selector) bool {
		return s.Kind != trace.SelectService && s.Kind != trace.SelectNamespace
	})
}

// fronts lists a Service's addresses.
func fronts(svc *proxy.Service, local []netip.Addr) []Entry {
	var out []Entry
	add := func(a netip.Addr, port uint16) {
		if a.IsValid() && a.Is6() == svc.Is6() && port != 0 {
			out = append(out, Entry{netip.AddrPortFrom(a, port), svc.Name.Proto})
		}
	}
	add(svc.ClusterIP, svc.Port)
	for _, a := range slices.Concat(svc.ExternalIPs, svc.LoadBalancerIPs) {
		add(a, svc.Port)
	}
	if svc.NodePort != 0 {
		for _, a := range local {
			if !a.IsLinkLocalUnicast() {
				add(a.Unmap(), svc.NodePort)
			}
		}
	}
	return out
}

// The names of what is ours. Sets end in 4 or 6.
const (
	chain   = "KPTRACE-PATH"
	setTo   = "kptrace-to"
	setFrom = "kptrace-from"
	hashes  = "kptrace"
)

// Owns reports whether a chain is ours.
func Owns(table, name string) bool {
	return table == "raw" && name == chain || table == xtables.EarlyTable
}

// rules writes our chain and the jumps to it, without the chains' names, for the
// suffix "4" or "6".
func rules(suffix string, packets, rate, burst int) (body, jumps []string) {
	limit := "-m limit --limit " + itoa(rate) + "/sec --limit-burst " + itoa(burst)
	first := func(n int) string {
		return "-m hashlimit --hashlimit-upto 1/hour --hashlimit-burst " + itoa(n) +
			" --hashlimit-mode srcip,srcport,dstip,dstport --hashlimit-name " + hashes + suffix + " --hashlimit-htable-expire 600000"
	}
	to := "-m set --match-set " + setTo + suffix + " dst,dst"
	from := "-m set --match-set " + setFrom + suffix + " src,src"
	jump := `-m comment --comment "kptrace: paths that somebody follows" -j ` + chain
	switch packets {
	case 1:
		flags := "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK "
		jumps = []string{
			join(flags+"SYN", to, jump), join(flags+"SYN,ACK", from, jump),
			join("! -p tcp", to, jump), join("! -p tcp", from, jump),
		}
		body = []string{join("-p tcp", limit, "-j TRACE"), join("! -p tcp", first(1), limit, "-j TRACE")}
	case trace.AllPackets:
		jumps = []string{join(to, jump), join(from, jump)}
		body = []string{join(limit, "-j TRACE")}
	default:
		jumps = []string{join(to, jump), join(from, jump)}
		body = []string{join(first(packets), limit, "-j TRACE")}
	}
	return body, jumps
}

func itoa(n int) string { return strconv.Itoa(n) }

func join(words ...string) string { return strings.Join(words, " ") }
