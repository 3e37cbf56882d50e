package otlp

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	coltrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/encoding/gzip" // to take compressed requests
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/protobuf/proto"
)

// receiver is a collector: it takes OTLP by gRPC and HTTP and keeps what it
// got.
type receiver struct {
	coltrace.UnimplementedTraceServiceServer
	logs logService

	mu       sync.Mutex // guards all below
	spans    []*tracepb.Span
	records  []*logspb.LogRecord
	resource *resourcepb.Resource
	scope    *commonpb.InstrumentationScope
	headers  map[string]string
	gzipped  int
	requests int
	// answer, if set, is asked before a request is taken. An error refuses it;
	// a number above 0 says that so many items were not kept.
	answer func() (rejected int64, err error)
}

type logService struct {
	collogs.UnimplementedLogsServiceServer
	r *receiver
}

func (r *receiver) ask() (int64, error) {
	r.mu.Lock()
	r.requests++
	answer := r.answer
	r.mu.Unlock()
	if answer == nil {
		return 0, nil
	}
	return answer()
}

func (r *receiver) Export(ctx context.Context, in *coltrace.ExportTraceServiceRequest) (*coltrace.ExportTraceServiceResponse, error) {
	r.note(ctx)
	rejected, err := r.ask()
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rs := range in.GetResourceSpans() {
		r.resource = rs.GetResource()
		for _, ss := range rs.GetScopeSpans() {
			r.scope = ss.GetScope()
			r.spans = append(r.spans, ss.GetSpans()...)
		}
	}
	out := &coltrace.ExportTraceServiceResponse{}
	if rejected > 0 {
		out.PartialSuccess = &coltrace.ExportTracePartialSuccess{RejectedSpans: rejected, ErrorMessage: "too many"}
	}
	return out, nil
}

func (s logService) Export(ctx context.Context, in *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
	s.r.note(ctx)
	if _, err := s.r.ask(); err != nil {
		return nil, err
	}
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	for _, rl := range in.GetResourceLogs() {
		s.r.resource = rl.GetResource()
		for _, sl := range rl.GetScopeLogs() {
			s.r.records = append(s.r.records, sl.GetLogRecords()...)
		}
	}
	return &collogs.ExportLogsServiceResponse{}, nil
}

func (r *receiver) note(ctx context.Context) {
	md, _ := metadata.FromIncomingContext(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, v := range md {
		r.headers[k] = v[0]
	}
}

// TagRPC, HandleRPC, TagConn and HandleConn see how requests were compressed.
func (r *receiver) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }
func (r *receiver) HandleRPC(_ context.Context, s stats.RPCStats) {
	if h, ok := s.(*stats.InHeader); ok && h.Compression == "gzip" {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.gzipped++
	}
}
func (r *receiver) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (r *receiver) HandleConn(context.Context, stats.ConnStats)                       {}

// ServeHTTP is OTLP over HTTP.
func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err == nil && req.Header.Get("Content-Encoding") == "gzip" {
		r.mu.Lock()
		r.gzipped++
		r.mu.Unlock()
		var z *gzip.Reader
		if z, err = gzip.NewReader(bytes.NewReader(body)); err == nil {
			body, err = io.ReadAll(z)
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	md := metadata.MD{}
	for k, v := range req.Header {
		md.Set(k, v...)
	}
	ctx := metadata.NewIncomingContext(req.Context(), md)
	var out proto.Message
	switch req.URL.Path {
	case "/v1/traces":
		in := &coltrace.ExportTraceServiceRequest{}
		if err = proto.Unmarshal(body, in); err == nil {
			out, err = r.Export(ctx, in)
		}
	case "/v1/logs":
		in := &collogs.ExportLogsServiceRequest{}
		if err = proto.Unmarshal(body, in); err == nil {
			out, err = r.logs.Export(ctx, in)
		}
	default:
		http.NotFound(w, req)
		return
	}
	if err != nil {
		code := http.StatusBadRequest
		if errors.Is(err, errAway) {
			code = http.StatusServiceUnavailable
		}
		http.Error(w, err.Error(), code)
		return
	}
	b, _ := proto.Marshal(out)
	w.Header().Set("Content-Type", "application/x-protobuf")
	_, _ = w.Write(b)
}

func newReceiver() *receiver {
	r := &receiver{headers: map[string]string{}}
	r.logs.r = r
	return r
}

// serveGRPC listens at addr until the test ends or stop is called.
func (r *receiver) serveGRPC(t *testing.T, addr string, secure *tls.Config) (endpoint string, stop func()) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	opts := []grpc.ServerOption{grpc.StatsHandler(r)}
	scheme := "http://"
	if secure != nil {
		opts, scheme = append(opts, grpc.Creds(credentials.NewTLS(secure))), "https://"
	}
	srv := grpc.NewServer(opts...)
	coltrace.RegisterTraceServiceServer(srv, r)
	collogs.RegisterLogsServiceServer(srv, r.logs)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Stop)
	return scheme + l.Addr().String(), srv.Stop
}

// serveHTTP listens until the test ends.
func (r *receiver) serveHTTP(t *testing.T, secure *tls.Config) (endpoint string) {
	t.Helper()
	srv := httptest.NewUnstartedServer(r)
	if secure != nil {
		srv.TLS = secure
		srv.StartTLS()
	} else {
		srv.Start()
	}
	t.Cleanup(srv.Close)
	return srv.URL
}

// got returns all spans so far.
func (r *receiver) got() []*tracepb.Span {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]*tracepb.Span(nil), r.spans...)
}

func (r *receiver) gotRecords() []*logspb.LogRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]*logspb.LogRecord(nil), r.records...)
}

func (r *receiver) setAnswer(f func() (int64, error)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = f
}

// eventually waits for a condition, on a busy machine for long.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func newHTTP(r *receiver) *http.Server {
	return &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second}
}
