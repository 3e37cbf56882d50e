package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

func local(name string, port uint16, endpoints ...proxy.Endpoint) proxy.Service {
	return proxy.Service{
		Name: proxy.PortName{Namespace: "shop", Name: name, Port: "http"}, Type: "LoadBalancer",
		ExternalLocal: true, HealthCheckNodePort: port, Endpoints: endpoints,
	}
}

func endpoint(addr string, onNode, ready bool) proxy.Endpoint {
	return proxy.Endpoint{Addr: netip.MustParseAddrPort(addr), Local: onNode, Ready: ready, Serving: true, Terminating: !ready}
}

func TestServices(t *testing.T) {
	two := local("two", 30001, endpoint("10.0.0.1:443", true, true), endpoint("10.0.0.3:443", true, true))
	two.Name.Port = "https"
	six := local("two", 30001, endpoint("[fd00::1]:80", true, true))
	cluster := local("cluster", 30002, endpoint("10.0.0.1:80", true, true))
	cluster.ExternalLocal = false
	got := Services(&proxy.Snapshot{Services: []proxy.Service{
		local("none", 30000, endpoint("10.0.0.1:80", false, true), endpoint("10.0.0.2:80", true, false)),
		// Three pods, two ports, two families: three endpoints.
		local("two", 30001, endpoint("10.0.0.1:80", true, true), endpoint("10.0.0.2:80", true, true)), two, six,
		cluster, local("without", 0, endpoint("10.0.0.1:80", true, true)),
	}})
	want := []Service{{"shop", "none", 30000, 0}, {"shop", "two", 30001, 3}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestServiceHandler(t *testing.T) {
	for _, tt := range []struct {
		local   int
		healthy bool
		code    int
	}{{2, true, 200}, {0, true, 503}, {2, false, 503}, {0, false, 503}} {
		h := serviceHandler(func() Service { return Service{"shop", "foo", 30000, tt.local} }, func() bool { return tt.healthy })
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/", nil))
		want := fmt.Sprintf(`{
	"service": {
		"namespace": "shop",
		"name": "foo"
	},
	"localEndpoints": %d,
	"serviceProxyHealthy": %v
}`, tt.local, tt.healthy)
		if rec.Code != tt.code || rec.Body.String() != want {
			t.Errorf("%+v: %d\n%s\nwant %d\n%s", tt, rec.Code, rec.Body, tt.code, want)
		}
		if w := rec.Header().Get("X-Load-Balancing-Endpoint-Weight"); w != fmt.Sprint(tt.local) {
			t.Errorf("%+v: weight %q", tt, w)
		}
	}
}

// ports listens on free loopback ports in the place of the asked ones, so that
// tests can run beside each other.
type ports struct {
	mu   sync.Mutex
	at   map[string]string // asked port to real address
	busy map[string]bool
}

func (p *ports) listen(_ context.Context, addr string) (net.Listener, error) {
	_, port, _ := net.SplitHostPort(addr)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.busy[port] {
		return nil, errors.New("address already in use")
	}
	if p.at[port] != "" {
		return nil, errors.New("opened twice")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p.at[port] = l.Addr().String()
	return &opened{l, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.at, port)
	}}, nil
}

type opened struct {
	net.Listener
	closed func()
}

func (o *opened) Close() error {
	o.closed()
	return o.Listener.Close()
}

// ask returns the code of a port, 0 if nobody listens.
func (p *ports) ask(t *testing.T, port string) (int, string) {
	t.Helper()
	p.mu.Lock()
	addr := p.at[port]
	p.mu.Unlock()
	if addr == "" {
		return 0, ""
	}
	res, err := http.Get("http://" + addr + "/")
	if err != nil {
		return 0, ""
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(body)
}

func (p *ports) expect(t *testing.T, port string, code int) {
	t.Helper()
	got := -1
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got, _ = p.ask(t, port); got == code {
			return
		}
	}
	t.Errorf("port %s answers %d, want %d", port, got, code)
}

// TestServers follows Snapshots: ports open, change hands, answer by their
// endpoints and by the proxy's health, and close.
func TestServers(t *testing.T) {
	p := &ports{at: map[string]string{}, busy: map[string]bool{"30002": true}}
	var healthy atomic.Bool
	healthy.Store(true)
	s := NewServers(ServersConfig{Healthy: healthy.Load, Listen: p.listen, Retry: 20 * time.Millisecond})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()

	on, off := endpoint("10.0.0.1:80", true, true), endpoint("10.0.0.2:80", true, false)
	set := func(services ...proxy.Service) { s.Set(&proxy.Snapshot{Services: services}) }
	set(local("foo", 30000, on), local("bar", 30001, off))
	p.expect(t, "30000", 200)
	p.expect(t, "30001", 503)
	healthy.Store(false)
	p.expect(t, "30000", 503)
	healthy.Store(true)
	// They swap ports, and one endpoint ends.
	set(local("foo", 30001, off), local("bar", 30000, on))
	p.expect(t, "30001", 503)
	p.expect(t, "30000", 200)
	if _, body := p.ask(t, "30000"); !strings.Contains(body, `"name": "bar"`) {
		t.Errorf("30000 answers %s", body)
	}
	set(local("bar", 30000, on), local("busy", 30002, on))
	p.expect(t, "30001", 0)
	for end := time.Now().Add(5 * time.Second); len(s.Problems()) == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if got := s.Problems(); len(got) != 1 || !strings.HasPrefix(got[0].Error(), "Service shop/busy: spec.healthCheckNodePort: ") {
		t.Errorf("problems %v", got)
	}
	p.mu.Lock()
	p.busy["30002"] = false
	p.mu.Unlock()
	p.expect(t, "30002", 200)
	if got := s.Problems(); len(got) != 0 {
		t.Errorf("problems after the port was had: %v", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	p.expect(t, "30000", 0)
}
