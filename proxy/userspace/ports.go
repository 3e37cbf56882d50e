package userspace

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
)

// PortRange is a range of ports, both ends included. The zero value is none.
type PortRange struct{ First, Last uint16 }

// ParsePortRange reads "30000-30999", "30000+999" or "30000", as kube-proxy's
// --proxy-port-range; "" and "0-0" are no range.
func ParsePortRange(s string) (PortRange, error) {
	bad := func(why string) (PortRange, error) {
		return PortRange{}, fmt.Errorf("port range %q: %s; write it as 30000-30999", s, why)
	}
	s = strings.TrimSpace(s)
	if s == "" || s == "0" || s == "0-0" {
		return PortRange{}, nil
	}
	sep := strings.IndexAny(s, "-+")
	from, to := s, s
	if sep >= 0 {
		from, to = s[:sep], s[sep+1:]
	}
	first, err := strconv.ParseUint(from, 10, 16)
	if err != nil {
		return bad("the first port is no number from 1 to 65535")
	}
	last, err := strconv.ParseUint(to, 10, 16)
	if err != nil {
		return bad("the last port is no number from 1 to 65535")
	}
	if sep >= 0 && s[sep] == '+' {
		last += first
	}
	switch {
	case first == 0:
		return bad("port 0 cannot be used")
	case last > 65535:
		return bad("it ends beyond 65535")
	case last < first:
		return bad("it ends before it begins")
	}
	return PortRange{uint16(first), uint16(last)}, nil
}

// Size is the number of ports.
func (r PortRange) Size() int {
	if r == (PortRange{}) {
		return 0
	}
	return int(r.Last) - int(r.First) + 1
}

// String returns "30000-30999", or "" for none.
func (r PortRange) String() string {
	if r == (PortRange{}) {
		return ""
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// errPortsFull says that no port of the range is left.
var errPortsFull = errors.New("no port of --proxy-port-range is free")

// ports hands out the ports of a range. Without one it hands out 0, which lets
// the kernel choose.
type ports struct {
	of PortRange

	mu   sync.Mutex
	used map[uint16]bool
}

func newPorts(r PortRange) *ports { return &ports{of: r, used: make(map[uint16]bool)} }

// take calls try with free ports, from a random one on, until it returns nil.
// A port that try refuses because others have it is passed over; busy tells.
func (p *ports) take(try func(port uint16) error, busy func(error) bool) error {
	size := p.of.Size()
	if size == 0 {
		return try(0)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	start, others := rand.IntN(size), 0
	for i := range size {
		port := p.of.First + uint16((start+i)%size)
		if p.used[port] {
			continue
		}
		err := try(port)
		if err == nil {
			p.used[port] = true
			return nil
		}
		if !busy(err) {
			return err
		}
		others++
	}
	return fmt.Errorf("%w: of the %d ports of %s, %d serve Services and %d are held by other programs; widen the range",
		errPortsFull, size, p.of, len(p.used), others)
}

func (p *ports) release(port uint16) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.used, port)
}

func (p *ports) free() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.of.Size() - len(p.used)
}
