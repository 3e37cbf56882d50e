package nfnl

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
)

// A counter is made, fed by a rule, read, kept while the rule is there, and
// removed.
func TestCounter(t *testing.T) {
	const name = "kptrace_test_pkts"
	if _, err := Counter(name); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an absent counter: %v, want fs.ErrNotExist", err)
	}
	for range 2 {
		if err := EnsureCounter(name); err != nil {
			t.Fatal(err)
		}
	}
	rules := func(verb string) {
		t.Helper()
		in := "*filter\n" + verb + " OUTPUT -d 127.0.0.0/8 -p udp -m nfacct --nfacct-name " + name + "\nCOMMIT\n"
		if _, err := exec.Run(t.Context(), exec.Spec{Path: "iptables-nft-restore", Args: []string{"--noflush"}, Stdin: strings.NewReader(in)}); err != nil {
			t.Fatal(err)
		}
	}
	rules("-A")
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for range 3 {
		// Nobody listens; the answer to that may come back as an error.
		_ = unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}})
	}
	if n, err := Counter(name); err != nil || n != 3 {
		t.Errorf("counted %d packets, %v; want 3", n, err)
	}
	if err := DeleteCounter(name); !errors.Is(err, unix.EBUSY) {
		t.Errorf("deleting a counter in use: %v, want EBUSY", err)
	}
	rules("-D")
	for range 2 {
		if err := DeleteCounter(name); err != nil {
			t.Fatal(err)
		}
	}
}
