package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/kptrace/kptrace/exporters/relay"
)

// WaitReady waits until every node's proxy has programmed its kernel. It
// fails if a proxy ends before.
func (l *Lab) WaitReady(ctx context.Context) error {
	if l.cfg.NoProxy {
		return nil
	}
	for i := range l.cluster.Nodes {
		name := l.cluster.Nodes[i].Name
		if l.cfg.Beside {
			if err := l.waitNode(ctx, name, func() error { return l.healthy(ctx, name) }); err != nil {
				return err
			}
		}
		if err := l.waitNode(ctx, name, func() error { return synced(ctx, l.NodeSocket(name)) }); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) waitNode(ctx context.Context, name string, ready func() error) error {
	var last error
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		if last = ready(); last == nil {
			return nil
		}
		select {
		case <-poll.C:
		case e := <-l.failed:
			if e.Err == nil {
				e.Err = errors.New("it ended")
			}
			return fmt.Errorf("lab: proxy of node %s: %w", e.Node, e.Err)
		case <-ctx.Done():
			return fmt.Errorf("lab: waiting for node %s: %w: %w", name, context.Cause(ctx), last)
		}
	}
}

var errNotSynced = errors.New("it has not programmed the kernel yet")

// synced reports whether the node at the socket has programmed its kernel.
func synced(ctx context.Context, socket string) error {
	c, err := relay.Dial(socket)
	if err != nil {
		return err
	}
	defer c.Close()
	s, err := c.Status(ctx)
	switch {
	case err != nil:
		return err
	case s.SyncError != "":
		return errors.New(s.SyncError)
	case s.Synced.IsZero():
		return errNotSynced
	}
	return nil
}

// healthy reports whether the proxy beside an agent says that it has programmed the
// kernel.
func (l *Lab) healthy(ctx context.Context, name string) error {
	return l.Do(NodeSpace(name), func() error {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", "127.0.0.1:10256")
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		if _, err := io.WriteString(c, "GET /healthz HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		head := make([]byte, len("HTTP/1.0 200"))
		if _, err := io.ReadFull(c, head); err != nil {
			return err
		}
		if string(head[len("HTTP/1.0 "):]) != "200" {
			return errNotSynced
		}
		return nil
	})
}
