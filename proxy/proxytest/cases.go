package proxytest

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// Setup is what a mode is given.
type Setup struct {
	Snapshot *proxy.Snapshot
	Overlay  proxy.Overlay
	// ClusterCIDR is the local detector, invalid for none. Node ports are
	// served on localhost where a mode can.
	ClusterCIDR   netip.Prefix
	MasqueradeAll bool
}

// Case is a Setup and the packets to send in it.
type Case struct {
	Name  string
	Setup Setup
	Rows  []Row
}

// Row is one packet and what must become of it.
type Row struct {
	From  Source
	Proto conntrack.Proto
	To    netip.AddrPort
	Want  Want
}

// Name says what the row sends.
func (r Row) Name() string {
	return string(r.From) + " to " + r.Proto.String() + " " + r.To.String()
}

// Packet is the row's packet.
func (r Row) Packet() proxy.Packet {
	return proxy.Packet{Proto: r.Proto, Src: netip.AddrPortFrom(r.Client(), 40000), Dst: r.To, FromNode: r.From == FromNode}
}

// Client is the address the packet comes from.
func (r Row) Client() netip.Addr {
	if r.To.Addr().Is6() {
		return In6(r.From.Addr())
	}
	return r.From.Addr()
}

// Want is what becomes of a packet.
type Want struct {
	Verdict proxy.Verdict
	// Service is the name as PortName prints it, empty for verdict Pass.
	Service string
	Via     proxy.Via
	// Endpoints are all that can be reached, each as likely as the others.
	Endpoints []netip.AddrPort
	// Masquerade is the reason for all endpoints; see MasqueradeOf.
	Masquerade string
	Policy     string
	Excluded   proxy.Excluded
	Affinity   time.Duration
	Reason     string
}

// MasqueradeOf is the reason why a packet to ep is masqueraded.
func (r Row) MasqueradeOf(ep netip.AddrPort) string {
	if r.Want.Masquerade == "" && ep.Addr() == r.Client() {
		return "hairpin"
	}
	return r.Want.Masquerade
}

// parse reads rows of the form
//
//	from proto destination = verdict [service via] [endpoint...] [key=value...]
//
// Endpoints are source:port; the keys are masq, policy, reason, affinity and
// excluded (such as notready=1).
func parse(text string) []Row {
	var rows []Row
	for l := range strings.Lines(text) {
		f := strings.Fields(l)
		if len(f) == 0 {
			continue
		}
		proto, err := conntrack.ParseProto(f[1])
		if err != nil {
			panic(err)
		}
		row := Row{From: Source(f[0]), Proto: proto, To: netip.MustParseAddrPort(f[2])}
		w := &row.Want
		w.Verdict = map[string]proxy.Verdict{"pass": proxy.Pass, "forward": proxy.Forward,
			"reject": proxy.Reject, "drop": proxy.Drop}[f[4]]
		if w.Verdict == proxy.Pass {
			rows = append(rows, row)
			continue
		}
		w.Service, w.Via, w.Policy = f[5], proxy.Via(f[6]), proxy.PolicyCluster
		for _, word := range f[7:] {
			key, value, option := strings.Cut(word, "=")
			switch {
			case !option:
				w.Endpoints = append(w.Endpoints, at(word))
			case key == "masq":
				w.Masquerade = value
			case key == "policy":
				w.Policy = value
			case key == "reason":
				w.Reason = value
			case key == "affinity":
				w.Affinity, err = time.ParseDuration(value)
			case key == "notready":
				w.Excluded.NotReady = int(value[0] - '0')
			case key == "terminating":
				w.Excluded.Terminating = int(value[0] - '0')
			case key == "otherzone":
				w.Excluded.OtherZone = int(value[0] - '0')
			case key == "notlocal":
				w.Excluded.NotLocal = int(value[0] - '0')
			case key == "overlay":
				w.Excluded.Overlay = int(value[0] - '0')
			default:
				panic(word)
			}
			if err != nil {
				panic(err)
			}
		}
		rows = append(rows, row)
	}
	return rows
}

// at reads "a:80" as the address of a source.
func at(s string) netip.AddrPort {
	name, port, _ := strings.Cut(s, ":")
	return netip.MustParseAddrPort(Source(name).Addr().String() + ":" + port)
}

// Services reads Services of the form
//
//	namespace/name:port proto clusterIP:port [key=value...] [endpoint[,condition...]...]
//
// Conditions are notready, terminating, dead (terminating and not serving),
// and zone=NAME.
func Services(text string) *proxy.Snapshot {
	s := &proxy.Snapshot{Node: Node()}
	for l := range strings.Lines(text) {
		f := strings.Fields(l)
		if len(f) == 0 {
			continue
		}
		ns, rest, _ := strings.Cut(f[0], "/")
		name, port, _ := strings.Cut(rest, ":")
		proto, err := conntrack.ParseProto(f[1])
		if err != nil {
			panic(err)
		}
		ip := netip.MustParseAddrPort(f[2])
		svc := proxy.Service{Name: proxy.PortName{Namespace: ns, Name: name, Port: port, Proto: proto},
			Type: "ClusterIP", ClusterIP: ip.Addr(), Port: ip.Port()}
		for _, word := range f[3:] {
			if !option(&svc, word) {
				svc.Endpoints = append(svc.Endpoints, endpoint(word))
			}
		}
		s.Services = append(s.Services, svc)
	}
	slices.SortFunc(s.Services, func(a, b proxy.Service) int { return a.Name.Compare(b.Name) })
	return s
}

func option(svc *proxy.Service, word string) bool {
	key, value, ok := strings.Cut(word, "=")
	switch {
	case strings.Contains(word, ","), !ok:
		return false
	case key == "nodeport":
		svc.Type, svc.NodePort = "NodePort", netip.MustParseAddrPort("0.0.0.0:"+value).Port()
	case key == "external":
		svc.ExternalIPs = append(svc.ExternalIPs, netip.MustParseAddr(value))
	case key == "lb":
		svc.Type, svc.LoadBalancerIPs = "LoadBalancer", append(svc.LoadBalancerIPs, netip.MustParseAddr(value))
	case key == "range":
		svc.SourceRanges = append(svc.SourceRanges, netip.MustParsePrefix(value))
	case key == "affinity":
		d, err := time.ParseDuration(value)
		if err != nil {
			panic(err)
		}
		svc.Affinity = d
	case key == "policy":
		svc.InternalLocal, svc.ExternalLocal = value == "internal", value == "external"
	default:
		panic(word)
	}
	return true
}

func endpoint(word string) proxy.Endpoint {
	f := strings.Split(word, ",")
	ep := proxy.Endpoint{Addr: at(f[0]), Ready: true, Serving: true}
	ep.Local = PodCIDR.Contains(ep.Addr.Addr())
	for _, c := range f[1:] {
		switch c {
		case "notready":
			ep.Ready, ep.Serving = false, false
		case "terminating":
			ep.Ready, ep.Terminating = false, true
		case "dead":
			ep.Ready, ep.Serving, ep.Terminating = false, false, true
		default:
			ep.ZoneHints = append(ep.ZoneHints, strings.TrimPrefix(c, "zone="))
		}
	}
	return ep
}
