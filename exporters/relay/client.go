package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/kptrace/kptrace/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// finishTime is how long a node may take to send the rest after Follow's
// context ended.
const finishTime = 3 * time.Second

// finishPaths is the same where paths were asked for, which are waited for.
const finishPaths = pathsLate + pathsLatest + finishTime

// Client asks one node.
type Client struct {
	path string
	conn *grpc.ClientConn
	rpc  ObserverClient
}

// Dial connects to the node that listens at the socket. If nobody does, the
// error is ErrNotRunning.
func Dial(socket string) (*Client, error) {
	if err := probe(socket); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///kptrace",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, fmt.Errorf("relay: connecting to %s: %w", socket, err)
	}
	return &Client{path: socket, conn: conn, rpc: NewObserverClient(conn)}, nil
}

// maxMessage bounds one gRPC message in bytes.
const maxMessage = 64 << 20

// Socket returns the path that was dialled.
func (c *Client) Socket() string { return c.path }

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Follow hands each Message of a stream to fn, in order, until the node ends
// or fn returns an error, which Follow returns. When ctx ends the node is
// asked for the rest: the open flows as they stand and an End; so a Follow
// that ends by ctx is complete and its error nil.
func (c *Client) Follow(ctx context.Context, req trace.Request, fn func(trace.Message) error) error {
	hard, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stream, err := c.rpc.Follow(hard)
	if err != nil {
		return c.explain(err)
	}
	if err := stream.Send(requestToPB(&req)); err != nil && !errors.Is(err, io.EOF) {
		return c.explain(err)
	}
	finish := finishTime
	if req.Path.Wanted() {
		finish = finishPaths
	}
	stop := context.AfterFunc(ctx, func() {
		if err := stream.CloseSend(); err != nil {
			cancel()
		}
		time.AfterFunc(finish, cancel)
	})
	defer stop()
	return c.receive(stream, fn)
}

// Flows hands the Flows that the node holds for req to fn, after a Header.
func (c *Client) Flows(ctx context.Context, req trace.Request, fn func(trace.Message) error) error {
	return c.flows(ctx, &FlowsRequest{Request: requestToPB(&req)}, fn)
}

// Existing hands the connections that are open now to fn, after a Header, in
// the order of their endpoints.
func (c *Client) Existing(ctx context.Context, req trace.Request, fn func(trace.Message) error) error {
	return c.flows(ctx, &FlowsRequest{Request: requestToPB(&req), Existing: true}, fn)
}

// Flow returns all that the node holds of one Flow; the error is ErrNotFound
// if that is nothing.
func (c *Client) Flow(ctx context.Context, id trace.FlowID) (*trace.Flow, error) {
	var found *trace.Flow
	err := c.flows(ctx, &FlowsRequest{Ids: []uint64{uint64(id)}}, func(m trace.Message) error {
		if m.Flow != nil {
			found = m.Flow
		}
		return nil
	})
	if err == nil && found == nil {
		err = fmt.Errorf("%w: flow %s", ErrNotFound, id)
	}
	return found, err
}

func (c *Client) flows(ctx context.Context, req *FlowsRequest, fn func(trace.Message) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.rpc.Flows(ctx, req)
	if err != nil {
		return c.explain(err)
	}
	return c.receive(stream, fn)
}

// Status asks what the node says of itself.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	s, err := c.rpc.Status(ctx, &StatusRequest{})
	if err != nil {
		return nil, c.explain(err)
	}
	return statusFromPB(s), nil
}

func (c *Client) receive(stream interface{ Recv() (*Batch, error) }, fn func(trace.Message) error) error {
	for {
		batch, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.explain(err)
		}
		for _, m := range batch.GetMessages() {
			if err := fn(messageFromPB(m)); err != nil {
				return err
			}
		}
	}
}

// The errors a node answers with; what it said is in the text around them.
var (
	// ErrNotFound: what was asked for does not exist.
	ErrNotFound = errors.New("not found")
	// ErrNoDecisions: it exists, and is nothing that a proxy decides about.
	ErrNoDecisions = errors.New("nothing to follow")
	// ErrNotReady: the node has not programmed anything yet.
	ErrNotReady = errors.New("not ready")
	// ErrGone: the node ended, or was never there.
	ErrGone = errors.New("the kptrace that was asked has gone")
)

// answer is an error in the node's own words.
type answer struct {
	text string
	kind error
}

func (a *answer) Error() string { return a.text }
func (a *answer) Unwrap() error { return a.kind }

// NotFound is an ErrNotFound in a node's own words.
func NotFound(format string, args ...any) error {
	return &answer{fmt.Sprintf(format, args...), ErrNotFound}
}

// toStatus makes a node's answer one of gRPC, as Client.explain reads it.
func toStatus(err error) error {
	switch {
	case errors.Is(err, ErrNotFound):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, ErrNoDecisions):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.Is(err, ErrNotReady):
		return status.Error(codes.Aborted, err.Error())
	}
	return status.Error(codes.Unknown, err.Error())
}

// explain makes an error of gRPC one for people.
func (c *Client) explain(err error) error {
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("relay: %s: %w", c.path, err)
	}
	switch s.Code() {
	case codes.NotFound:
		return &answer{s.Message(), ErrNotFound}
	case codes.FailedPrecondition:
		return &answer{s.Message(), ErrNoDecisions}
	case codes.Aborted:
		return &answer{s.Message(), ErrNotReady}
	case codes.Unavailable:
		return fmt.Errorf("%w (%s: %s)", ErrGone, c.path, s.Message())
	case codes.Canceled:
		return context.Canceled
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	}
	return fmt.Errorf("relay: %s: %s", c.path, s.Message())
}
