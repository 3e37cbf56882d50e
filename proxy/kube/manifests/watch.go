package manifests

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube"
)

// Config says what to watch.
type Config struct {
	// Dir is the folder, Node the name of the node to make Snapshots for.
	Dir, Node string
	// Settle is how long a burst of changes may still go on before the folder
	// is read: 50 ms if zero.
	Settle time.Duration
	Logger *slog.Logger
}

// Watcher follows a folder.
type Watcher struct {
	cfg    Config
	loader loader
}

// New makes a Watcher; Run starts it.
func New(cfg Config) *Watcher {
	if cfg.Settle == 0 {
		cfg.Settle = 50 * time.Millisecond
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Watcher{cfg: cfg}
}

// Load reads the folder once.
func (w *Watcher) Load() (*proxy.Snapshot, error) {
	objects, problems, err := w.loader.load(w.cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := kube.Convert(objects, w.cfg.Node)
	s.Problems = append(problems, s.Problems...)
	return s, nil
}

// Run hands emit a Snapshot at once and another whenever a file changed, until
// ctx ends, which is no error. It fails only if the folder cannot be read at
// the start; one that vanishes later is waited for.
func (w *Watcher) Run(ctx context.Context, emit func(*proxy.Snapshot)) error {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("manifests: watching %s: %w", w.cfg.Dir, err)
	}
	defer notify.Close()
	if err := notify.Add(w.cfg.Dir); err != nil {
		return fmt.Errorf("manifests: watching %s: %w", w.cfg.Dir, err)
	}
	s, err := w.Load()
	if err != nil {
		return err
	}
	emit(s)

	settle := time.NewTimer(0)
	settle.Stop()
	defer settle.Stop()
	// Notifications can be lost or the folder replaced: look now and then.
	look := time.NewTicker(10 * time.Second)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-notify.Errors:
			w.cfg.Logger.Warn("manifests: watching", "dir", w.cfg.Dir, "err", err)
			settle.Reset(w.cfg.Settle)
		case _, ok := <-notify.Events:
			if !ok {
				return nil
			}
			settle.Reset(w.cfg.Settle)
			continue
		case <-look.C:
			// Adding again is harmless, and heals a folder that was replaced.
			if notify.Add(w.cfg.Dir) == nil && !w.changed() {
				continue
			}
		case <-settle.C:
		}
		if s, err := w.Load(); err != nil {
			w.cfg.Logger.Warn("manifests: reading; the last state stays", "err", err)
		} else {
			emit(s)
		}
	}
}
