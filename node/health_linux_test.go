package node

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// refusing is a mode that the kernel takes nothing of, or only a part, until
// told otherwise.
type refusing struct{ partial, taken atomic.Bool }

type emptyProgram struct{}

func (emptyProgram) Index() proxy.Index              { return nil }
func (emptyProgram) Walk(proxy.Packet) proxy.Outcome { return proxy.Outcome{} }
func (emptyProgram) Text() string                    { return "" }
func (emptyProgram) Problems() []proxy.Problem       { return nil }

func (*refusing) Mode() proxy.Mode              { return proxy.IPTables }
func (*refusing) Cleanup(context.Context) error { return nil }
func (*refusing) Render(*proxy.Snapshot, proxy.Overlay) proxy.Program {
	return emptyProgram{}
}

func (r *refusing) Apply(context.Context, proxy.Program) (proxy.Report, error) {
	if r.taken.Load() {
		return proxy.Report{}, nil
	}
	return proxy.Report{Partial: r.partial.Load()}, errors.New("the lock is held")
}

// TestHealthTellsTheTruth lets every sync fail soon and with an error, under
// which kube-proxy's healthz stayed green (kubernetes/kubernetes#105742).
func TestHealthTellsTheTruth(t *testing.T) {
	t.Parallel()
	loopback(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	backend := &refusing{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	cfg := Config{
		Name: "node1", Backend: backend, Socket: filepath.Join(t.TempDir(), "k.sock"),
		NoLocalhost: true, SyncPeriod: 250 * time.Millisecond, HTTP: HTTPConfig{Healthz: addr, HardFail: true},
		State: func(ctx context.Context, emit func(*proxy.Snapshot)) error {
			emit(snapshot())
			<-ctx.Done()
			return nil
		},
	}
	go func() { done <- Run(ctx, cfg) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	answers := func(path string, code int, part string) func() bool {
		return func() bool {
			res, err := http.Get("http://" + addr + path)
			if err != nil {
				return false
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			return err == nil && res.StatusCode == code && strings.Contains(string(body), part)
		}
	}
	eventually(t, 5*time.Second, "a failing proxy is told by healthz", answers("/healthz", 503, `"healthy":false`))
	eventually(t, 5*time.Second, "and by livez", answers("/livez", 503, `"healthy":false`))
	backend.partial.Store(true)
	eventually(t, 10*time.Second, "a refused Service does not take the node out of service", answers("/healthz", 200, `"healthy":true`))
	backend.partial.Store(false)
	eventually(t, 30*time.Second, "repairs that fail are told", answers("/healthz", 503, `"healthy":false`))
	backend.taken.Store(true)
	eventually(t, 30*time.Second, "a good sync is told", answers("/healthz", 200, `"healthy":true`))
}
