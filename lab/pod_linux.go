package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// podFD is the descriptor over which a pod's program and the lab talk.
const podFD = 3

// RunPod is the program of a pod: `kptrace lab pod`, which the lab starts in
// the pod's namespace with a socket as descriptor 3. It returns when the lab
// hangs up.
func RunPod() error {
	f := os.NewFile(podFD, "lab")
	if _, err := f.Stat(); err != nil {
		return errors.New("lab: this command is for the lab itself, which starts it in its pods")
	}
	p := podProgram{out: json.NewEncoder(f)}
	return p.run(f)
}

type podProgram struct {
	mu  sync.Mutex
	out *json.Encoder

	spec   podSpec
	server *server
	stop   context.CancelFunc
	ended  chan struct{}
	abort  atomic.Bool // what clients do, see doAbort
}

func (p *podProgram) say(w word) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.out.Encode(w) // if nobody listens, our end is near
}

func (p *podProgram) run(in io.Reader) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var o order
		if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
			return fmt.Errorf("lab: reading an order: %w", err)
		}
		if o.Do == doStop { // takes its time
			stop, ended := p.stop, p.ended
			p.stop = nil
			go func() {
				if stop != nil {
					stop()
					<-ended
				}
				p.say(word{Seq: o.Seq})
			}()
			continue
		}
		p.say(answer(o, p.obey(ctx, o)))
	}
	return lines.Err()
}

func answer(o order, err error) word {
	w := word{Seq: o.Seq}
	if err != nil {
		w.Err = err.Error()
	}
	return w
}

func (p *podProgram) obey(ctx context.Context, o order) error {
	if p.server == nil && o.Do != doSpec {
		return errors.New("lab: pod has no spec yet")
	}
	switch o.Do {
	case doSpec:
		p.spec = *o.Spec
		p.server = &server{id: p.spec.ID, ports: p.spec.Serves}
		return p.server.listen(ctx)
	case doListen:
		return p.server.listen(ctx)
	case doRefuse:
		p.server.refuse()
		return nil
	case doSlow:
		p.server.delay.Store(int64(min(o.Delay, time.Minute)))
		return nil
	case doReset:
		p.server.reset.Store(o.On)
		return nil
	case doLarge:
		p.server.large.Store(o.On)
		return nil
	case doAbort:
		p.abort.Store(o.On)
		return nil
	case doStart:
		return p.obeyStart(ctx)
	}
	return fmt.Errorf("lab: unknown order %q", o.Do)
}

func (p *podProgram) obeyStart(ctx context.Context) error {
	if p.stop != nil || len(p.spec.Traffic) == 0 {
		return nil
	}
	addr, err := netip.ParseAddr(p.spec.Addr)
	if err != nil {
		return fmt.Errorf("lab: pod's own address: %w", err)
	}
	c := client{id: p.spec.ID, addr: addr, abort: &p.abort, report: func(r *Report) { p.say(word{Report: r}) }}
	ctx, p.stop = context.WithCancel(ctx)
	ended := make(chan struct{})
	p.ended = ended
	go func() {
		defer close(ended)
		c.run(ctx, p.spec.Traffic)
	}()
	return nil
}
