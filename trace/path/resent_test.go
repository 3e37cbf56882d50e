package path

import (
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// TestResent tells the SYN that this node's TCP sent again from the one before it, and
// from one that passes through with the same numbers.
func TestResent(t *testing.T) {
	w := newWorld(t)
	first := header("10.9.0.2:40000", "10.96.0.10:80", 64, syn, 1000, 0)
	again := *first
	again.IPID++
	told := func(begun int64) {
		w.now = begun
		w.j.Resent(&trace.Resend{Time: begun, Tuple: first.Tuple, Seq: first.Seq, Opening: true})
	}
	out := func(id uint32, p *trace.PacketHeader, chain string) {
		in := uint32(2)
		if chain == "OUTPUT" {
			in = 0
		}
		w.nft(id, "nat", chain, "policy", 0, p, in, 0)
	}
	begun := w.now
	out(1, first, "OUTPUT")
	w.now = begun + int64(time.Second)
	out(2, &again, "OUTPUT")
	told(w.now + int64(time.Microsecond))
	other := *first
	other.IPID += 2
	w.now += int64(time.Second)
	out(3, &other, "PREROUTING")
	told(w.now)
	got := w.after(4 * time.Second)
	if len(got) != 3 {
		t.Fatalf("%d paths", len(got))
	}
	for i, want := range []bool{false, true, false} {
		h := got[i].Path.Hops[0]
		said := h.Kind == trace.HopSocket && strings.Contains(h.Purpose, "sent again")
		if said != want || want && h.Source != trace.Drops {
			t.Errorf("packet %d begins with %+v", i, h)
		}
	}
}

// TestWhereItWasDropped says where in the kernel, and by which device.
func TestWhereItWasDropped(t *testing.T) {
	w := newWorld(t)
	p := header("10.9.0.2:40000", "10.96.0.10:80", 64, syn, 1000, 0)
	w.nft(1, "nat", "PREROUTING", "policy", 0, p, 2, 0)
	w.j.Dropped(&trace.DropNotice{Packet: *p, Reason: "IP_RPFILTER", Function: "ip_rcv_finish_core", Device: 2}, w.now)
	got := w.after(4 * time.Second)
	if len(got) != 1 {
		t.Fatalf("%d paths", len(got))
	}
	h := got[0].Path.Hops[len(got[0].Path.Hops)-1]
	if h.Kind != trace.HopDrop || h.Text != "IP_RPFILTER" || h.Purpose != "the kernel gave it up in ip_rcv_finish_core, at eth0" {
		t.Errorf("dropped: %+v", h)
	}
}
