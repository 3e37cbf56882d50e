package recent

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
)

func TestMain(m *testing.M) {
	umlguest.Init()
	netns.Main(m)
}

func TestParse(t *testing.T) {
	c := &clock{now: time.Unix(1000, 0), ticks: 4295000000, tick: 4 * time.Millisecond}
	got := parse(`src=10.0.0.2 ttl: 64 last_seen: 4294999750 oldest_pkt: 1 4294999750
src=10.0.0.1 ttl: 0 last_seen: 4294975000 oldest_pkt: 2 4294974000, 4294975000
src=fd00:0000:0000:0000:0000:0000:0000:0001 ttl: 64 last_seen: 4295000100 oldest_pkt: 1 4295000100
src=nobody ttl: 1
`, c)
	want := []Entry{
		{netip.MustParseAddr("10.0.0.1"), time.Unix(900, 0)},
		{netip.MustParseAddr("10.0.0.2"), time.Unix(999, 0)},
		{netip.MustParseAddr("fd00::1"), time.Unix(1000, 0)},
	}
	if len(got) != len(want) {
		t.Fatalf("%+v", got)
	}
	for i := range want {
		if got[i].Client != want[i].Client || !got[i].Last.Equal(want[i].Last) {
			t.Errorf("%+v, want %+v", got[i], want[i])
		}
	}
}

// TestRead has this kernel, and one of another tick, keep a client, and wants the
// time of it within Slack.
func TestRead(t *testing.T) {
	t.Run("native", func(t *testing.T) { read(t, "iptables-nft") })
	t.Run("guest", func(t *testing.T) { guesttest.Group(t, func(t *testing.T) { read(t, "iptables-legacy") }) })
}

func read(t *testing.T, iptables string) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if got, err := Read("KUBE-SEP-X"); err != nil || got != nil {
			t.Errorf("before there is one: %v, %v", got, err)
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = exec.Run(t.Context(), exec.Spec{
		Path: iptables, Netns: ns.Fd(), Args: []string{"-A", "OUTPUT", "-p", "udp", "-m", "recent", "--name", "KUBE-SEP-X", "--set"},
	})
	if err != nil {
		t.Fatal(err)
	}
	err = ns.Do(func() error {
		before := time.Now()
		c, err := net.Dial("udp", "127.0.0.1:9")
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		after := time.Now()
		got, err := Read("KUBE-SEP-X")
		if err != nil || len(got) != 1 || got[0].Client != netip.MustParseAddr("127.0.0.1") {
			t.Fatalf("%v, %v", got, err)
		}
		if last := got[0].Last; last.Before(before.Add(-Slack)) || last.After(after.Add(Slack)) {
			t.Errorf("seen at %v, want about %v", last, after)
		} else {
			t.Logf("wrong by at most %v", max(after.Sub(last), last.Sub(before)).Round(time.Millisecond))
		}
		if _, err := Read("../x"); err == nil {
			t.Error("a list outside the folder was read")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
