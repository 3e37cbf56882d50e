package relay

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// chunk is the most bytes of a recording in one message.
const chunk = 256 << 10

// Record answers a record call.
func (s *Server) Record(stream grpc.BidiStreamingServer[RecordRequest, Chunk]) error {
	if s.cfg.Record == nil {
		return status.Error(codes.Unimplemented, "this node cannot record")
	}
	ctx, finish := context.WithCancel(stream.Context())
	defer finish()
	go func() {
		// Recv ends when the stream does, so this goroutine cannot outlive it.
		for {
			if _, err := stream.Recv(); err != nil {
				finish()
				return
			}
		}
	}()
	go func() {
		select {
		case <-s.done:
			finish()
		case <-ctx.Done():
		}
	}()
	return s.cfg.Record(ctx, chunks{stream})
}

// chunks sends what is written to it.
type chunks struct {
	stream grpc.BidiStreamingServer[RecordRequest, Chunk]
}

func (c chunks) Write(b []byte) (int, error) {
	sent := 0
	for sent < len(b) {
		n := min(len(b)-sent, chunk)
		if err := c.stream.Send(&Chunk{Data: b[sent : sent+n]}); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// Record writes a recording of what the node sees to w until ctx ends, which is
// an end in order: the recording is then complete and the error nil.
func (c *Client) Record(ctx context.Context, w io.Writer) error {
	hard, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stream, err := c.rpc.Record(hard)
	if err != nil {
		return c.explain(err)
	}
	if err := stream.Send(&RecordRequest{}); err != nil && !errors.Is(err, io.EOF) {
		return c.explain(err)
	}
	stop := context.AfterFunc(ctx, func() {
		if err := stream.CloseSend(); err != nil {
			cancel()
		}
	})
	defer stop()
	for {
		b, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.explain(err)
		}
		if _, err := w.Write(b.GetData()); err != nil {
			return fmt.Errorf("relay: writing the recording: %w", err)
		}
	}
}
