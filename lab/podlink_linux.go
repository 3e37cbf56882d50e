package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
)

// errGone is what a pod whose program has ended says to every order.
var errGone = errors.New("its program has ended")

// pod is a Pod of a running lab.
type pod struct {
	*Pod
	lab   *Lab
	space *space

	mu      sync.Mutex
	link    *podLink // nil while killed
	talking bool     // its client was started
	faults  []string
}

// podLink is a pod's running program and the line to it.
type podLink struct {
	proc *exec.Process
	line *os.File

	mu      sync.Mutex
	seq     int
	waiting map[int]chan error
	gone    bool
}

// launch starts the pod's program and waits until it serves.
func (p *pod) launch(ctx context.Context) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("making a line: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return fmt.Errorf("making a line: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "pod"), os.NewFile(uintptr(fds[1]), "lab")
	defer theirs.Close()
	self := p.lab.cfg.Self
	proc, err := exec.Start(exec.Spec{
		Path: self[0], Argv0: "kptrace", Args: append(append([]string{}, self[1:]...), "lab", "pod"),
		ExtraFiles: []*os.File{theirs}, Netns: p.space.ns.Fd(), OwnGroup: true, Stderr: os.Stderr,
		Env: []string{"GOMAXPROCS=2"}, // there may be dozens of them
	})
	if err != nil {
		ours.Close()
		return err
	}
	link := &podLink{proc: proc, line: ours, waiting: map[int]chan error{}}
	go link.read(p.lab.report)
	p.link = link
	spec := podSpec{ID: p.ID(), Addr: p.Addr.String(), Serves: p.Serves, Traffic: p.Traffic}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return link.do(ctx, order{Do: doSpec, Spec: &spec})
}

// end kills the program and waits for its end.
func (p *pod) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.link != nil {
		p.link.end()
		p.link = nil
	}
}

func (k *podLink) end() {
	_ = k.proc.Kill()
	<-k.proc.Done()
	k.line.Close()
}

// read takes what the program says until it ends.
func (k *podLink) read(report func(*Report)) {
	lines := bufio.NewScanner(k.line)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var w word
		if err := json.Unmarshal(lines.Bytes(), &w); err != nil {
			continue
		}
		if w.Report != nil {
			report(w.Report)
			continue
		}
		var err error
		if w.Err != "" {
			err = errors.New(w.Err)
		}
		k.mu.Lock()
		if ch := k.waiting[w.Seq]; ch != nil {
			ch <- err
			delete(k.waiting, w.Seq)
		}
		k.mu.Unlock()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.gone = true
	for _, ch := range k.waiting {
		ch <- errGone
	}
	clear(k.waiting)
}

// do gives an order and waits until it is carried out.
func (k *podLink) do(ctx context.Context, o order) error {
	k.mu.Lock()
	if k.gone {
		k.mu.Unlock()
		return errGone
	}
	k.seq++
	o.Seq = k.seq
	ch := make(chan error, 1)
	k.waiting[o.Seq] = ch
	b, err := json.Marshal(o)
	if err == nil {
		_, err = k.line.Write(append(b, '\n'))
	}
	k.mu.Unlock()
	if err != nil {
		return fmt.Errorf("giving an order: %w", err)
	}
	select {
	case err := <-ch:
		return err
	case <-ctx.Done():
		return fmt.Errorf("waiting for %q: %w", o.Do, context.Cause(ctx))
	}
}
