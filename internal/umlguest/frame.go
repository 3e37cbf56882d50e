package umlguest

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// kind is the first byte of a frame on the serial line; four bytes of length,
// big endian, and the content follow.
type kind byte

const (
	// From the guest.
	kindHello  kind = 'H' // the line is open: send the order
	kindBooted kind = 'B' // Info as JSON: modules are loaded, the program starts
	kindStdout kind = 'O'
	kindStderr kind = 'E'
	kindExit   kind = 'X' // the exit code, four bytes; nothing comes after it
	kindFailed kind = 'F' // why the program could not start; nothing comes after it

	// From the host.
	kindOrder  kind = 'S' // an order as JSON
	kindStdin  kind = 'I' // empty at its end
	kindSignal kind = 'K' // the signal's number, four bytes
)

// maxFrame bounds what a frame may hold; more is a broken line.
const maxFrame = 1 << 20

// frameWriter writes whole frames from any goroutine.
type frameWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (f *frameWriter) write(k kind, b []byte) error {
	if len(b) > maxFrame {
		return fmt.Errorf("umlguest: a frame of %d bytes", len(b))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	frame := make([]byte, 5, 5+len(b))
	frame[0] = byte(k)
	binary.BigEndian.PutUint32(frame[1:], uint32(len(b)))
	_, err := f.w.Write(append(frame, b...))
	return err
}

func (f *frameWriter) number(k kind, n int) error {
	return f.write(k, binary.BigEndian.AppendUint32(nil, uint32(int32(n))))
}

// stream is one of the program's outputs.
type stream struct {
	to   *frameWriter
	kind kind
}

func (s stream) Write(b []byte) (int, error) {
	for done := 0; done < len(b); {
		part := b[done:min(done+16<<10, len(b))]
		if err := s.to.write(s.kind, part); err != nil {
			return done, err
		}
		done += len(part)
	}
	return len(b), nil
}

// readFrame reads the next frame.
func readFrame(r io.Reader) (kind, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("umlguest: the serial line is broken: a frame %q of %d bytes", head[0], n)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return kind(head[0]), b, err
}

func frameNumber(b []byte) int {
	if len(b) != 4 {
		return -1
	}
	return int(int32(binary.BigEndian.Uint32(b)))
}

// order is what the host asks the guest's init to do.
type order struct {
	Path    string   `json:"path"` // our binary
	Args    []string `json:"args"` // with the program's name
	Env     []string `json:"env"`
	Dir     string   `json:"dir"`
	Share   []string `json:"share"`
	Modules []string `json:"modules"`
	Stdin   bool     `json:"stdin"` // frames of it will come
}
