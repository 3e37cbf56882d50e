package load

import (
	"context"
	"net/netip"
	"testing"
	"time"
)

func serve(t *testing.T, at netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- Serve(ctx, at, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRun(t *testing.T) {
	at := netip.MustParseAddrPort("127.0.0.1:28080")
	serve(t, at)
	each := 0
	r, err := Run(t.Context(), Config{Target: at, Conns: 2000, Concurrency: 32, Each: func(c Conn) {
		if each++; c.Server != at || c.Local.Addr() != at.Addr() || c.Local.Port() == 0 || c.Began.IsZero() {
			t.Errorf("told of %+v", c)
		}
	}})
	if each != 2000 {
		t.Errorf("told of %d connections", each)
	}
	if err != nil || r.Done != 2000 || r.Failed() != 0 || r.P50 <= 0 || r.P99 < r.P50 {
		t.Errorf("%+v, %v", r, err)
	}
	t.Log(r.String())
	start := time.Now()
	r, err = Run(t.Context(), Config{Target: at, Conns: 200, Rate: 400})
	if took := time.Since(start); err != nil || r.Done != 200 || took < 490*time.Millisecond || took > 2*time.Second {
		t.Errorf("200 at 400/s: %+v, %v in %v", r, err, took)
	}
	r, err = Run(t.Context(), Config{Target: at, Duration: 300 * time.Millisecond})
	if err != nil || r.Done == 0 || r.Failed() != 0 || r.Elapsed < 300*time.Millisecond || r.Elapsed > 3*time.Second {
		t.Errorf("300 ms: %+v, %v", r, err)
	}
}

func TestRunFailures(t *testing.T) {
	at := netip.MustParseAddrPort("127.0.0.1:28081") // nobody listens
	r, err := Run(t.Context(), Config{Target: at, Conns: 10})
	if err != nil || r.Done != 0 || r.Errors["connection refused"] != 10 {
		t.Errorf("%+v, %v", r, err)
	}
	for _, bad := range []Config{{Target: at}, {Conns: 1}, {Conns: 1, Target: netip.MustParseAddrPort("[::1]:80")}} {
		if _, err := Run(t.Context(), bad); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := Run(ctx, Config{Target: at, Duration: time.Hour}); err != nil || r.Done+r.Failed() != 0 {
		t.Errorf("after its end: %+v, %v", r, err)
	}
}
