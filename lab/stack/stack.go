package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/lab"
)

// Config says beside which lab servers run.
type Config struct {
	Lab *lab.Lab
	// Dir is a folder for their configuration and data.
	Dir string
	// Output gets what they say; nil drops it.
	Output io.Writer
}

// Server is a program with a page.
type Server struct {
	// Name is how it is called, Node where it runs.
	Name, Node string
	Program    string
	Args, Env  []string
	// Page is where it answers HTTP, in the node's namespace, Ready the path
	// that answers 200 once it works.
	Page  netip.AddrPort
	Ready string
}

// Stack is a set of servers.
type Stack struct {
	cfg Config

	mu      sync.Mutex
	running []*running
}

type running struct {
	Server
	process *exec.Process
}

// readyTime is how long a server may take until it works.
const readyTime = 60 * time.Second

// New makes a Stack without servers.
func New(cfg Config) *Stack {
	if cfg.Output == nil {
		cfg.Output = io.Discard
	}
	return &Stack{cfg: cfg}
}

// Dir is the folder for configuration and data.
func (s *Stack) Dir() string { return s.cfg.Dir }

// Lab is the lab it belongs to.
func (s *Stack) Lab() *lab.Lab { return s.cfg.Lab }

// Start runs a server and returns when it works.
func (s *Stack) Start(ctx context.Context, v Server) error {
	p, err := s.cfg.Lab.Exec(lab.NodeSpace(v.Node), exec.Spec{
		Path: v.Program, Args: v.Args, Env: v.Env, Dir: s.cfg.Dir, OwnGroup: true,
		Stdout: s.cfg.Output, Stderr: s.cfg.Output,
	})
	if err != nil {
		return fmt.Errorf("stack: starting %s: %w", v.Name, err)
	}
	r := &running{v, p}
	s.mu.Lock()
	s.running = append(s.running, r)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	client := s.client(r)
	for {
		err := s.ready(ctx, client, v)
		if err == nil {
			return nil
		}
		select {
		case <-p.Done():
			return fmt.Errorf("stack: %s ended at once: %w", v.Name, errors.Join(p.Wait(), err))
		case <-ctx.Done():
			return fmt.Errorf("stack: %s is not ready: %w", v.Name, errors.Join(context.Cause(ctx), err))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (s *Stack) ready(ctx context.Context, client *http.Client, v Server) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+v.Name+v.Ready, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", req.URL, res.Status)
	}
	return nil
}

// Client talks to a server; the host in URLs does not matter.
func (s *Stack) Client(name string) (*http.Client, error) {
	r, err := s.find(name)
	if err != nil {
		return nil, err
	}
	return s.client(r), nil
}

func (s *Stack) find(name string) (*running, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.running, func(r *running) bool { return r.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("stack: no server %s runs", name)
	}
	return s.running[i], nil
}

func (s *Stack) client(r *running) *http.Client {
	return s.Dialer(r.Node, r.Page)
}

// Dialer is a client of whatever listens at an address in a node's namespace.
func (s *Stack) Dialer(node string, to netip.AddrPort) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return s.dial(ctx, node, to) },
	}}
}

func (s *Stack) dial(ctx context.Context, node string, to netip.AddrPort) (c net.Conn, err error) {
	into := s.cfg.Lab.Do(lab.NodeSpace(node), func() error {
		// A name would be looked up by another thread, in another namespace.
		c, err = new(net.Dialer).DialContext(ctx, "tcp", to.String())
		return nil
	})
	return c, errors.Join(into, err)
}

// Forward hands connections that l takes on to a server's page, until ctx
// ends.
func (s *Stack) Forward(ctx context.Context, name string, l net.Listener) error {
	r, err := s.find(name)
	if err != nil {
		return err
	}
	return Relay(ctx, l, func(ctx context.Context) (net.Conn, error) { return s.dial(ctx, r.Node, r.Page) })
}

// Relay hands connections that l takes on to where dial leads, until ctx ends.
func Relay(ctx context.Context, l net.Listener, dial func(context.Context) (net.Conn, error)) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var all sync.WaitGroup
	defer all.Wait()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("stack: forwarding: %w", err)
		}
		all.Go(func() {
			defer c.Close()
			to, err := dial(ctx)
			if err != nil {
				return
			}
			defer to.Close()
			end := context.AfterFunc(ctx, func() { c.Close(); to.Close() })
			defer end()
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = io.Copy(to, c)
				to.Close()
			}()
			_, _ = io.Copy(c, to)
			c.Close()
			<-done
		})
	}
}

// Close ends all servers, the last one first.
func (s *Stack) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range slices.Backward(s.running) {
		_ = r.process.Signal(syscall.SIGTERM)
		select {
		case <-r.process.Done():
		case <-time.After(5 * time.Second):
			_ = r.process.Kill()
			<-r.process.Done()
		}
	}
	s.running = nil
}
