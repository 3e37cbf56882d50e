package lab

import (
	"context"
	"time"
)

// startFaults lets the planned faults happen, from now on.
func (l *Lab) startFaults() {
	for i := range l.cluster.Pods {
		p := &l.cluster.Pods[i]
		if p.Fault.Kind == "" {
			continue
		}
		l.watchers.Go(func() {
			select {
			case <-l.closing:
				return
			case <-time.After(p.Fault.After):
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := l.Fault(ctx, p.Fault.Kind, p.ID(), 0); err != nil {
				l.cfg.Logger.Warn("a planned fault did not happen", "pod", p.ID(), "err", err)
			}
		})
	}
}
