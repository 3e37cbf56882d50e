package nfnl

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// EnsureCounter makes a named counter in the calling thread's network
// namespace unless it is there. It needs CAP_NET_ADMIN in the namespace and a
// kernel with nfnetlink_acct (3.3).
func EnsureCounter(name string) error {
	_, err := counter(acctNew, name)
	if errors.Is(err, unix.EBUSY) {
		return nil // it is there
	}
	return err
}

// DeleteCounter removes a named counter. One that is absent is no error; one
// that a rule feeds stays, which is EBUSY.
func DeleteCounter(name string) error {
	_, err := counter(acctDel, name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// Counter returns how many packets a named counter has seen. Without such a
// counter the error wraps fs.ErrNotExist.
func Counter(name string) (packets uint64, err error) {
	answer, err := counter(acctGet, name)
	if err != nil {
		return 0, err
	}
	for m := NewMessages(answer); m.Next(); {
		for a := m.Attrs(); a.Next(); {
			if a.Type == acctPackets {
				return a.Uint64(), nil
			}
		}
	}
	return 0, fmt.Errorf("nfnl: counter %s: the kernel's answer has no packets: %w", name, unix.ENODATA)
}

func counter(msg uint8, name string) (answer []byte, err error) {
	runtime.LockOSThread() // Open means the calling thread's namespace
	defer runtime.UnlockOSThread()
	s, err := Open(1 << 13)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	attrs := AppendAttr(nil, acctName, append([]byte(name), 0)...)
	if msg == acctGet {
		answer, err = s.Query(Type(SubsysAcct, msg), FamilyUnspec, attrs)
	} else {
		err = s.Request(Type(SubsysAcct, msg), FamilyUnspec, 0, attrs)
	}
	if err != nil {
		return nil, fmt.Errorf("nfnl: counter %s: %w", name, err)
	}
	return answer, nil
}
