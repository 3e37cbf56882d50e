package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Config says where a Server gets its answers. Ring, History and Status must
// be set; the functions may be called from several goroutines.
type Config struct {
	Ring    *trace.Ring
	History *trace.History
	// View returns the newest generation of intent, nil before the first.
	View func() *proxy.View
	// Live calls its argument for each flow that has not ended, until that
	// returns false. Nil means there is no such list.
	Live func(func(*trace.Flow) bool)
	// Status is asked for each Status call and for explaining silence.
	Status func() Status
	// Watching is told of followers: 1 when one comes, -1 when it goes. Nil
	// means nobody wants to know.
	Watching func(delta int)
	// Direct returns how many connections were made straight to each endpoint so
	// far, past Services. WatchingDirect is told of followers that want to see
	// them, as Watching is of all. Nil means that none are counted.
	Direct         func() map[trace.Target]trace.Direct
	WatchingDirect func(delta int)
	// Unseen lists what this setup in particular cannot see, to be said at the head
	// of every stream. Nil is nothing.
	Unseen func() []string
	// Findings is what the node's last check found, a sentence each, for the
	// Services in question; it does not wait. Nil means that nobody checks.
	Findings func(services []proxy.PortName) []string
	// Explain, Services and Check answer questions about the node's kernel; nil means
	// that it cannot.
	Explain  func(context.Context, ExplainRequest) ([]explain.Answer, error)
	Services func(context.Context, ServicesRequest) (ServicesResponse, error)
	Check    func(context.Context, CheckRequest) (CheckResponse, error)
	// Collect reads what a bug report holds; nil as with Explain.
	Collect func(context.Context, CollectRequest) (CollectResponse, error)
	// Trace has the paths of a Request's flows traced until release is called;
	// it returns when they are, or with the reason why not. Nil means that
	// paths cannot be traced.
	Trace func(context.Context, *trace.Request) (release func(), err error)
	// Settle returns when the paths of packets that were seen before a time are with
	// their flows, or when ctx ends. Nil means that they are at once.
	Settle func(ctx context.Context, before time.Time)
	// Record writes a recording until ctx ends, which is no error. Nil means that
	// nothing can be recorded.
	Record func(ctx context.Context, to io.Writer) error
	// Logger gets what no caller can be told; nil discards it.
	Logger *slog.Logger
}

// Server answers Clients on a Unix socket.
type Server struct {
	UnimplementedObserverServer
	cfg Config
	// done is closed when Run's context ends, so that streams end in order.
	done chan struct{}
}

// NewServer makes a Server; Run starts it, once.
func NewServer(cfg Config) *Server {
	if cfg.View == nil {
		cfg.View = func() *proxy.View { return nil }
	}
	if cfg.Live == nil {
		cfg.Live = func(func(*trace.Flow) bool) {}
	}
	if cfg.Direct == nil {
		cfg.Direct = func() map[trace.Target]trace.Direct { return nil }
	}
	if cfg.WatchingDirect == nil {
		cfg.WatchingDirect = func(int) {}
	}
	if cfg.Unseen == nil {
		cfg.Unseen = func() []string { return nil }
	}
	if cfg.Findings == nil {
		cfg.Findings = func([]proxy.PortName) []string { return nil }
	}
	if cfg.Settle == nil {
		cfg.Settle = func(context.Context, time.Time) {}
	}
	if cfg.Watching == nil {
		cfg.Watching = func(int) {}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, done: make(chan struct{})}
}

// stopTime is how long streams get to end in order.
const stopTime = 2 * time.Second

// Run listens at path until ctx ends, which is no error. The folder is made
// for the owner alone (0700), and so is the socket (0600). The socket of a
// dead process is removed, that of a live one is an error that names it.
func (s *Server) Run(ctx context.Context, path string) error {
	l, err := listen(path)
	if err != nil {
		return err
	}
	srv := grpc.NewServer(
		grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (out any, err error) {
			defer s.recovered(&err)
			return h(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
			defer s.recovered(&err)
			return h(srv, ss)
		}),
	)
	RegisterObserverServer(srv, s)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("relay: serving at %s: %w", path, err)
	case <-ctx.Done():
	}
	close(s.done)
	hard := time.AfterFunc(stopTime, srv.Stop)
	defer hard.Stop()
	srv.GracefulStop()
	<-served //nolint:errcheck // it says that it was stopped
	return nil
}

// recovered makes a panic in one call an error of that call: what a follower
// asks must never end the node.
func (s *Server) recovered(err *error) {
	if r := recover(); r != nil {
		s.cfg.Logger.Error("relay: panic while answering", "panic", r, "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "kptrace met a fault of its own: %v", r)
	}
}

// Status answers a status call.
func (s *Server) Status(context.Context, *StatusRequest) (*StatusResponse, error) {
	st := s.cfg.Status()
	return statusToPB(&st), nil
}

// Follow answers a follow call. See trace.Request.
func (s *Server) Follow(stream grpc.BidiStreamingServer[Request, Batch]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	ctx, finish := context.WithCancelCause(stream.Context())
	defer finish(nil)
	go func() {
		// Recv ends when the stream does, so this goroutine cannot outlive it.
		for {
			if _, err := stream.Recv(); err != nil {
				finish(errFinish)
				return
			}
		}
	}()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-s.done:
			finish(errFinish)
		case <-stop:
		}
	}()
	f := newFollower(s, requestFromPB(first), stream.Send)
	if f.req.Path.Wanted() {
		release, err := s.trace(ctx, &f.req)
		defer release()
		if err != nil {
			f.notes = append(f.notes, "paths are not traced: "+err.Error())
		}
	}
	s.cfg.Watching(1)
	defer s.cfg.Watching(-1)
	if f.req.Direct {
		s.cfg.WatchingDirect(1)
		defer s.cfg.WatchingDirect(-1)
	}
	err = f.run(ctx)
	if errors.Is(err, context.Canceled) && stream.Context().Err() != nil {
		return status.FromContextError(stream.Context().Err()).Err()
	}
	return err
}

// trace has the paths of a request's flows traced.
func (s *Server) trace(ctx context.Context, req *trace.Request) (release func(), err error) {
	if s.cfg.Trace == nil {
		return func() {}, errors.New("this node cannot trace them")
	}
	return s.cfg.Trace(ctx, req)
}

// errFinish is the cause of a follower's end in order.
var errFinish = errors.New("finish")

// Flows answers a query of what is held.
func (s *Server) Flows(in *FlowsRequest, stream grpc.ServerStreamingServer[Batch]) error {
	req := requestFromPB(in.GetRequest())
	out := newSender(s.node(), stream.Send)
	if len(in.GetIds()) > 0 {
		return s.byID(in.GetIds(), out)
	}
	header, err := s.header(&req)
	if err != nil {
		return err
	}
	if err := out.add(trace.Message{Header: header}); err != nil {
		return err
	}
	flows := s.cfg.History.Query(req.Filter, req.Since, req.Last)
	if in.GetExisting() {
		flows = s.existing(&req)
	}
	for _, f := range flows {
		if err := out.add(trace.Message{Flow: f}); err != nil {
			return err
		}
	}
	return out.flush()
}

// byID sends the newest revisions of some flows; what is not there is an error.
func (s *Server) byID(ids []uint64, out *sender) error {
	for _, n := range ids {
		id := trace.FlowID(n)
		f, ok := s.cfg.History.Get(id)
		s.cfg.Live(func(live *trace.Flow) bool {
			if live.ID == id && (!ok || live.Revision > f.Revision) {
				f, ok = live, true
			}
			return live.ID != id
		})
		if !ok {
			all, failures := s.cfg.History.Since()
			return status.Errorf(codes.NotFound, "no flow %s on %s: it holds all since %s, failed ones since %s",
				id, s.node(), all.Format(time.DateTime), failures.Format(time.DateTime))
		}
		if err := out.add(trace.Message{Flow: f}); err != nil {
			return err
		}
	}
	return out.flush()
}

// sender gathers Messages into Batches.
type sender struct {
	node string
	send func(*Batch) error
	next *Batch
}

func newSender(node string, send func(*Batch) error) *sender {
	return &sender{node: node, send: send, next: &Batch{}}
}

// maxSend is how many messages go into one Batch.
const maxSend = 256

func (o *sender) add(m trace.Message) error {
	m.Node = o.node
	o.next.Messages = append(o.next.Messages, messageToPB(&m))
	if len(o.next.Messages) >= maxSend {
		return o.flush()
	}
	return nil
}

func (o *sender) flush() error {
	if len(o.next.Messages) == 0 {
		return nil
	}
	b := o.next
	o.next = &Batch{}
	return o.send(b)
}
