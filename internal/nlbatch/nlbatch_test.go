package nlbatch

import (
	"bytes"
	"encoding/binary"
	"syscall"
	"testing"
)

func TestNest(t *testing.T) {
	b := Nest(nil, 7, func(b []byte) []byte { return String(Uint16(b, 1, 0x0102), 2, "abcd") })
	var want []byte
	for _, n := range []uint16{4 + 8 + 12, 7 | Nested, 6, 1, 0x0102, 0, 9, 2} {
		want = binary.NativeEndian.AppendUint16(want, n)
	}
	want = append(want, "abcd\x00\x00\x00\x00"...)
	if !bytes.Equal(b, want) {
		t.Errorf("got  %x\nwant %x", b, want)
	}
}

func FuzzAnswers(f *testing.F) {
	ok := make([]byte, 36)
	binary.NativeEndian.PutUint32(ok, 36)
	binary.NativeEndian.PutUint16(ok[4:], typeError)
	binary.NativeEndian.PutUint32(ok[8:], 9)
	f.Add(ok)
	f.Add(ok[:19])
	f.Fuzz(func(t *testing.T, b []byte) {
		seen := 0
		if err := answers(b, func(uint32, syscall.Errno) { seen++ }); err == nil && seen*headerLen > len(b) {
			t.Errorf("%d answers in %d bytes", seen, len(b))
		}
	})
}
