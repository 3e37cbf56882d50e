package node

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// segment is a TCP packet from its IP header on.
func segment(src, dst string, flags byte, seq, ack uint32) []byte {
	s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp, s.Port())
	binary.BigEndian.PutUint16(tcp[2:], d.Port())
	binary.BigEndian.PutUint32(tcp[4:], seq)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	tcp[12], tcp[13] = 5<<4, flags
	if s.Addr().Is6() {
		ip := make([]byte, 8, 60)
		ip[0], ip[6] = 6<<4, unix.IPPROTO_TCP
		return append(append(append(ip, s.Addr().AsSlice()...), d.Addr().AsSlice()...), tcp...)
	}
	ip := make([]byte, 12, 44)
	ip[0], ip[9] = 4<<4|6, unix.IPPROTO_TCP // with an option
	ip = append(append(ip, s.Addr().AsSlice()...), d.Addr().AsSlice()...)
	return append(append(ip, 1, 1, 1, 1), tcp...)
}

// TestWitness says only of what answers the very SYN that it went past the node.
func TestWitness(t *testing.T) {
	const (
		syn, rst, ack = 0x02, 0x04, 0x10
		isn           = 0xffffffff // the next number is 0
	)
	for _, at := range []struct{ client, service, endpoint, other string }{
		{"10.244.1.10:40000", "10.96.0.10:80", "10.244.1.22:8080", "10.244.1.23:8080"},
		{"[fd00::10]:40000", "[fd01::10]:80", "[fd00::22]:8080", "[fd00::23]:8080"},
	} {
		client, endpoint := netip.MustParseAddrPort(at.client), netip.MustParseAddrPort(at.endpoint)
		flow := &trace.Flow{Backend: trace.Peer{Addr: endpoint}, Reply: conntrack.NewTuple(conntrack.TCP, endpoint, client)}
		begin := time.Unix(1000, 0)
		for _, tt := range []struct {
			name   string
			packet []byte
			leaves bool
			passes bool // the kernel's filter
			want   bool
		}{
			{"the SYN-ACK leaves untranslated", segment(at.endpoint, at.client, syn|ack, 7, 0), true, true, true},
			{"it comes in, and may be translated", segment(at.endpoint, at.client, syn|ack, 7, 0), false, true, false},
			{"it leaves, and answers another SYN", segment(at.endpoint, at.client, syn|ack, 7, 5), true, true, false},
			{"it leaves translated", segment(at.service, at.client, syn|ack, 7, 0), true, false, false},
			{"another endpoint's", segment(at.other, at.client, syn|ack, 7, 0), true, false, false},
			{"the client turns it down", segment(at.client, at.endpoint, rst, 0, 0), false, true, true},
			{"the client turns down an old one", segment(at.client, at.endpoint, rst, 5, 0), false, true, false},
			{"a translated reset leaves", segment(at.client, at.endpoint, rst, 0, 0), true, true, false},
			{"the endpoint refuses", segment(at.endpoint, at.client, rst|ack, 0, 0), false, true, false},
			{"data", segment(at.client, at.endpoint, ack, 0, 0), false, false, false},
			{"the SYN itself", segment(at.client, at.endpoint, syn, isn, 0), true, false, false},
			{"cut short", segment(at.client, at.endpoint, rst, 0, 0)[:40], false, true, false},
		} {
			x := watched{flows: map[conntrack.Tuple]awaited{}}
			if !x.add(correlate.Inquiry{Flow: flow, ISN: isn}, begin) {
				t.Fatal("not added")
			}
			prog := witnessFilter(x.endpoints)
			proto := uint32(unix.ETH_P_IP)
			if client.Addr().Is6() {
				proto = unix.ETH_P_IPV6
				if tt.name == "cut short" {
					continue // is all there
				}
			}
			prog[0] = bpf.LoadConstant{Dst: bpf.RegA, Val: proto} // what the kernel knows beside the packet
			vm, err := bpf.NewVM(prog)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := vm.Run(tt.packet); err != nil || n > 0 != tt.passes && tt.name != "cut short" {
				t.Errorf("%s, %s: filter says %d, %v", at.client, tt.name, n, err)
			}
			got, cause := x.saw(tt.packet, tt.leaves)
			if (got == flow) != tt.want || (cause != "") != tt.want {
				t.Errorf("%s, %s: got %v (%s)", at.client, tt.name, got, cause)
			}
			if again, _ := x.saw(tt.packet, tt.leaves); again != nil {
				t.Errorf("%s, %s: said twice", at.client, tt.name)
			}
		}
	}
}

// TestWitnessBounds keeps to a number of endpoints, and to a time.
func TestWitnessBounds(t *testing.T) {
	x := watched{flows: map[conntrack.Tuple]awaited{}}
	begin := time.Unix(1000, 0)
	client := netip.MustParseAddrPort("10.244.1.10:40000")
	addr := netip.MustParseAddr("10.244.2.1")
	for range 2 * witnessMost {
		ep := netip.AddrPortFrom(addr, 80)
		x.add(correlate.Inquiry{Flow: &trace.Flow{Backend: trace.Peer{Addr: ep}, Reply: conntrack.NewTuple(conntrack.TCP, ep, client)}}, begin)
		addr = addr.Next()
	}
	if len(x.flows) != witnessMost || len(x.endpoints) != witnessMost {
		t.Errorf("%d flows of %d endpoints", len(x.flows), len(x.endpoints))
	}
	if prog, err := bpf.Assemble(witnessFilter(x.endpoints)); err != nil || len(prog) > 256 {
		t.Errorf("%d instructions, %v", len(prog), err)
	}
	x.expire(begin.Add(witnessFor))
	if len(x.flows) != witnessMost {
		t.Errorf("forgotten too early: %d left", len(x.flows))
	}
	x.expire(begin.Add(witnessFor + 1))
	if len(x.flows) != 0 {
		t.Errorf("%d flows are not forgotten", len(x.flows))
	}
}
