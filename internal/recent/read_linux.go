package recent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Read reads a list of the calling thread's network namespace, the client that was
// not seen for longest first. A list that is not there is empty.
func Read(name string) ([]Entry, error) {
	if filepath.Base(name) != name {
		return nil, fmt.Errorf("recent: bad name %q", name)
	}
	text, err := os.ReadFile("/proc/thread-self/net/xt_recent/" + name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(text) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("recent: %w", err)
	}
	c, err := now()
	if err != nil {
		return nil, err
	}
	return parse(string(text), c), nil
}

// now reads the kernel's count of ticks: it starts five minutes before 32 bits are
// full, and goes with the monotonic clock. The coarse clock's resolution is a tick.
func now() (*clock, error) {
	var tick, mono unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil {
		return nil, fmt.Errorf("recent: asking for the length of a tick: %w", err)
	}
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
		return nil, fmt.Errorf("recent: reading the clock: %w", err)
	}
	if tick.Nano() <= 0 {
		return nil, errors.New("recent: the kernel does not tell how long a tick is")
	}
	const ahead = 300 * time.Second
	first := uint64(1)<<32 - uint64(int64(ahead)/tick.Nano())
	return &clock{now: time.Now(), ticks: first + uint64(mono.Nano()/tick.Nano()), tick: time.Duration(tick.Nano())}, nil
}

// Limit is how many clients a list keeps (ip_list_tot of xt_recent), the kernel's
// default where it does not say.
func Limit() int {
	text, err := os.ReadFile("/sys/module/xt_recent/parameters/ip_list_tot")
	if err == nil {
		if n, err := strconv.Atoi(string(bytes.TrimSpace(text))); err == nil && n > 0 {
			return n
		}
	}
	return 100
}
