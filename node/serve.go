package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"
)

// HTTPConfig says what a node serves over HTTP beside the relay, under the
// addresses and paths of kube-proxy.
type HTTPConfig struct {
	// Healthz is the address of /healthz and /livez, Metrics that of
	// /metrics, /proxyMode, /configz and /healthz; empty means nowhere.
	Healthz, Metrics string
	// HardFail ends the node if one of them cannot be bound. Else that is
	// said and tried again.
	HardFail bool
	// Profiling adds /debug/pprof to the metrics.
	Profiling bool
	// Configz is the body of /configz, a JSON object.
	Configz []byte
}

// metricsMux has what kube-proxy serves at its metrics address.
func metricsMux(cfg HTTPConfig, mode string, metrics http.Handler) *http.ServeMux {
	mux := http.NewServeMux()
	text := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			fmt.Fprint(w, body)
		}
	}
	mux.Handle("/metrics", metrics)
	mux.Handle("/proxyMode", text(mode))
	mux.Handle("/healthz", text("ok"))
	mux.HandleFunc("/configz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(cfg.Configz)
	})
	if cfg.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// server answers HTTP at one address.
type server struct {
	what, addr string
	handler    http.Handler
	logger     *slog.Logger
	// hardFail makes run fail where the address cannot be had. Else that is
	// said, failed is told when it begins, and it is tried again.
	hardFail bool
	again    time.Duration
	failed   func(error)
}

// run answers until ctx ends.
func (s *server) run(ctx context.Context) error {
	down := false
	for {
		served, err := s.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		err = fmt.Errorf("node: serving %s on %s: %w", s.what, s.addr, err)
		if s.hardFail {
			return err
		}
		if s.failed != nil && (!down || served) {
			s.failed(err)
		}
		down = true
		s.logger.Error("cannot serve; Services are not affected; trying again", "in", s.again, "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(s.again):
		}
	}
}

// once answers until something goes wrong, and reports whether it came to that.
func (s *server) once(ctx context.Context) (served bool, err error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", s.addr)
	if err != nil {
		return false, err
	}
	s.logger.Info("serving "+s.what, "address", l.Addr().String())
	srv := &http.Server{Handler: s.handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return true, err
	}
	return true, nil
}
