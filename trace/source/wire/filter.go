package wire

import (
	"fmt"

	"golang.org/x/net/bpf"
)

// maxPorts is how many ports a filter tells; with more, all ports pass.
const maxPorts = 60

// Offsets from the beginning of an Ethernet frame, or from an IP header's end
// less the IP header.
const (
	offProto4  = etherLen + 9
	offFrag4   = etherLen + 6
	offProto6  = etherLen + 6
	offSource  = etherLen
	offDest    = etherLen + 2
	offTCPFlag = etherLen + 13
)

// filter assembles a program that lets through TCP packets with the SYN flag (all
// where allPackets) and UDP and SCTP packets, if one of their ports is in ports.
func filter(ports []uint16, allPackets bool) ([]bpf.RawInstruction, error) {
	if len(ports) > maxPorts {
		ports = nil
	}
	// The last two instructions are: reject, accept.
	var tail []bpf.Instruction
	if len(ports) > 0 {
		n := len(ports)
		tail = append(tail, bpf.LoadIndirect{Off: offSource, Size: 2})
		for i, p := range ports {
			left := n - 1 - i + 1 + n // compares of this list, a load, and the other list
			tail = append(tail, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(p), SkipTrue: uint8(left + 1)})
		}
		tail = append(tail, bpf.LoadIndirect{Off: offDest, Size: 2})
		for i, p := range ports {
			tail = append(tail, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(p), SkipTrue: uint8(n - 1 - i + 1)})
		}
		tail = append(tail, bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: captureLen})
	} else {
		tail = append(tail, bpf.RetConstant{Val: captureLen})
	}
	reject := bpf.RetConstant{Val: 0}
	var syn []bpf.Instruction
	if !allPackets {
		syn = []bpf.Instruction{
			bpf.LoadIndirect{Off: offTCPFlag, Size: 1},
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 2, SkipTrue: 1},
			reject,
		}
	}
	prog := []bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: etherIPv6, SkipTrue: 7},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: etherIPv4, SkipTrue: 1},
		reject,
		// IPv4: not a later fragment; X is the header's length.
		bpf.LoadAbsolute{Off: offFrag4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff, SkipTrue: 8},
		bpf.LoadMemShift{Off: etherLen},
		bpf.LoadAbsolute{Off: offProto4, Size: 1},
		bpf.Jump{Skip: 2},
		// IPv6 without extension headers.
		bpf.LoadConstant{Dst: bpf.RegX, Val: 40},
		bpf.LoadAbsolute{Off: offProto6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 6, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 17, SkipTrue: uint8(2 + len(syn))},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 132, SkipTrue: uint8(1 + len(syn))},
		reject,
	}
	prog = append(prog, syn...)
	raw, err := bpf.Assemble(append(prog, tail...))
	if err != nil {
		return nil, fmt.Errorf("wire: assembling a filter: %w", err)
	}
	return raw, nil
}

// captureLen is what is read of each packet: an Ethernet header, an IPv6 header
// and the transport's.
const captureLen = 128
