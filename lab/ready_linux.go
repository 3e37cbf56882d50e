package lab

import (
	"context"
	"errors"
	"fmt"
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
		if err := l.waitNode(ctx, l.cluster.Nodes[i].Name); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) waitNode(ctx context.Context, name string) error {
	var last error
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		if last = synced(ctx, l.NodeSocket(name)); last == nil {
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
