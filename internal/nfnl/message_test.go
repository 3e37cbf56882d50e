package nfnl

import (
	"bytes"
	"testing"
)

func sample() []byte {
	inner := AppendAttr(nil, 1, 10, 0, 0, 1)
	attrs := AppendAttr(nil, 5|1<<15, inner...)
	attrs = AppendAttr(attrs, 6, 0xab)
	data := AppendMessage(nil, Type(SubsysULog, 0), FlagCreate, 7, FamilyIPv4, 100, attrs)
	data = append(data, 16, 0, 0, 0, typeDone, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	return AppendMessage(data, Type(SubsysConntrack, 2), 0, 8, FamilyIPv6, 0, nil)
}

func TestMessages(t *testing.T) {
	m := NewMessages(sample())
	if !m.Next() || m.Type != 0x400 || m.Flags != FlagCreate || m.Seq != 7 || m.Family != FamilyIPv4 || m.ResID != 100 {
		t.Fatalf("first message %+v", m)
	}
	a := m.Attrs()
	if !a.Next() || a.Type != 5 {
		t.Fatalf("first attribute %+v", a)
	}
	in := NewAttrs(a.Data)
	if !in.Next() || in.Type != 1 || in.Uint32() != 0x0a000001 || in.Uint16() != 0x0a00 || in.Uint64() != 0 || in.Next() || in.Damaged() {
		t.Errorf("nested attribute %+v", in)
	}
	if !a.Next() || a.Type != 6 || a.Uint8() != 0xab || a.Uint16() != 0 || a.Next() || a.Damaged() {
		t.Errorf("second attribute %+v", a)
	}
	if !m.Next() || m.Type != 0x102 || m.Family != FamilyIPv6 {
		t.Errorf("the end of a batch was not passed over: %+v", m)
	}
	if m.Next() || m.Damaged() {
		t.Errorf("after the last message: %+v", m)
	}
}

func TestDamaged(t *testing.T) {
	whole := sample()
	for cut := 1; cut < len(whole); cut++ {
		messages, damaged := 0, false
		m := NewMessages(whole[:cut])
		for m.Next() {
			messages++
		}
		damaged = m.Damaged()
		// Cut between two messages it is just shorter.
		if boundary := cut == 40 || cut == 56; damaged == boundary {
			t.Errorf("cut at %d: %d messages, damaged %v", cut, messages, damaged)
		}
	}
}

func FuzzMessages(f *testing.F) {
	f.Add(sample())
	f.Fuzz(func(t *testing.T, data []byte) {
		total := 0
		for m := NewMessages(data); m.Next(); {
			for a := m.Attrs(); a.Next(); {
				total += 4 + len(a.Data)
				if !bytes.Contains(data, a.Data) {
					t.Error("an attribute from nowhere")
				}
			}
		}
		if total > len(data) {
			t.Errorf("%d bytes of attributes in %d", total, len(data))
		}
	})
}

func TestIterationDoesNotAllocate(t *testing.T) {
	data := sample()
	if n := testing.AllocsPerRun(100, func() {
		for m := NewMessages(data); m.Next(); {
			for a := m.Attrs(); a.Next(); {
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
