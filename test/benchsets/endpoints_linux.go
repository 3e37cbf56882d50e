package main

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// firstPort is the port of the first of many endpoints, which are all at one
// address: what is measured does not depend on whether they answer.
const firstPort = 2000

// endpoints prints the curve of a Service with many endpoints: as rules, of which
// a packet passes half in the middle, and as one rule of nf_tables that looks into
// a map by a random number, which iptables cannot say.
func endpoints(sizes []int) error {
	fmt.Println("\nendpoints  flavour  kind   all programmed  one changed   first packet")
	for _, flavour := range []string{"nft", "legacy"} {
		for _, n := range sizes {
			kinds := []func(context.Context, *world) (figures, error){chosenByRules, chosenByMap}
			if flavour == "legacy" {
				kinds = kinds[:1]
			}
			for kind, measure := range kinds {
				f, err := measureIn(flavour, n, measure)
				if err != nil {
					return fmt.Errorf("%d endpoints, %s: %w", n, flavour, err)
				}
				fmt.Printf("%9d  %-7s  %-5s  %14s  %11s  %13s\n", n, flavour, []string{"rules", "map"}[kind], show(f.full), show(f.change), show(f.last))
			}
		}
	}
	return nil
}

// backends are the endpoints after the i-th change.
func (w *world) backends(change int) []proxy.Endpoint {
	list := make([]proxy.Endpoint, w.n)
	for i := range list {
		list[i] = proxy.Endpoint{Addr: netip.AddrPortFrom(endpoint.Addr(), uint16(firstPort+i)), Ready: true, Serving: true}
	}
	list[w.n/2].Addr = netip.AddrPortFrom(endpoint.Addr(), uint16(firstPort+w.n+change))
	return list
}

func chosenByRules(ctx context.Context, w *world) (figures, error) {
	b := w.backend()
	if _, _, err := b.Preflight(ctx); err != nil {
		return figures{}, err
	}
	return w.chosen(func(change int) error {
		s := w.snapshot()
		s.Services[0].Endpoints = w.backends(change)
		_, err := b.Apply(ctx, b.Render(s, proxy.Overlay{}))
		return err
	})
}

func chosenByMap(ctx context.Context, w *world) (figures, error) {
	if err := w.tool(ctx, "table ip bench {\n chain out { type nat hook output priority -100; }\n}\n", "nft", "-f", "-"); err != nil {
		return figures{}, err
	}
	return w.chosen(func(change int) error {
		var text strings.Builder
		fmt.Fprintf(&text, "flush chain ip bench out\nadd rule ip bench out ip daddr %s udp dport 53 dnat ip to numgen random mod %d map { ", vip, w.n)
		for i, e := range w.backends(change) {
			if i > 0 {
				text.WriteString(", ")
			}
			fmt.Fprintf(&text, "%d : %s . %d", i, e.Addr.Addr(), e.Addr.Port())
		}
		text.WriteString(" }\n")
		return w.tool(ctx, text.String(), "nft", "-f", "-")
	})
}

// chosen programs everything, changes one endpoint some times, and sends first
// packets.
func (w *world) chosen(program func(change int) error) (f figures, err error) {
	timed := func(change int) (time.Duration, error) {
		start := time.Now()
		err := program(change)
		return time.Since(start), err
	}
	if f.full, err = timed(0); err != nil {
		return f, err
	}
	var took []time.Duration
	for i := range changes {
		d, err := timed(i + 1)
		if err != nil {
			return f, err
		}
		took = append(took, d)
	}
	f.change = median(took)
	f.last, err = w.from(inLast, nil)
	return f, err
}
