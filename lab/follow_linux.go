package lab

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/trace"
)

// followInterval is how often a flow that has not ended is sent anew.
const followInterval = 250 * time.Millisecond

// Follow hands everything that the nodes see from now on to emit, one message
// at a time, until ctx ends; then, what is left, and returns nil. ready is
// called once nothing can be missed any more. If emit fails, so does Follow.
func (l *Lab) Follow(ctx context.Context, ready func(), emit func(trace.Message) error) error {
	var mu sync.Mutex
	headers := 0
	one := func(m trace.Message) error {
		mu.Lock()
		defer mu.Unlock()
		if err := emit(m); err != nil {
			return err
		}
		if m.Header != nil {
			if headers++; headers == len(l.cluster.Nodes) {
				ready()
			}
		}
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	for i := range l.cluster.Nodes {
		name := l.cluster.Nodes[i].Name
		group.Go(func() error {
			client, err := relay.Dial(l.NodeSocket(name))
			if err == nil {
				defer client.Close()
				err = client.Follow(ctx, trace.Request{Interval: followInterval}, one)
			}
			if err != nil {
				return fmt.Errorf("lab: following %s: %w", name, err)
			}
			return nil
		})
	}
	return group.Wait()
}
