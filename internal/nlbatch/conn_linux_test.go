package nlbatch

import (
	"encoding/binary"
	"errors"
	"net"
	"syscall"
	"testing"

	"github.com/kptrace/kptrace/internal/netns"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { netns.Main(m) }

// address is a request to give lo an address, or to take it away.
func address(typ, flags uint16, ip net.IP) Message {
	b := []byte{unix.AF_INET, 32, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, 1) // lo
	return Message{Type: typ, Flags: flags, Body: Attr(b, unix.IFA_LOCAL, ip.To4()...)}
}

// Far more requests than one call holds are taken in their order; those that
// are refused are told apart, wherever they stand.
func TestDo(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		c, err := Open(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer c.Close()
		const n = 1500
		var add, again, remove []Message
		for i := range n {
			ip := net.IPv4(10, 1, byte(i>>8), byte(i))
			m := address(unix.RTM_NEWADDR, FlagCreate|FlagExcl, ip)
			add, again = append(add, m), append(again, m)
			if i%3 == 0 { // twice: the second is refused
				add = append(add, m)
			}
			remove = append(remove, address(unix.RTM_DELADDR, 0, ip))
		}
		results, err := c.Do(add)
		if err != nil {
			return err
		}
		refused := 0
		for i, err := range results {
			if err == nil {
				continue
			}
			refused++
			if !errors.Is(err, syscall.EEXIST) || i == 0 || string(add[i].Body) != string(add[i-1].Body) {
				t.Fatalf("request %d: %v", i, err)
			}
		}
		if refused != n/3 {
			t.Errorf("%d refused, want %d", refused, n/3)
		}
		if list, err := net.InterfaceAddrs(); err != nil || len(list) < n {
			t.Errorf("%d addresses, %v", len(list), err)
		}
		if results, err = c.Do(again); err != nil { // all of them refused
			return err
		}
		for i, err := range results {
			if !errors.Is(err, syscall.EEXIST) {
				t.Fatalf("request %d again: %v", i, err)
			}
		}
		results, err = c.Do(remove)
		for i := range results {
			if results[i] != nil {
				t.Fatalf("removing %d: %v", i, results[i])
			}
		}
		if _, err := c.Do(nil); err != nil {
			t.Errorf("nothing to do: %v", err)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
