package drop

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// offsets are where things are in this kernel's structures.
type offsets struct {
	skbDev, skbSk, skbHead, skbNetwork, devNet, sockNet, netInum int16
}

// layout reads the offsets from the kernel's BTF.
func layout(spec *btf.Spec) (o offsets, err error) {
	for _, m := range []struct {
		into *int16
		in   string
		path []string
	}{
		{&o.skbDev, "sk_buff", []string{"dev"}}, {&o.skbSk, "sk_buff", []string{"sk"}},
		{&o.skbHead, "sk_buff", []string{"head"}}, {&o.skbNetwork, "sk_buff", []string{"network_header"}},
		{&o.devNet, "net_device", []string{"nd_net"}},
		{&o.sockNet, "sock", []string{"__sk_common", "skc_net"}},
		{&o.netInum, "net", []string{"ns", "inum"}},
	} {
		var s *btf.Struct
		if err := spec.TypeByName(m.in, &s); err != nil {
			return o, fmt.Errorf("drop: this kernel's BTF has no %s: %w", m.in, err)
		}
		var t btf.Type = s
		total := 0
		for _, name := range m.path {
			next, at, ok := member(t, name)
			if !ok {
				return o, fmt.Errorf("drop: this kernel's %s has no %s", m.in, name)
			}
			t, total = next, total+at
		}
		*m.into = int16(total)
	}
	return o, nil
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
		asm.Mov.Imm(asm.R2, recordLen),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnRingbufReserve.Call(),
		asm.JEq.Imm(asm.R0, 0, "full"),
		asm.Mov.Reg(asm.R9, asm.R0),
		asm.StoreMem(asm.R9, 0, asm.R8, asm.DWord),
		asm.FnKtimeGetNs.Call(),
		asm.StoreMem(asm.R9, 8, asm.R0, asm.DWord),
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
		// No room: count it.
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
	return append(append(first, ours...), write...)
}
