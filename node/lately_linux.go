package node

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace/check"
)

// latelyFor is how long what a check found serves to explain silence.
const latelyFor = time.Minute

// lately keeps what a check found for followers to whom nothing is shown. It looks
// only while somebody follows, and once in a while.
type lately struct {
	wanted chan struct{}
	mu     sync.Mutex // guards what follows
	at     time.Time
	found  []check.Finding
}

// said returns what was found about Services, or about the node as a whole, and
// has the node look again if that is old. It does not wait.
func (l *lately) said(services []proxy.PortName) (out []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.at) > latelyFor {
		select {
		case l.wanted <- struct{}{}:
		default:
		}
	}
	for i := range l.found {
		f := &l.found[i]
		about := slices.ContainsFunc(services, func(n proxy.PortName) bool { return strings.HasPrefix(f.Object, n.String()) })
		if about || f.Severity != check.Note && !strings.Contains(f.Object, "/") || f.Code == "handled-elsewhere" || f.Code == "flow-offload" ||
			f.Code == "forward-dropped" && f.Severity == check.Breaks {
			text := f.Code + ": " + f.Message
			if about {
				text = f.Code + " " + f.Object + ": " + f.Message
			}
			out = append(out, text)
		}
	}
	return out
}

// lookLately checks when a follower asks for it, until ctx ends.
func (n *node) lookLately(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.lately.wanted:
		}
		err := guard(func() error {
			s, err := n.inspect(ctx, nil)
			if err != nil {
				return err
			}
			found := check.Run(s, check.Options{})
			n.lately.mu.Lock()
			defer n.lately.mu.Unlock()
			n.lately.at, n.lately.found = time.Now(), found
			return nil
		})()
		if err != nil && ctx.Err() == nil {
			n.cfg.Logger.Warn("the kernel was not checked", "err", err)
		}
	}
}
