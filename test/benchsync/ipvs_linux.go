package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/umlguest"
)

const (
	modeIPVS = "ipvs"
	// guestMemory holds etcd, an API server and a proxy, in MiB.
	guestMemory = 3072
)

// extent is how often small changes are made, and how many of them: fewer where
// each takes the proxy minutes.
func (b *besides) extent() (times, changes int) {
	switch full := b.Full.Seconds; {
	case !b.o.guest:
		return rounds, 3
	case full < 10:
		return 3, 3
	case full < 60:
		return 1, 3
	}
	return 1, 1
}

// rest is how long nothing must have happened for the proxy to be at rest.
func (o *options) rest() time.Duration {
	if o.guest {
		return 2 * time.Second
	}
	return 400 * time.Millisecond
}

// poll is how long to wait between two looks at a proxy's metrics, each of which
// costs the one CPU of a guest some 20 ms.
func (o *options) poll() time.Duration {
	if o.guest {
		return 500 * time.Millisecond
	}
	return 20 * time.Millisecond
}

// say tells how far it is, where that takes long.
func (o *options) say(format string, args ...any) {
	if o.guest {
		up, _ := os.ReadFile("/proc/uptime")
		seconds, _, _ := strings.Cut(string(up), " ")
		fmt.Fprintf(os.Stderr, "%6s s: %s\n", seconds, fmt.Sprintf(format, args...))
	}
}

// inGuest measures mode ipvs at growing sizes, and prints each when it is done.
func inGuest(o options) error {
	binary, err := filepath.Abs(o.binary)
	if err != nil {
		return err
	}
	fmt.Printf("modes ipvs and iptables, Services of 10 endpoints; each proxy alone against the same API server, all of it in one guest;\n"+
		"\"> N s\" is where a proxy was not done after the %v it is given; no periodic syncs (--ipvs-sync-period=24h); this takes a quarter to a whole hour\n\n", o.limit)
	missed := false
	sizes := []int{50, 200, 1000}
	switch {
	case o.quick:
		sizes = sizes[:1]
	case o.services > 0:
		sizes = []int{o.services}
	}
	for i, services := range sizes {
		start := time.Now()
		var about umlguest.Info
		rs, err := oneGuest(o, binary, services, &about)
		if err != nil {
			return fmt.Errorf("at %d Services: %w", services, err)
		}
		if i == 0 {
			fmt.Printf("user-mode Linux %s, %d CPU; system calls and starts of programs take some ten times as long as usual\n\n", about.Release, about.CPUs)
			printBesideHead()
		}
		for i := 0; i+1 < len(rs); i += 2 {
			theirs, ours := rs[i], rs[i+1]
			missed = missed || theirs.Mode == modeIPVS && !(ours.Full.less(theirs.Full) && (theirs.Full.More || ours.Endpoint.less(theirs.Endpoint)))
			for _, r := range []*besideResult{&theirs, &ours} {
				r.Flavour = "iptables"
				if r.Mode == modeIPVS {
					r.Flavour = modeIPVS
				}
			}
			printPair(theirs, ours)
		}
		fmt.Fprintf(os.Stderr, "%d Services took %v; load of the machine now %s\n", services, time.Since(start).Round(time.Second), load())
	}
	if missed {
		return errors.New("kptrace is not faster than upstream in both")
	}
	return nil
}

// oneGuest measures one size.
func oneGuest(o options, binary string, services int, about *umlguest.Info) (rs []besideResult, err error) {
	c, err := json.Marshal(cell{Mode: modeIPVS, Services: services, Endpoints: 10})
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	code, err := umlguest.Run(context.Background(), umlguest.Spec{
		Args:   []string{"-guest", "-beside", string(c), "-limit", o.limit.String(), "-kptrace", binary},
		Stdout: &out, Stderr: os.Stderr, Memory: guestMemory, Booted: func(i umlguest.Info) { *about = i },
	})
	if err != nil {
		return nil, err
	}
	if code != 0 {
		return nil, fmt.Errorf("measuring in the guest ended with code %d", code)
	}
	return rs, json.NewDecoder(&out).Decode(&rs)
}

// balanced refuses to measure a sync after which not all endpoints are in IPVS.
func (b *besides) balanced() error {
	res, err := exec.Run(context.Background(), exec.Spec{Path: "cat", Args: []string{"/proc/net/ip_vs"}, Netns: b.ns.Fd()})
	if err != nil {
		return err
	}
	virtual, reals := 0, 0
	for l := range strings.Lines(string(res.Stdout)) {
		switch {
		case strings.HasPrefix(l, "TCP "):
			virtual++
		case strings.HasPrefix(l, "  -> ") && !strings.Contains(l, "RemoteAddress"):
			reals++
		}
	}
	if virtual < b.Services || reals < b.Services*b.Endpoints {
		return fmt.Errorf("after the first full sync there are %d virtual servers and %d real ones, want %d and %d", virtual, reals, b.Services, b.Services*b.Endpoints)
	}
	return nil
}
