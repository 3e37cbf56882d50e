package ipvs

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strconv"
	"sync/atomic"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// Decoder makes events of the text of the two tables (net/netfilter/ipvs/
// ip_vs_ctl.c and ip_vs_conn.c).
type Decoder struct {
	events, foreign, damaged atomic.Uint64
}

// DecoderStats counts a Decoder's work.
type DecoderStats struct {
	// Events counts what came out, Foreign lines about other protocols than
	// TCP, UDP and SCTP, and Damaged those that could not be read.
	Events, Foreign, Damaged uint64
}

// NewDecoder returns a Decoder.
func NewDecoder() *Decoder { return new(Decoder) }

// Stats may be called from anywhere.
func (d *Decoder) Stats() DecoderStats {
	return DecoderStats{d.events.Load(), d.foreign.Load(), d.damaged.Load()}
}

var (
	serversHead     = []byte("IP Virtual Server version")
	connectionsHead = []byte("Pro FromIP")
)

// Decode appends the events of one table to into: a KindServer for each
// server, or a KindTemplate and a KindState for each template and connection.
func (d *Decoder) Decode(f trace.Frame, into []trace.Event) []trace.Event {
	before := len(into)
	switch {
	case bytes.HasPrefix(f.Data, serversHead):
		into = d.servers(f, into)
	case bytes.HasPrefix(f.Data, connectionsHead):
		into = d.connections(f, into)
	default:
		d.damaged.Add(1)
	}
	d.events.Add(uint64(len(into) - before))
	return into
}

// lines calls line with the fields of each line after the first. What a bounded
// read cut off at the end is left out.
func lines(data []byte, line func(fields [][]byte)) {
	_, data, _ = bytes.Cut(data, []byte("\n"))
	var fields [12][]byte
	for {
		one, rest, ok := bytes.Cut(data, []byte("\n"))
		if !ok {
			return
		}
		data = rest
		n := 0
		for n < len(fields) {
			one = bytes.TrimLeft(one, " ")
			if len(one) == 0 {
				break
			}
			end := bytes.IndexByte(one, ' ')
			if end < 0 {
				end = len(one)
			}
			fields[n], one = one[:end], one[end:]
			n++
		}
		if n > 0 {
			line(fields[:n])
		}
	}
}

// servers reads
//
//	TCP  0A60000A:0050 lc persistent 60 FFFFFFFF
//	  -> 0A010003:1F90      Masq    1      5          0
func (d *Decoder) servers(f trace.Frame, into []trace.Event) []trace.Event {
	var virtual netip.AddrPort
	var proto conntrack.Proto
	lines(f.Data, func(w [][]byte) {
		switch first := string(w[0]); first {
		case "Prot":
			return
		case "->":
			if len(w) == 6 && proto != 0 {
				server, ok := hexAddrPort(w[1])
				weight, ok1 := number(w[3])
				active, ok2 := number(w[4])
				inactive, ok3 := number(w[5])
				if !ok || !ok1 || !ok2 || !ok3 || server.Addr().Is4() != virtual.Addr().Is4() {
					d.damaged.Add(1)
					return
				}
				into = append(into, trace.Event{
					Kind: trace.KindServer, Source: trace.IPVS, Time: f.Time,
					Tuple: conntrack.NewTuple(proto, server, virtual),
					IPVS:  trace.IPVSSample{Active: active, Inactive: inactive, Weight: weight, Method: method(w[2])},
				})
				return
			}
			if string(w[1%len(w)]) != "RemoteAddress:Port" && proto != 0 {
				d.damaged.Add(1)
			}
		default:
			proto = protocol(first)
			if proto == 0 {
				d.foreign.Add(1) // a firewall mark's, or another protocol's
				return
			}
			var ok bool
			if len(w) > 1 {
				virtual, ok = hexAddrPort(w[1])
			}
			if !ok {
				d.damaged.Add(1)
				proto = 0
			}
		}
	})
	return into
}

// connections reads
//
//	TCP 0A090002 97C0 0A60000A 0050 0A010003 1F90 ESTABLISHED     899
func (d *Decoder) connections(f trace.Frame, into []trace.Event) []trace.Event {
	lines(f.Data, func(w [][]byte) {
		proto := protocol(string(w[0]))
		if proto == 0 {
			d.foreign.Add(1)
			return
		}
		if len(w) < 9 {
			d.damaged.Add(1)
			return
		}
		client, ok := hexEnd(w[1], w[2])
		virtual, ok1 := hexEnd(w[3], w[4])
		server, ok2 := hexEnd(w[5], w[6])
		left, ok3 := number(w[8])
		if !ok || !ok1 || !ok2 || !ok3 || client.Addr().Is4() != virtual.Addr().Is4() || server.Addr().Is4() != client.Addr().Is4() {
			d.damaged.Add(1)
			return
		}
		e := trace.Event{
			Kind: trace.KindState, Source: trace.IPVS, Time: f.Time,
			Tuple: conntrack.NewTuple(proto, client, virtual), Reply: conntrack.NewTuple(proto, server, client),
			IPVS: trace.IPVSSample{Left: left, State: trace.ParseIPVSState(w[7])},
		}
		if client.Port() == 0 {
			// One that lost its server has ports of 65535 and serves nobody.
			e.Kind = trace.KindTemplate
		}
		into = append(into, e)
	})
	return into
}

func protocol(word string) conntrack.Proto {
	switch word {
	case "TCP":
		return conntrack.TCP
	case "UDP":
		return conntrack.UDP
	case "SCTP":
		return conntrack.SCTP
	}
	return 0
}

func method(word []byte) trace.Forwarding {
	switch string(word) {
	case "Masq":
		return trace.ForwardNAT
	case "Local":
		return trace.ForwardLocal
	case "Tunnel":
		return trace.ForwardTunnel
	case "Route":
		return trace.ForwardDirect
	}
	return trace.ForwardUnknown
}

// hexAddrPort reads 0A60000A:0050, or [2001:0db8:…]:0050.
func hexAddrPort(b []byte) (netip.AddrPort, bool) {
	i := bytes.LastIndexByte(b, ':')
	if i < 0 {
		return netip.AddrPort{}, false
	}
	return hexEnd(bytes.Trim(b[:i], "[]"), b[i+1:])
}

// hexEnd reads an address and a port. IPv4 is eight hexadecimal digits.
func hexEnd(a, port []byte) (netip.AddrPort, bool) {
	p, err := strconv.ParseUint(string(port), 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	if len(a) == 8 && bytes.IndexByte(a, ':') < 0 {
		n, err := strconv.ParseUint(string(a), 16, 32)
		if err != nil {
			return netip.AddrPort{}, false
		}
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(n))
		return netip.AddrPortFrom(netip.AddrFrom4(b), uint16(p)), true
	}
	addr, err := netip.ParseAddr(string(a))
	if err != nil || !addr.Is6() || addr.Zone() != "" {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(addr, uint16(p)), true
}

func number(b []byte) (uint32, bool) {
	n, err := strconv.ParseUint(string(b), 10, 32)
	return uint32(n), err == nil
}
