package otlp

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kptrace/kptrace/trace"
)

// errAway is a collector that cannot take anything for now.
var errAway = status.Error(codes.Unavailable, "away")

// balanced checks that every connection is accounted for.
func balanced(t *testing.T, s *SignalStats) {
	t.Helper()
	if s.Seen != s.Unsampled+s.Dropped+s.Queued+s.InFlight+s.Sent+s.Failed {
		t.Errorf("not all accounted for: %+v", s)
	}
}

// TestProtocols sends the same by gRPC and HTTP, plain and by TLS with client
// certificates, compressed, with headers: spans and log records.
func TestProtocols(t *testing.T) {
	files, server := certificates(t)
	for _, protocol := range []string{GRPC, HTTP} {
		for _, secure := range []bool{false, true} {
			name := protocol
			cfg := Config{
				Traces: Signal{Protocol: protocol, Delay: ms}, Logs: Signal{Protocol: protocol, Delay: ms},
				Headers: map[string]string{"x-token": "secret"}, Compression: "gzip", Timeout: 10 * time.Second,
				Sampling: Sampling{Ratio: 1}, Version: "v1", Node: "node1", Cluster: "c1", Pod: "kptrace-x", Namespace: "kube-system",
			}
			var use *tls.Config
			if secure {
				name, use = name+" tls", server
				cfg.CA, cfg.Cert, cfg.Key = files.ca, files.cert, files.key
			}
			t.Run(name, func(t *testing.T) {
				r := newReceiver()
				if protocol == GRPC {
					cfg.Endpoint, _ = r.serveGRPC(t, "127.0.0.1:0", use)
				} else {
					cfg.Endpoint = r.serveHTTP(t, use)
				}
				s := export(t, cfg, r, all()...)
				n := uint64(len(all()))
				if s.Traces.Sent != n || s.Logs.Sent != n || s.Traces.Items != uint64(len(r.got())) || len(r.gotRecords()) != int(n) {
					t.Errorf("spans %+v, records %+v", s.Traces, s.Logs)
				}
				balanced(t, s.Traces)
				balanced(t, s.Logs)
				if r.headers["x-token"] != "secret" || r.gzipped == 0 {
					t.Errorf("headers %v, %d compressed", r.headers, r.gzipped)
				}
				got := text(r.resource.GetAttributes())
				for _, w := range []string{
					"service.name=kptrace", "service.version=v1", "k8s.node.name=node1", "k8s.cluster.name=c1",
					"k8s.pod.name=kptrace-x", "k8s.namespace.name=kube-system", "service.instance.id=kube-system.kptrace-x",
				} {
					if !slices.Contains(got, w) {
						t.Errorf("the resource lacks %s: %v", w, got)
					}
				}
				if r.scope.GetName() != scope || r.scope.GetVersion() != "v1" {
					t.Errorf("scope %v", r.scope)
				}
			})
		}
	}
}

// TestRecords wants a record for each connection, and the ids of its span only
// where that is exported.
func TestRecords(t *testing.T) {
	r := newReceiver()
	endpoint, _ := r.serveGRPC(t, "127.0.0.1:0", nil)
	flows := []*trace.Flow{good(), refused()}
	s := export(t, Config{
		Endpoint: endpoint, Traces: Signal{Protocol: GRPC}, Logs: Signal{Protocol: GRPC, Delay: ms},
	}, r, flows...)
	if s.Traces.Unsampled != 1 || s.Traces.Sent != 1 || s.Logs.Sent != 2 {
		t.Errorf("%+v %+v", s.Traces, s.Logs)
	}
	list := r.gotRecords()
	if len(list) != 2 {
		t.Fatalf("%d records", len(list))
	}
	ok, bad := list[0], list[1]
	if ok.GetSeverityText() != "INFO" || len(ok.GetTraceId()) != 0 || ok.GetEventName() != eventConnection ||
		at(ok.GetTimeUnixNano()) != 32*ms || ok.GetBody().GetStringValue() != "10.244.1.5:40312 > shop/foo > 10.244.2.7:8080 closed" {
		t.Errorf("closed: %v", ok)
	}
	if !slices.Contains(text(ok.GetAttributes()), "kptrace.candidates=3") || !slices.Contains(text(ok.GetAttributes()), "source.k8s.pod.name=web-7f9") {
		t.Errorf("attributes %v", text(ok.GetAttributes()))
	}
	if bad.GetSeverityText() != "WARN" || hex.EncodeToString(bad.GetTraceId()) != refused().TraceID().String() ||
		hex.EncodeToString(bad.GetSpanId()) != refused().SpanContext().Span.String() {
		t.Errorf("refused: %v", bad)
	}
}

// TestCollectorAway takes the collector away under load: memory stays bounded,
// what finds no room is counted to the connection, and when it is back all
// that was kept arrives, once, by itself.
func TestCollectorAway(t *testing.T) {
	for _, protocol := range []string{GRPC, HTTP} {
		t.Run(protocol, func(t *testing.T) {
			const capacity, load = 64, 5000
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := l.Addr().String()
			l.Close() // nobody listens there now
			e, err := New(t.Context(), Config{
				Endpoint: "http://" + addr, Traces: Signal{Protocol: protocol, Queue: capacity, Batch: 16, Delay: ms},
				Logs: Signal{Off: true}, Sampling: Sampling{Ratio: 1}, Timeout: time.Second,
			})
			if err != nil {
				t.Fatal(err)
			}
			ring := trace.NewRing(1 << 14)
			reader := ring.NewReader()
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- e.Run(ctx, reader) }()
			publish := func(from, n int) {
				for i := range n {
					f := good()
					f.ID = trace.FlowID(from + i)
					ring.Publish(f)
				}
			}
			publish(1, load)
			eventually(t, "all are read and one was tried", func() bool {
				s := e.Stats().Traces
				return s.Seen == load && s.Retries > 0 && !s.Failing.IsZero()
			})
			s := e.Stats().Traces
			balanced(t, s)
			if s.Queued+s.InFlight > capacity+16 || s.Dropped < load-capacity-32 || s.Sent != 0 || s.Failed != 0 {
				t.Errorf("while away: %+v", s)
			}
			kept := load - s.Dropped

			r := newReceiver()
			if protocol == GRPC {
				r.serveGRPC(t, addr, nil)
			} else {
				serveHTTPAt(t, r, addr)
			}
			eventually(t, "what was kept arrives", func() bool { return e.Stats().Traces.Sent == kept })
			publish(load+1, 10)
			eventually(t, "what comes later arrives too", func() bool { return e.Stats().Traces.Sent == kept+10 })
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			s = e.Stats().Traces
			balanced(t, s)
			if s.Dropped != load-kept || s.Failed != 0 || !s.Failing.IsZero() || s.LastError == "" {
				t.Errorf("at the end: %+v", s)
			}
			roots := map[string]int{}
			for _, span := range r.got() {
				if len(span.GetParentSpanId()) == 0 {
					roots[hex.EncodeToString(span.GetTraceId())]++
				}
			}
			if len(roots) != int(kept)+10 {
				t.Errorf("%d traces arrived, %d were sent", len(roots), kept+10)
			}
			for id, n := range roots {
				if n != 1 {
					t.Errorf("%s arrived %d times", id, n)
				}
			}
		})
	}
}

// TestRefusedForGood gives up at once on what will not be taken, and says so;
// on what the collector took and did not keep too.
func TestRefusedForGood(t *testing.T) {
	for _, protocol := range []string{GRPC, HTTP} {
		t.Run(protocol, func(t *testing.T) {
			r := newReceiver()
			var endpoint string
			if protocol == GRPC {
				endpoint, _ = r.serveGRPC(t, "127.0.0.1:0", nil)
			} else {
				endpoint = r.serveHTTP(t, nil)
			}
			cfg := Config{Endpoint: endpoint, Traces: Signal{Protocol: protocol}, Sampling: Sampling{Ratio: 1}}
			r.setAnswer(func() (int64, error) { return 0, status.Error(codes.InvalidArgument, "no") })
			s := export(t, cfg, r, good()).Traces
			if s.Failed != 1 || s.Sent != 0 || s.Retries != 0 || r.requests != 1 || s.LastError == "" {
				t.Errorf("refused: %+v", s)
			}
			balanced(t, s)
			r.setAnswer(func() (int64, error) { return 3, nil })
			s = export(t, cfg, r, good()).Traces
			if s.Sent != 1 || s.Rejected != 3 || s.Failed != 0 || !s.Failing.IsZero() {
				t.Errorf("taken in part: %+v", s)
			}
			n := 0
			r.setAnswer(func() (int64, error) {
				if n++; n <= 2 {
					return 0, errAway
				}
				return 0, nil
			})
			s = export(t, cfg, r, good()).Traces
			if s.Sent != 1 || s.Retries != 2 || s.Failed != 0 {
				t.Errorf("busy twice: %+v", s)
			}
		})
	}
}

// TestFault survives a fault in making spans.
func TestFault(t *testing.T) {
	r := newReceiver()
	endpoint, _ := r.serveGRPC(t, "127.0.0.1:0", nil)
	e, err := New(t.Context(), Config{Endpoint: endpoint, Traces: Signal{Protocol: GRPC, Batch: 1}, Logs: Signal{Off: true}, Sampling: Sampling{Ratio: 1}})
	if err != nil {
		t.Fatal(err)
	}
	send, first := e.traces.send, true
	e.traces.send = func(ctx context.Context, flows []*trace.Flow) (int, error) {
		if first {
			first = false
			panic("a fault")
		}
		return send(ctx, flows)
	}
	ring := trace.NewRing(8)
	reader := ring.NewReader()
	ring.Publish(good())
	ring.Publish(good())
	ring.Close()
	if err := e.Run(t.Context(), reader); err != nil {
		t.Fatal(err)
	}
	if s := e.Stats().Traces; s.Failed != 1 || s.Sent != 1 {
		t.Errorf("%+v", s)
	}
}

// TestFlush wants what was published before the end to arrive, and the end to
// come within its bound when nobody takes anything.
func TestFlush(t *testing.T) {
	r := newReceiver()
	endpoint, _ := r.serveGRPC(t, "127.0.0.1:0", nil)
	run := func(cfg Config) (Stats, time.Duration) {
		e, err := New(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		ring := trace.NewRing(1 << 10)
		reader := ring.NewReader()
		for i := range 100 {
			f := good()
			f.ID = trace.FlowID(i + 1)
			ring.Publish(f)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // before it has read anything
		began := time.Now()
		if err := e.Run(ctx, reader); err != nil {
			t.Fatal(err)
		}
		return e.Stats(), time.Since(began)
	}
	cfg := Config{Endpoint: endpoint, Traces: Signal{Protocol: GRPC, Delay: time.Hour}, Logs: Signal{Off: true}, Sampling: Sampling{Ratio: 1}, Flush: 30 * time.Second}
	if s, _ := run(cfg); s.Traces.Sent != 100 {
		t.Errorf("flushed: %+v", s.Traces)
	}
	r.setAnswer(func() (int64, error) { return 0, errAway })
	cfg.Flush = 100 * ms
	s, took := run(cfg)
	if s.Traces.Failed != 100 || took > 20*time.Second {
		t.Errorf("nobody takes it: %+v after %v", s.Traces, took)
	}
	balanced(t, s.Traces)
}

func TestSampling(t *testing.T) {
	slow := good()
	slow.Established = 2 * time.Second
	resent := good()
	resent.Attempts[0].Retransmits = 1
	none := Sampling{Slow: time.Second}
	for name, c := range map[string]struct {
		f    *trace.Flow
		want bool
	}{
		"good": {good(), false}, "retried": {retried(), true}, "refused": {refused(), true}, "rejected": {rejected(), true},
		"timeout": {gaveUp(), true}, "unknown": {blind(), false}, "slow": {slow, true}, "resent": {resent, true},
		"joined": {carrying(1), true}, "not recorded": {carrying(0), false},
	} {
		if got := none.Keep(c.f); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		if (Sampling{Never: true, Ratio: 1}).Keep(c.f) {
			t.Errorf("%s: kept although switched off", name)
		}
		if !(Sampling{Ratio: 1}).Keep(c.f) {
			t.Errorf("%s: not kept although all are", name)
		}
	}
	kept := 0
	tenth := Sampling{Ratio: 0.1}
	for i := range 20_000 {
		f := good()
		if f.ID = trace.FlowID(i); tenth.Keep(f) {
			kept++
		}
	}
	if kept < 1800 || kept > 2200 {
		t.Errorf("%d of 20000 are no tenth", kept)
	}
	f := good()
	if n := testing.AllocsPerRun(100, func() { tenth.Keep(f) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestOnce exports a connection once, whatever revisions come after.
func TestOnce(t *testing.T) {
	r := newReceiver()
	endpoint, _ := r.serveGRPC(t, "127.0.0.1:0", nil)
	open, ended, counted := good(), good(), good()
	open.Ended, open.Completed, open.Revision = false, false, 1
	counted.Completed, counted.Revision = false, 4
	s := export(t, Config{Endpoint: endpoint, Traces: Signal{Protocol: GRPC}, Sampling: Sampling{Ratio: 1}}, r, open, ended, counted).Traces
	if s.Seen != 1 || s.Sent != 1 {
		t.Errorf("%+v", s)
	}
}

func TestErrors(t *testing.T) {
	for name, c := range map[string]Config{
		"protocol": {Traces: Signal{Protocol: "udp"}}, "ratio": {Sampling: Sampling{Ratio: 2}}, "endpoint": {Endpoint: "collector:4317"},
		"compression": {Compression: "zip"}, "key": {Cert: "x"}, "ca": {CA: "/nonexistent"},
	} {
		if _, err := New(t.Context(), c); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			t.Log(err)
		}
	}
	for _, c := range []struct {
		err  error
		want bool
	}{
		{status.Error(codes.PermissionDenied, ""), true}, {errAway, false}, {errors.New("retry-able request failure: body: x"), false},
		{errors.New("failed to send to http://x: 400 Bad Request"), true}, {context.DeadlineExceeded, false},
	} {
		if got := permanent(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}

func serveHTTPAt(t *testing.T, r *receiver, addr string) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	srv := newHTTP(r)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
}

type certFiles struct{ ca, cert, key string }

// certificates makes an authority, a server's configuration that asks for
// client certificates, and the files of a client.
func certificates(t *testing.T) (certFiles, *tls.Config) {
	t.Helper()
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	f := certFiles{filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw})
	for name, b := range map[string][]byte{f.ca: certPEM, f.cert: certPEM, f.key: keyPEM} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return f, &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, NextProtos: []string{"h2"}}
}

// TestIdle: an exporter that has heard of lost events, which others tell of,
// goes back to sleep.
func TestIdle(t *testing.T) {
	r := newReceiver()
	endpoint, _ := r.serveGRPC(t, "127.0.0.1:0", nil)
	e, err := New(t.Context(), Config{Endpoint: endpoint, Traces: Signal{Protocol: GRPC}, Logs: Signal{Off: true}})
	if err != nil {
		t.Fatal(err)
	}
	ring := trace.NewRing(16)
	reader := ring.NewReader()
	done := make(chan error, 1)
	go func() { done <- e.Run(context.Background(), reader) }()
	ring.PublishLoss(trace.Loss{Source: trace.NFLog, Where: "kernel", Events: 1})
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			t.Fatal(err)
		}
		return time.Duration(u.Utime.Nano())
	}
	before := used()
	time.Sleep(time.Second) // in which it should do nothing
	if busy := used() - before; busy > 250*time.Millisecond {
		t.Errorf("it worked for %v of a second in which nothing happened", busy)
	}
	ring.Close()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it does not end")
	}
}
