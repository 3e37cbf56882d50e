package record

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/google/gopacket/layers"
	"github.com/google/gopacket/pcapgo"
)

// TestPcapng is read back by gopacket.
func TestPcapng(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	p := NewPcapng(&b, "kptrace test", "node1")
	p.Packet(1_700_000_000_123_456_789, 60, []byte("\x45 seven"), "shop/foo: picked")
	p.Packet(1_700_000_001_000_000_000, 4, []byte("\x45abc"), "")
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b.Bytes(), []byte("shop/foo: picked")) {
		t.Error("the comment is not in it")
	}
	r, err := pcapgo.NewNgReader(&b, pcapgo.NgReaderOptions{WantMixedLinkType: true})
	if err != nil {
		t.Fatal(err)
	}
	var packets []string
	for {
		data, ci, err := r.ReadPacketData()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		packets = append(packets, string(data))
		if len(packets) == 1 && (ci.Timestamp.UnixNano() != 1_700_000_000_123_456_789 || ci.Length != 60) {
			t.Errorf("at %d, length %d", ci.Timestamp.UnixNano(), ci.Length)
		}
	}
	if len(packets) != 2 || packets[0] != "\x45 seven" || packets[1] != "\x45abc" {
		t.Errorf("packets %q", packets)
	}
	if i, err := r.Interface(0); err != nil || i.LinkType != layers.LinkTypeRaw || i.Name != "node1" {
		t.Errorf("interface %+v, %v", i, err)
	}
}
