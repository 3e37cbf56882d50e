package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// ServersConfig says where the Services' health ports are opened.
type ServersConfig struct {
	// Healthy is the proxy's own health.
	Healthy func() bool
	// Addrs are the addresses to listen on; empty means all.
	Addrs []string
	// Retry is the wait before ports that could not be bound are tried
	// again: 5 s if zero.
	Retry time.Duration
	// Failed is told of each port that could not be opened, once for each
	// cause. It must not wait. Nil means nobody looks.
	Failed func(proxy.Problem)
	// Listen opens a port; nil means a TCP listener of this process.
	Listen func(ctx context.Context, addr string) (net.Listener, error)
	Logger *slog.Logger
}

// Servers keeps one HTTP server for each Service with a healthCheckNodePort.
type Servers struct {
	cfg  ServersConfig
	wake chan struct{}

	mu       sync.Mutex
	want     []Service
	problems []proxy.Problem
}

// NewServers returns Servers that have nothing open; Run opens.
func NewServers(cfg ServersConfig) *Servers {
	if len(cfg.Addrs) == 0 {
		cfg.Addrs = []string{""}
	}
	if cfg.Retry == 0 {
		cfg.Retry = 5 * time.Second
	}
	if cfg.Listen == nil {
		cfg.Listen = func(ctx context.Context, addr string) (net.Listener, error) {
			return new(net.ListenConfig).Listen(ctx, "tcp", addr)
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Servers{cfg: cfg, wake: make(chan struct{}, 1)}
}

// Set makes the Services of snap the ones to answer for. It returns at once.
// Call it when the kernel has taken snap: a port that opens earlier draws
// traffic that meets no rules.
func (s *Servers) Set(snap *proxy.Snapshot) {
	list := Services(snap)
	s.mu.Lock()
	same := slices.Equal(s.want, list)
	s.want = list
	s.mu.Unlock()
	if same {
		return
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Problems lists the ports that could not be opened. They are tried again.
func (s *Servers) Problems() []proxy.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.problems)
}

// serving is one open health port.
type serving struct {
	port    uint16
	state   atomic.Pointer[Service]
	servers []*http.Server
}

// Run opens and closes ports until ctx ends, which is no error, and closes all
// of them then.
func (s *Servers) Run(ctx context.Context) error {
	open := map[string]*serving{}
	var running sync.WaitGroup
	defer running.Wait()
	defer func() {
		for _, o := range open {
			o.close()
		}
	}()
	again := time.NewTimer(s.cfg.Retry)
	again.Stop()
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-again.C:
		}
		if !s.bring(ctx, open, &running) {
			again.Reset(s.cfg.Retry)
		}
	}
}

// bring makes open what is wanted, and reports whether all of it is. Ports are
// closed first: a port may pass from one Service to another.
func (s *Servers) bring(ctx context.Context, open map[string]*serving, running *sync.WaitGroup) bool {
	s.mu.Lock()
	want := s.want
	s.mu.Unlock()
	wanted := map[string]*Service{}
	for i := range want {
		wanted[want[i].Namespace+"/"+want[i].Name] = &want[i]
	}
	for name, o := range open {
		if w, ok := wanted[name]; !ok || w.Port != o.port {
			o.close()
			delete(open, name)
		}
	}
	var problems []proxy.Problem
	for i := range want {
		w := &want[i]
		name := w.Namespace + "/" + w.Name
		if o, ok := open[name]; ok {
			o.state.Store(w)
			continue
		}
		o, err := s.listen(ctx, w, running)
		if err != nil {
			problems = append(problems, proxy.Problem{
				Object: "Service " + name, Field: "spec.healthCheckNodePort",
				Message: fmt.Sprintf("cannot be served on this node, so load balancers will pass it by; tried again every %v: %v", s.cfg.Retry, err),
			})
			continue
		}
		open[name] = o
	}
	s.mu.Lock()
	for i := range problems {
		if !slices.Contains(s.problems, problems[i]) {
			s.cfg.Logger.Error("problem: " + problems[i].Error())
			if s.cfg.Failed != nil {
				s.cfg.Failed(problems[i])
			}
		}
	}
	s.problems = problems
	s.mu.Unlock()
	return len(problems) == 0
}

func (s *Servers) listen(ctx context.Context, w *Service, running *sync.WaitGroup) (*serving, error) {
	o := &serving{port: w.Port}
	o.state.Store(w)
	var listeners []net.Listener
	for _, addr := range s.cfg.Addrs {
		l, err := s.cfg.Listen(ctx, net.JoinHostPort(addr, strconv.Itoa(int(w.Port))))
		if err != nil {
			for _, l := range listeners {
				_ = l.Close()
			}
			return nil, err
		}
		listeners = append(listeners, l)
	}
	handler := serviceHandler(func() Service { return *o.state.Load() }, s.cfg.Healthy)
	for _, l := range listeners {
		srv := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
		o.servers = append(o.servers, srv)
		running.Go(func() {
			if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
				s.cfg.Logger.Error("a health port ended", "service", w.Namespace+"/"+w.Name, "port", w.Port, "err", err)
			}
		})
	}
	return o, nil
}

func (o *serving) close() {
	for _, srv := range o.servers {
		_ = srv.Close()
	}
}
