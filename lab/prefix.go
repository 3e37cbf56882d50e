package lab

import (
	"bytes"
	"io"
	"sync"
)

// prefixer puts a prefix before each line. What is not a whole line is held
// back until it is one.
type prefixer struct {
	mu     sync.Mutex
	out    io.Writer
	prefix string
	rest   []byte
}

func (p *prefixer) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest = append(p.rest, b...)
	for {
		i := bytes.IndexByte(p.rest, '\n')
		if i < 0 {
			return len(b), nil
		}
		line := append([]byte(p.prefix), p.rest[:i+1]...)
		p.rest = p.rest[i+1:]
		if _, err := p.out.Write(line); err != nil {
			return len(b), err
		}
	}
}
