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
	// Flags are those of the process and their values, for /flagz.
	Flags map[string]string
	// Verbosity sets the log level, as flag -v does, for /debug/flags/v; nil
	// means it cannot be set.
	Verbosity func(level int)
}

// emulated is the release of kube-proxy whose behaviour this is.
const emulated = "1.36"

// metricsServer is what the answers at kube-proxy's metrics address are made of.
type metricsServer struct {
	HTTPConfig
	mode, version string
	started       time.Time
	metrics, slis http.Handler
	// checked is told of each check that /healthz makes.
	checked func(name, kind string, ok bool)
}

// mux has what kube-proxy serves at its metrics address.
func (s *metricsServer) mux() *http.ServeMux {
	mux := http.NewServeMux()
	text := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			fmt.Fprint(w, body)
		}
	}
	mux.Handle("/metrics", s.metrics)
	mux.Handle("/metrics/slis", s.slis)
	mux.Handle("/proxyMode", text(s.mode))
	mux.HandleFunc("/healthz", s.healthz)
	mux.Handle("/healthz/ping", text("ok"))
	mux.HandleFunc("/configz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(s.Configz)
	})
	paths := []string{"/configz", "/flagz", "/healthz", "/metrics", "/proxyMode"}
	if s.Profiling {
		if s.Verbosity != nil {
			mux.Handle("/debug/flags/v", verbosity(s.Verbosity))
		}
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		// Not the command line, which may hold secrets: kube-proxy dropped it.
		mux.HandleFunc("/debug/pprof/cmdline", http.NotFound)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	mux.Handle("/flagz", flagz(s.Flags))
	mux.Handle("/statusz", statusz(s.version, emulated, s.started, paths))
	return mux
}

// healthz answers that the process answers: its one check. What the proxy does
// is at the address of Config.HTTP.Healthz.
func (s *metricsServer) healthz(w http.ResponseWriter, r *http.Request) {
	s.checked("ping", "healthz", true)
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if _, verbose := r.URL.Query()["verbose"]; verbose {
		fmt.Fprint(w, "[+]ping ok\nhealthz check passed\n")
		return
	}
	fmt.Fprint(w, "ok")
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
