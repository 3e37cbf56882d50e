package wire

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"golang.org/x/net/bpf"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// packet builds one with gopacket.
func packet(t testing.TB, src, dst string, proto conntrack.Proto, syn bool) []byte {
	t.Helper()
	from, to := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	eth := &layers.Ethernet{SrcMAC: make([]byte, 6), DstMAC: make([]byte, 6), EthernetType: layers.EthernetTypeIPv4}
	var ip gopacket.SerializableLayer
	var network gopacket.NetworkLayer
	if from.Addr().Is4() {
		l := &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Id: 77, Protocol: layers.IPProtocol(proto), SrcIP: from.Addr().AsSlice(), DstIP: to.Addr().AsSlice()}
		ip, network = l, l
	} else {
		eth.EthernetType = layers.EthernetTypeIPv6
		l := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocol(proto), SrcIP: from.Addr().AsSlice(), DstIP: to.Addr().AsSlice()}
		ip, network = l, l
	}
	var transport gopacket.SerializableLayer
	if proto == conntrack.TCP {
		l := &layers.TCP{SrcPort: layers.TCPPort(from.Port()), DstPort: layers.TCPPort(to.Port()), SYN: syn, ACK: !syn, Seq: 1234}
		if err := l.SetNetworkLayerForChecksum(network); err != nil {
			t.Fatal(err)
		}
		transport = l
	} else {
		l := &layers.UDP{SrcPort: layers.UDPPort(from.Port()), DstPort: layers.UDPPort(to.Port())}
		if err := l.SetNetworkLayerForChecksum(network); err != nil {
			t.Fatal(err)
		}
		transport = l
	}
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, transport, gopacket.Payload("hello")); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestFilter(t *testing.T) {
	ports := []uint16{80, 8080, 53}
	many := make([]uint16, maxPorts)
	for i := range many {
		many[i] = uint16(1000 + i)
	}
	for _, c := range []struct {
		name     string
		ports    []uint16
		all      bool
		src, dst string
		proto    conntrack.Proto
		syn      bool
		want     bool
	}{
		{"a SYN to a service", ports, false, "10.9.0.2:40000", "10.96.0.10:80", conntrack.TCP, true, true},
		{"an answer's port", ports, false, "10.1.0.2:8080", "10.9.0.2:40000", conntrack.TCP, true, true},
		{"the last port", ports, false, "10.9.0.2:40000", "10.96.0.10:53", conntrack.UDP, false, true},
		{"data", ports, false, "10.9.0.2:40000", "10.96.0.10:80", conntrack.TCP, false, false},
		{"data, all wanted", ports, true, "10.9.0.2:40000", "10.96.0.10:80", conntrack.TCP, false, true},
		{"another port", ports, false, "10.9.0.2:40000", "10.96.0.10:81", conntrack.TCP, true, false},
		{"IPv6", ports, false, "[fd00::2]:40000", "[fd00::10]:80", conntrack.TCP, true, true},
		{"IPv6, another port", ports, false, "[fd00::2]:40000", "[fd00::10]:443", conntrack.TCP, true, false},
		{"IPv6 UDP", ports, false, "[fd00::2]:40000", "[fd00::10]:53", conntrack.UDP, false, true},
		{"ICMP", ports, false, "10.9.0.2:40000", "10.96.0.10:80", conntrack.ICMP, false, false},
		{"no ports: any", nil, false, "10.9.0.2:40000", "10.96.0.10:4711", conntrack.TCP, true, true},
		{"many ports, first", many, false, "10.9.0.2:1000", "10.96.0.10:4711", conntrack.TCP, true, true},
		{"many ports, last", many, false, "10.9.0.2:4711", "10.96.0.10:1059", conntrack.TCP, true, true},
		{"many ports, none", many, false, "10.9.0.2:4711", "10.96.0.10:1060", conntrack.TCP, true, false},
		{"too many: any", append(many, 1), false, "10.9.0.2:4711", "10.96.0.10:1060", conntrack.TCP, true, true},
	} {
		raw, err := filter(c.ports, c.all)
		if err != nil {
			t.Fatal(err)
		}
		prog, ok := bpf.Disassemble(raw)
		if !ok {
			t.Fatal("the program cannot be taken apart")
		}
		vm, err := bpf.NewVM(prog)
		if err != nil {
			t.Fatal(err)
		}
		n, err := vm.Run(packet(t, c.src, c.dst, c.proto, c.syn))
		if err != nil || (n > 0) != c.want {
			t.Errorf("%s: passes %v (%v), want %v", c.name, n > 0, err, c.want)
		}
	}
}

func TestDecode(t *testing.T) {
	data := appendRecord(nil, 7, 1234567890, packet(t, "10.9.0.2:40000", "10.96.0.10:80", conntrack.TCP, true))
	data = appendRecord(data, 8, 1234567891, make([]byte, 60)) // not IP
	data = appendRecord(data, 9, 1234567892, packet(t, "[fd00::2]:40000", "[fd00::10]:53", conntrack.UDP, false))
	d := NewDecoder()
	got := d.Decode(trace.Frame{Data: data}, nil)
	if len(got) != 2 || got[0].Device != 7 || got[0].Time != 1234567890 || got[0].Packet.Name() != "SYN" ||
		got[0].Packet.Seq != 1234 || got[0].Packet.IPID != 77 || got[0].Packet.TTL != 64 ||
		got[0].Packet.Tuple.String() != "tcp 10.9.0.2:40000 > 10.96.0.10:80" {
		t.Errorf("got %+v", got)
	}
	if len(got) == 2 && (got[1].Device != 9 || got[1].Packet.Tuple.Dst() != netip.MustParseAddrPort("[fd00::10]:53") || got[1].Packet.Head == 0) {
		t.Errorf("got %+v", got[1])
	}
	if s := d.Stats(); s.Events != 2 || s.Foreign != 1 || s.Damaged != 0 {
		t.Errorf("stats %+v", s)
	}
	if got := d.Decode(trace.Frame{Data: data[:len(data)-1]}, nil); len(got) != 1 || d.Stats().Damaged != 1 {
		t.Errorf("cut off: %d packets, stats %+v", len(got), d.Stats())
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(appendRecord(nil, 7, 1, packet(f, "10.9.0.2:40000", "10.96.0.10:80", conntrack.TCP, true)))
	f.Add(appendRecord(appendRecord(nil, 7, 1, nil), 8, 2, packet(f, "[fd00::2]:40000", "[fd00::10]:53", conntrack.UDP, false)))
	f.Add(binary.BigEndian.AppendUint32(nil, 1<<31))
	f.Fuzz(func(_ *testing.T, data []byte) { NewDecoder().Decode(trace.Frame{Data: data}, nil) })
}
