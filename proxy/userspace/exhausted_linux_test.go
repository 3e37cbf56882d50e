package userspace

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// exhaustEnv says that TestOutOfDescriptors is in a process of its own, whose
// limit it may reach.
const exhaustEnv = "KPTRACE_TEST_EXHAUST"

// TestOutOfDescriptors really has the kernel refuse descriptors, first to accept
// and then to dial: connections wait, datagrams are dropped, both are said and
// counted, and all goes on when there are descriptors again.
func TestOutOfDescriptors(t *testing.T) {
	if os.Getenv(exhaustEnv) != "" {
		outOfDescriptors(t)
		return
	}
	t.Parallel()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	_, err = exec.Run(t.Context(), exec.Spec{Path: os.Args[0], Args: []string{"-test.run=^TestOutOfDescriptors$", "-test.v"},
		Env: []string{exhaustEnv + "=1"}, Netns: ns.Fd()})
	var failed *exec.Error
	if errors.As(err, &failed) {
		t.Fatalf("%v\n%s", err, failed.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func outOfDescriptors(t *testing.T) {
	ns, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var said safeBuffer
	p := newPlaceIn(t, Config{MaxDescriptors: 1 << 16, Logger: slog.New(slog.NewTextHandler(&said, nil))}, ns)
	p.must(p.apply(
		serviceOf("a", false, vip, patientServer(t, "127.0.1.1:0")),
		serviceOf("dns", true, udpVIP, p.echoUDP("127.0.1.1:0", "")),
	))
	const n = 5
	var clients []int
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		p.must(err)
		defer unix.Close(fd)
		p.must(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience / time.Second)}))
		clients = append(clients, fd)
	}
	udp, err := p.dial("127.0.0.5", "udp", udpVIP)
	p.must(err)

	// Take all there are.
	p.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 256, Max: 256}))
	var taken []int
	for {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EMFILE) {
			break
		}
		p.must(err)
		taken = append(taken, fd)
	}
	free := func(n int) {
		for _, fd := range taken[:n] {
			_ = unix.Close(fd)
		}
		taken = taken[n:]
	}

	at, start := netip.MustParseAddrPort(vip), time.Now()
	for _, fd := range clients {
		p.must(unix.Connect(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}))
	}
	until(t, "accepting is refused", func() bool { return p.b.RelayStats().Exhausted >= 3 })
	// It tries again after 5 ms, 10 ms, 20 ms and so on, up to a second.
	if tries, took := p.b.RelayStats().Exhausted, time.Since(start); tries > 9+uint64(took/time.Second) {
		t.Errorf("tried %d times in %v", tries, took)
	}
	if !strings.Contains(said.String(), "connections queue in the kernel") {
		t.Errorf("said %q", said.String())
	}
	_, err = udp.Write([]byte("x"))
	p.must(err)
	until(t, "a datagram is dropped", func() bool { return p.b.RelayStats().Dropped == 1 })

	free(1)
	until(t, "dialling is refused", func() bool { return strings.Contains(said.String(), "a connection waits for one") })
	if s := p.b.RelayStats(); s.Accepted != 1 || s.Connected != 0 || s.Unserved != 0 {
		t.Errorf("with one descriptor: %+v", s)
	}

	free(len(taken))
	for _, fd := range clients {
		answer := make([]byte, 16)
		if n, err := unix.Read(fd, answer); err != nil || string(answer[:n]) != "one" {
			t.Errorf("with descriptors again: %q, %v", answer[:max(n, 0)], err)
		}
	}
	if got, err := exchange(udp, []byte("y")); err != nil || string(got) != "y" {
		t.Errorf("with descriptors again: %q, %v", got, err)
	}
	if s := p.b.RelayStats(); s.Accepted != n || s.Retried != 0 || s.Failed != 0 || s.Unserved != 0 {
		t.Errorf("stats %+v", s)
	}
}

// patientServer says "one" to each client, and goes on when it has no descriptor
// for one.
func patientServer(t *testing.T, at string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			switch {
			case errors.Is(err, net.ErrClosed):
				return
			case err != nil:
				time.Sleep(5 * time.Millisecond)
			default:
				fmt.Fprint(c, "one")
				c.Close()
			}
		}
	}()
	return addrOf(l.Addr())
}

// safeBuffer may be written and read at once.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
