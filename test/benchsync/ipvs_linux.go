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
	// guestRounds is how often small changes are made there: upstream takes a
	// while for each.
	guestRounds = 3
)

func (b *besides) rounds() int {
	if b.o.guest {
		return guestRounds
	}
	return rounds
}

// say tells how far it is, where that takes long.
func (o *options) say(format string, args ...any) {
	if o.guest {
		up, _ := os.ReadFile("/proc/uptime")
		seconds, _, _ := strings.Cut(string(up), " ")
		fmt.Fprintf(os.Stderr, "%6s s: %s\n", seconds, fmt.Sprintf(format, args...))
	}
}

// inGuest measures mode ipvs and prints it.
func inGuest(o options) error {
	services := 1000
	if o.quick {
		services = 50
	}
	binary, err := filepath.Abs(o.binary)
	if err != nil {
		return err
	}
	c, err := json.Marshal(cell{Mode: modeIPVS, Services: services, Endpoints: 10})
	if err != nil {
		return err
	}
	var out bytes.Buffer
	var about umlguest.Info
	spec := umlguest.Spec{
		Args:   []string{"-guest", "-beside", string(c), "-limit", o.limit.String(), "-kptrace", binary},
		Stdout: &out, Stderr: os.Stderr, Memory: guestMemory, Booted: func(i umlguest.Info) { about = i },
	}
	fmt.Printf("mode ipvs at %d Services of 10 endpoints, each proxy against the same API server, all of it in one guest; this takes up to half an hour\n", services)
	start := time.Now()
	code, err := umlguest.Run(context.Background(), spec)
	if err != nil {
		return err
	}
	if code != 0 {
		return fmt.Errorf("measuring in the guest ended with code %d", code)
	}
	var rs []besideResult
	if err := json.NewDecoder(&out).Decode(&rs); err != nil {
		return err
	}
	fmt.Printf("user-mode Linux %s, %d CPU, system calls some ten times slower than usual; small changes: the median of %d; %s in all\n\n",
		about.Release, about.CPUs, guestRounds, time.Since(start).Round(time.Second))
	fmt.Println("Services x endpoints  mode     proxy      full sync    one endpoint  Service added  removed    peak memory")
	missed := false
	for i := 0; i+1 < len(rs); i += 2 {
		theirs, ours := rs[i], rs[i+1]
		missed = missed || rs[i].Mode == modeIPVS && (ours.Full >= theirs.Full || !theirs.Unfinished && ours.Endpoint >= theirs.Endpoint)
		for _, r := range []*besideResult{&theirs, &ours} {
			r.Flavour = "iptables"
			if r.Mode == modeIPVS {
				r.Flavour = modeIPVS
			}
		}
		printPair(theirs, ours)
	}
	if missed {
		return errors.New("kptrace is not faster than upstream in both")
	}
	return nil
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
