package controlplane

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/kptrace/kptrace/internal/netns"
)

// Forward makes the API server reachable at the same address in another network
// namespace, so that the same kubeconfig works there. Connections are carried
// through this process; no device or route joins the two namespaces. Stop ends
// it and all connections through it.
func (c *Cluster) Forward(ns *netns.NS) (stop func(), err error) {
	var listener net.Listener
	err = ns.Do(func() error {
		listener, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", c.addr.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("controlplane: listening in another namespace: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &forwarder{to: c.addr.String(), open: map[net.Conn]bool{}}
	f.wait.Add(1)
	go func() {
		defer f.wait.Done()
		f.serve(ctx, listener)
	}()
	return func() {
		cancel()
		listener.Close()
		f.close()
		f.wait.Wait()
	}, nil
}

// forwarder carries connections to one address.
type forwarder struct {
	to   string
	wait sync.WaitGroup

	mu     sync.Mutex // guards what follows
	open   map[net.Conn]bool
	closed bool
}

func (f *forwarder) serve(ctx context.Context, l net.Listener) {
	for {
		in, err := l.Accept()
		if err != nil {
			return // closed
		}
		f.wait.Add(1)
		go func() {
			defer f.wait.Done()
			f.carry(ctx, in)
		}()
	}
}

// carry joins two connections until one of them ends.
func (f *forwarder) carry(ctx context.Context, in net.Conn) {
	defer in.Close()
	out, err := (&net.Dialer{}).DialContext(ctx, "tcp", f.to)
	if err != nil {
		return // the client sees its connection end, as with a server that is down
	}
	defer out.Close()
	if !f.add(in, out) {
		return
	}
	defer f.remove(in, out)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(out, in) // either end may close at any time
		out.Close()
	}()
	_, _ = io.Copy(in, out)
	in.Close()
	<-done
}

func (f *forwarder) add(conns ...net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range conns {
		f.open[c] = true
	}
	return !f.closed
}

func (f *forwarder) remove(conns ...net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range conns {
		delete(f.open, c)
	}
}

func (f *forwarder) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for c := range f.open {
		c.Close()
	}
}
