package drop

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// offsets are where things are in this kernel's structures.
type offsets struct {
	skbDev, skbSk, skbHead, skbNetwork, devNet, devIndex, sockNet, netInum int16
}

// sockOffsets are those of a TCP socket and of a segment in its queue.
type sockOffsets struct {
	family, state, port, peerPort, addr, peerAddr, addr6, peerAddr6, seq int16
}

// place says into which field the offset of a member goes. It may be missing where
// the kernel is built without it.
type place struct {
	into *int16
	in   string
	path []string
	lax  bool
}

// layout reads the offsets from the kernel's BTF.
func layout(spec *btf.Spec) (o offsets, err error) {
	return o, find(spec, []place{
		{into: &o.skbDev, in: "sk_buff", path: []string{"dev"}}, {into: &o.skbSk, in: "sk_buff", path: []string{"sk"}},
		{into: &o.skbHead, in: "sk_buff", path: []string{"head"}}, {into: &o.skbNetwork, in: "sk_buff", path: []string{"network_header"}},
		{into: &o.devNet, in: "net_device", path: []string{"nd_net"}}, {into: &o.devIndex, in: "net_device", path: []string{"ifindex"}},
		{into: &o.sockNet, in: "sock", path: []string{"__sk_common", "skc_net"}},
		{into: &o.netInum, in: "net", path: []string{"ns", "inum"}},
	})
}

// sockLayout reads those of sockets.
func sockLayout(spec *btf.Spec) (o sockOffsets, err error) {
	sock := func(into *int16, name string, lax bool) place {
		return place{into: into, in: "sock", path: []string{"__sk_common", name}, lax: lax}
	}
	var cb, seq int16
	err = find(spec, []place{
		sock(&o.family, "skc_family", false), sock(&o.state, "skc_state", false), sock(&o.port, "skc_num", false),
		sock(&o.peerPort, "skc_dport", false), sock(&o.addr, "skc_rcv_saddr", false), sock(&o.peerAddr, "skc_daddr", false),
		sock(&o.addr6, "skc_v6_rcv_saddr", true), sock(&o.peerAddr6, "skc_v6_daddr", true),
		{into: &cb, in: "sk_buff", path: []string{"cb"}}, {into: &seq, in: "tcp_skb_cb", path: []string{"seq"}},
	})
	o.seq = cb + seq
	return o, err
}

// find looks up offsets; those that are missing and may be become -1.
func find(spec *btf.Spec, places []place) error {
	for _, m := range places {
		var s *btf.Struct
		if err := spec.TypeByName(m.in, &s); err != nil {
			return fmt.Errorf("drop: this kernel's BTF has no %s: %w", m.in, err)
		}
		var t btf.Type = s
		total := 0
		for _, name := range m.path {
			next, at, ok := member(t, name)
			switch {
			case !ok && m.lax:
				next, at, total = t, -1, 0
			case !ok:
				return fmt.Errorf("drop: this kernel's %s has no %s", m.in, name)
			}
			t, total = next, total+at
		}
		*m.into = int16(total)
	}
	return nil
}

// member finds a member of a struct or union, also in its anonymous ones, and its
// offset in bytes.
func member(t btf.Type, name string) (of btf.Type, at int, ok bool) {
	var members []btf.Member
	switch s := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		members = s.Members
	case *btf.Union:
		members = s.Members
	default:
		return nil, 0, false
	}
	for _, m := range members {
		if m.Name == name {
			return m.Type, int(m.Offset.Bytes()), true
		}
		if m.Name == "" {
			if of, at, ok := member(m.Type, name); ok {
				return of, int(m.Offset.Bytes()) + at, true
			}
		}
	}
	return nil, 0, false
}

// consumed is the highest reason that is no loss: the packet was used up.
const consumed = 1

// rawLen is the length of what a program writes: a record with the place in the
// kernel's code in 64 bits where the function's name goes, 8 bytes aligned.
const (
	rawLen  = placeAt + 8
	placeAt = nameAt + 4
)

// program assembles the one for kfree_skb, whose arguments are the packet, the
// place in the kernel's code, and the reason.
func program(o *offsets, inum uint32, ring, lost *ebpf.Map) asm.Instructions {
	first := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, 0, asm.DWord),
		asm.LoadMem(asm.R8, asm.R6, 16, asm.DWord),
		asm.JLE.Imm(asm.R8, consumed, "exit"),
	}
	ours := asm.Instructions{ // R2 is the number of the packet's namespace
		asm.LoadMem(asm.R1, asm.R7, o.skbDev, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "socket"),
		asm.LoadMem(asm.R1, asm.R1, o.devNet, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "exit"),
		asm.LoadMem(asm.R2, asm.R1, o.netInum, asm.Word),
		asm.Ja.Label("compare"),
		asm.LoadMem(asm.R1, asm.R7, o.skbSk, asm.DWord).WithSymbol("socket"),
		asm.JEq.Imm(asm.R1, 0, "exit"),
		asm.LoadMem(asm.R1, asm.R1, o.sockNet, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "exit"),
		asm.LoadMem(asm.R2, asm.R1, o.netInum, asm.Word),
		asm.LoadImm(asm.R3, int64(inum), asm.DWord).WithSymbol("compare"),
		asm.JNE.Reg(asm.R2, asm.R3, "exit"),
	}
	write := asm.Instructions{
		asm.LoadMapPtr(asm.R1, ring.FD()),
		asm.Mov.Imm(asm.R2, rawLen),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "full"),
		asm.Mov.Reg(asm.R9, asm.R0),
		asm.StoreMem(asm.R9, 0, asm.R8, asm.DWord),
		asm.FnKtimeGetNs.Call(),
		asm.StoreMem(asm.R9, 8, asm.R0, asm.DWord),
		asm.LoadMem(asm.R1, asm.R6, 8, asm.DWord),
		asm.StoreMem(asm.R9, placeAt, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R2, 0),
		asm.LoadMem(asm.R1, asm.R7, o.skbDev, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "nodevice"),
		asm.LoadMem(asm.R2, asm.R1, o.devIndex, asm.Word),
		asm.StoreMem(asm.R9, deviceAt, asm.R2, asm.Word).WithSymbol("nodevice"),
		asm.LoadMem(asm.R3, asm.R7, o.skbHead, asm.DWord),
		asm.LoadMem(asm.R4, asm.R7, o.skbNetwork, asm.Half),
		asm.Add.Reg(asm.R3, asm.R4),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.Add.Imm(asm.R1, 16),
		asm.Mov.Imm(asm.R2, packetLen),
		asm.FnProbeReadKernel.Call(),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRingbufSubmit.Call(),
		asm.Ja.Label("exit"),
	}
	return append(append(append(first, ours...), write...), full(lost)...)
}

// full counts a record for which there was no room, and ends the program.
func full(lost *ebpf.Map) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word).WithSymbol("full"),
		asm.LoadMapPtr(asm.R1, lost.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "exit"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("exit"),
		asm.Return(),
	}
}

// What a program tells of a socket, in place of the packet.
const (
	sockFamily   = packetAt
	sockState    = packetAt + 2
	sockPort     = packetAt + 4
	sockPeerPort = packetAt + 6
	sockAddr     = packetAt + 8
	sockPeerAddr = packetAt + 12
	sockAddr6    = packetAt + 16
	sockPeer6    = packetAt + 32
	sockSeq      = packetAt + 48
)

// resent assembles the one for tcp_retransmit_skb, whose arguments are the socket and
// the segment, which has no headers yet.
func resent(o *offsets, so *sockOffsets, inum uint32, ring, lost *ebpf.Map) asm.Instructions {
	prog := asm.Instructions{
		asm.LoadMem(asm.R7, asm.R1, 0, asm.DWord),
		asm.LoadMem(asm.R8, asm.R1, 8, asm.DWord),
		asm.LoadMem(asm.R1, asm.R7, o.sockNet, asm.DWord),
		asm.JEq.Imm(asm.R1, 0, "exit"),
		asm.LoadMem(asm.R2, asm.R1, o.netInum, asm.Word),
		asm.LoadImm(asm.R3, int64(inum), asm.DWord),
		asm.JNE.Reg(asm.R2, asm.R3, "exit"),
		asm.LoadMapPtr(asm.R1, ring.FD()),
		asm.Mov.Imm(asm.R2, rawLen),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "full"),
		asm.Mov.Reg(asm.R9, asm.R0),
		asm.LoadImm(asm.R1, kindResend<<32, asm.DWord),
		asm.StoreMem(asm.R9, 0, asm.R1, asm.DWord),
		asm.FnKtimeGetNs.Call(),
		asm.StoreMem(asm.R9, 8, asm.R0, asm.DWord),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.R9, deviceAt, asm.R1, asm.Word),
		asm.StoreMem(asm.R9, placeAt, asm.R1, asm.DWord),
	}
	for _, f := range []struct {
		from, to int16
		size     asm.Size
	}{
		{so.family, sockFamily, asm.Half}, {so.state, sockState, asm.Byte}, {so.port, sockPort, asm.Half},
		{so.peerPort, sockPeerPort, asm.Half}, {so.addr, sockAddr, asm.Word}, {so.peerAddr, sockPeerAddr, asm.Word},
	} {
		prog = append(prog, asm.LoadMem(asm.R1, asm.R7, f.from, f.size), asm.StoreMem(asm.R9, f.to, asm.R1, f.size))
	}
	for _, f := range []struct {
		of             asm.Register
		from, to, size int16
	}{{asm.R7, so.addr6, sockAddr6, 16}, {asm.R7, so.peerAddr6, sockPeer6, 16}, {asm.R8, so.seq, sockSeq, 4}} {
		if f.from < 0 {
			continue
		}
		prog = append(prog,
			asm.Mov.Reg(asm.R1, asm.R9), asm.Add.Imm(asm.R1, int32(f.to)),
			asm.Mov.Imm(asm.R2, int32(f.size)),
			asm.Mov.Reg(asm.R3, f.of), asm.Add.Imm(asm.R3, int32(f.from)),
			asm.FnProbeReadKernel.Call())
	}
	prog = append(prog, asm.Mov.Reg(asm.R1, asm.R9), asm.Mov.Imm(asm.R2, 0), asm.FnRingbufSubmit.Call(), asm.Ja.Label("exit"))
	return append(prog, full(lost)...)
}
