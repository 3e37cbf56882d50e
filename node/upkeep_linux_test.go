package node

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
)

// TestDriftIsRepaired flushes chains under a running node.
func TestDriftIsRepaired(t *testing.T) {
	r := start(t, Config{})
	ep := serve(t)
	r.states <- snapshot(ep)
	answers := func() bool {
		who, err := ask()
		return err == nil && who == ep.String()
	}
	eventually(t, 5*time.Second, "the Service to work", answers)
	for _, args := range [][]string{{"-t", "nat", "-F"}, {"-t", "nat", "-F", "KUBE-SERVICES"}} {
		if _, err := exec.Run(t.Context(), exec.Spec{Path: "iptables-nft", Args: args}); err != nil {
			t.Fatal(err)
		}
		if answers() {
			t.Fatalf("the Service works after iptables %v", args)
		}
		eventually(t, 5*time.Second, "the repair", answers)
	}
}

// TestUDPClientMovesOn replaces the endpoint of a client that keeps sending.
func TestUDPClientMovesOn(t *testing.T) {
	serveUDP := func() netip.AddrPort {
		c, err := net.ListenUDP("udp", &net.UDPAddr{IP: hostIP.AsSlice()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		at := c.LocalAddr().(*net.UDPAddr).AddrPort()
		go func() {
			b := make([]byte, 64)
			for {
				_, from, err := c.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				_, _ = c.WriteToUDPAddrPort([]byte(at.String()), from)
			}
		}()
		return at
	}
	reconciled := make(chan conntrack.Reconciled, 16)
	r := start(t, Config{Reconciled: func(x conntrack.Reconciled) { reconciled <- x }})
	first, second := serveUDP(), serveUDP()
	state := snapshot(first)
	state.Services[0].Name.Proto = conntrack.UDP
	r.states <- state
	<-reconciled
	c, err := net.Dial("udp", clusterIP.String()+":80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answered := func(by netip.AddrPort) func() bool {
		return func() bool {
			_, _ = c.Write([]byte("?"))
			_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			b := make([]byte, 64)
			n, err := c.Read(b)
			return err == nil && string(b[:n]) == by.String()
		}
	}
	eventually(t, 5*time.Second, "the first endpoint", answered(first))
	next := *state
	next.Services = slices.Clone(state.Services)
	next.Services[0].Endpoints = slices.Clone(state.Services[0].Endpoints)
	next.Services[0].Endpoints[0].Addr = second
	r.states <- &next
	eventually(t, 5*time.Second, "the second endpoint", answered(second))
	if x := <-reconciled; x.Deleted == 0 || x.Err != nil {
		t.Errorf("%+v", x)
	}
}
