package exec

import (
	"io"
	"os"
	"reflect"
)

// headWriter keeps the first max bytes and swallows the rest. One goroutine
// writes; reading is safe once the child's output has been copied.
type headWriter struct {
	max int
	buf []byte
}

func (h *headWriter) Write(b []byte) (int, error) {
	if room := h.max - len(h.buf); room > 0 {
		h.buf = append(h.buf, b[:min(room, len(b))]...)
	}
	return len(b), nil
}

func (h *headWriter) String() string { return string(h.buf) }

func isFile(w io.Writer) bool {
	_, ok := w.(*os.File)
	return ok
}

// sameWriter reports whether a and b are one and the same pointer.
func sameWriter(a, b io.Writer) bool {
	if a == nil || b == nil {
		return false
	}
	ta := reflect.TypeOf(a)
	return ta == reflect.TypeOf(b) && ta.Comparable() && a == b
}
