package nfnl_test

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/nfnl"
)

func TestMain(m *testing.M) { netns.Main(m) }

func open(t *testing.T) (*netns.NS, *nfnl.Socket) {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	var s *nfnl.Socket
	if err := ns.Do(func() (err error) { s, err = nfnl.Open(1 << 20); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return ns, s
}

func TestSocket(t *testing.T) {
	ns, s := open(t)
	if s.PortID() == 0 || s.ReceiveBuffer() < 1<<20 {
		t.Errorf("port %d, buffer %d", s.PortID(), s.ReceiveBuffer())
	}
	if err := s.Join(nfnl.GroupConntrackNew); err != nil {
		t.Error(err)
	}
	// From outside of the namespace, too.
	if n, err := s.Drops(); n != 0 || err != nil {
		t.Errorf("drops %d, %v", n, err)
	}
	err := ns.Do(func() error {
		p := nfnl.Owner(s.PortID())
		if p.PID != os.Getpid() || p.Command == "" {
			t.Errorf("owner %+v, want %d", p, os.Getpid())
		}
		if p := nfnl.Owner(1); p != (nfnl.Process{}) {
			t.Errorf("owner of nothing: %+v", p)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestRequest(t *testing.T) {
	_, s := open(t)
	const get, getStats = 1, 5
	// Asking for an entry without saying which is refused.
	if err := s.Request(nfnl.Type(nfnl.SubsysConntrack, get), nfnl.FamilyIPv4, 0, nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a bad request: %v, want EINVAL", err)
	}
	answer, err := s.Query(nfnl.Type(nfnl.SubsysConntrack, getStats), nfnl.FamilyUnspec, nil)
	if m := nfnl.NewMessages(answer); err != nil || !m.Next() || m.Type != nfnl.Type(nfnl.SubsysConntrack, getStats) {
		t.Errorf("a question: % x, %v", answer, err)
	}
}

// TestReceiveEnds wants a cancelled Receive to end at once, idle or not.
func TestReceiveEnds(t *testing.T) {
	_, s := open(t)
	for range 3 {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		idle := make(chan int64, 8)
		go func() {
			done <- s.Receive(ctx, nfnl.Handler{
				Data: func([]byte, int64) { t.Error("data from nowhere") },
				Idle: func(now int64) { idle <- now },
			})
		}()
		time.Sleep(20 * time.Millisecond)
		begin := time.Now()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if d := time.Since(begin); d > 500*time.Millisecond {
			t.Errorf("Receive took %v to end", d)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2500*time.Millisecond)
	defer cancel()
	calls := 0
	if err := s.Receive(ctx, nfnl.Handler{Idle: func(int64) { calls++ }}); err != nil || calls != 2 {
		t.Errorf("Idle called %d times in 2.5 s, %v", calls, err)
	}
}
