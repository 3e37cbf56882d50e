package drop

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/trace"
)

// newNS is a namespace whose lo drops what comes to port 81.
func newNS(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	err = ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = exec.Run(t.Context(), exec.Spec{
		Path: "iptables-nft-restore", Netns: ns.Fd(),
		Stdin: strings.NewReader("*filter\n-A INPUT -p tcp -m tcp --dport 81 -j DROP\nCOMMIT\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// knock sends a SYN to port 81 from a port.
func knock(t *testing.T, ns *netns.NS, port int) {
	t.Helper()
	err := ns.Do(func() error {
		d := net.Dialer{Timeout: 1500 * time.Millisecond, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}}
		c, err := d.Dial("tcp", "127.0.0.1:81")
		if err == nil {
			c.Close()
			t.Error("connected")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestKernel has packets dropped in two namespaces, and sees those of one, with
// the reason, and that they are sent again. Where BPF is not for us, that is an error that says what is missing.
func TestKernel(t *testing.T) {
	ours, other := newNS(t), newNS(t)
	s := New(Config{})
	var mu sync.Mutex
	var got []trace.DropNotice
	var again []trace.Resend
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- ours.Do(func() error {
			return s.Run(ctx, func() { close(ready) }, func(f trace.Frame) {
				mu.Lock()
				defer mu.Unlock()
				got, again = s.Decoder().Decode(f, got, again)
			})
		})
	}()
	select {
	case <-ready:
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "CAP_BPF") && !strings.Contains(err.Error(), "CONFIG_DEBUG_INFO_BTF") {
			t.Fatalf("refused without saying what is missing: %v", err)
		}
		t.Logf("not for this user: %v", err)
		return
	}
	from := time.Now()
	knock(t, ours, 40001)
	knock(t, other, 40002)
	find := func(port uint16) *trace.DropNotice {
		mu.Lock()
		defer mu.Unlock()
		for i := range got {
			if got[i].Packet.Tuple.Src().Port() == port && got[i].Packet.Name() == "SYN" {
				return &got[i]
			}
		}
		return nil
	}
	for end := time.Now().Add(10 * time.Second); find(40001) == nil && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	n := find(40001)
	if n == nil {
		t.Fatalf("the drop was not seen; stats %+v", s.Stats())
	}
	if n.Function == "" || n.Device != 1 {
		t.Errorf("where: %q, device %d", n.Function, n.Device)
	}
	resent := func(port uint16) *trace.Resend {
		mu.Lock()
		defer mu.Unlock()
		for i := range again {
			if again[i].Tuple.Src().Port() == port {
				return &again[i]
			}
		}
		return nil
	}
	for end := time.Now().Add(10 * time.Second); resent(40001) == nil && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if r := resent(40001); r == nil {
		t.Errorf("a SYN was sent again, which was not told; stats %+v", s.Stats())
	} else if r.Seq != n.Packet.Seq || r.Tuple != n.Packet.Tuple || !r.Opening || r.Time <= n.Time {
		t.Errorf("sent again: %+v, of %+v", r, n)
	}
	if n.Reason != "NETFILTER_DROP" || n.Packet.Tuple.Dst() != netip.MustParseAddrPort("127.0.0.1:81") {
		t.Errorf("seen as %+v", n)
	}
	if at := time.Unix(0, n.Time); at.Before(from.Add(-time.Second)) || at.After(time.Now().Add(time.Second)) {
		t.Errorf("seen at %v, began at %v", at, from)
	}
	if find(40002) != nil || resent(40002) != nil {
		t.Error("a drop in another namespace was seen")
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if st := s.Stats(); st.Events == 0 || st.Lost != 0 || st.Damaged != 0 {
		t.Errorf("stats %+v", st)
	}
}

func FuzzDecode(f *testing.F) {
	b := make([]byte, recordLen)
	b[0], b[16], b[25] = 2, 0x45, 6
	f.Add(b)
	f.Add(append(b, b...))
	f.Add(b[:40])
	f.Fuzz(func(_ *testing.T, data []byte) { NewDecoder(nil).Decode(trace.Frame{Data: data}, nil, nil) })
}
