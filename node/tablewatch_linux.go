package node

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
	"github.com/kptrace/kptrace/trace/source/wire"
)

const (
	// countEvery is how often connection tracking's counters are looked at, and
	// countSoon while the table is full.
	countEvery = time.Second
	countSoon  = 100 * time.Millisecond
	// fullFor is how long after the last packet dropped for want of room the devices
	// are looked at.
	fullFor = time.Minute
	// fullDevices bounds the devices looked at, fullTick is how often.
	fullDevices = 512
	fullTick    = 50 * time.Millisecond
)

// tableWatch reads connection tracking's counters. While the table is full no rule
// sees the packets that are dropped for it, so it looks for first packets at the
// devices then.
type tableWatch struct {
	t       *tracer
	conn    *conntrack.Conn
	devices pathExtra
	decoder *wire.Decoder
	on      bool
	// raw are the rules that may keep a packet from being tracked, as of the begin.
	raw []string
}

// watchTable tells the correlator what connection tracking counts, until ctx ends.
func (t *tracer) watchTable(ctx context.Context) error {
	conn, err := conntrack.Open(conntrack.Config{})
	if err != nil {
		t.logger.Warn("connection tracking's counters cannot be read: connections dropped by a full table are not told", "err", err)
		return nil
	}
	defer conn.Close()
	w := &tableWatch{t: t, conn: conn}
	defer w.end()
	before, err := conn.Stats()
	if err != nil {
		t.logger.Warn("connection tracking's counters cannot be read: connections dropped by a full table are not told", "err", err)
		return nil
	}
	read := time.Now()
	var until time.Time
	for {
		wait := countEvery
		if w.on {
			wait = countSoon
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		now, err := conn.Stats()
		if err != nil {
			continue
		}
		x := correlate.Counted{From: read.UnixNano(), Entries: max(before.Entries, now.Entries), Limit: now.Limit}
		if now.Drop >= before.Drop { // it wraps
			x.Drop = now.Drop - before.Drop
		}
		before, read = now, time.Now()
		x.To = read.UnixNano()
		if x.Drop > 0 || now.Limit > 0 && now.Entries >= now.Limit {
			until = read.Add(fullFor)
		}
		switch full := read.Before(until); {
		case full && !w.on:
			w.begin(ctx)
		case !full && w.on:
			w.end()
		}
		err = t.do(ctx, func(c *correlate.Correlator) { c.Counted(x) })
		if err != nil && ctx.Err() != nil {
			return nil
		}
	}
}

// begin looks at the devices from now on.
func (w *tableWatch) begin(ctx context.Context) {
	w.on = true
	w.raw = untracked(ctx)
	src := wire.New(wire.Config{Ports: w.ports(), MaxDevices: fullDevices, Tick: fullTick, OnLoss: w.t.losses.add})
	w.decoder = src.Decoder()
	w.devices.run(ctx, src, func(f trace.Frame) { w.frame(ctx, f) })
	if err := w.devices.fault.Load(); err != nil {
		w.t.logger.Warn("the table of connections is full, and the devices cannot be looked at: connections dropped for it are not told", "err", *err)
	}
}

func (w *tableWatch) end() {
	w.on = false
	w.devices.end()
}

// ports are those of Services.
func (w *tableWatch) ports() (ports []uint16) {
	views := w.t.views()
	if len(views) == 0 || views[0].Snapshot == nil {
		return nil
	}
	for i := range views[0].Snapshot.Services {
		s := &views[0].Snapshot.Services[i]
		ports = append(ports, s.Port)
		if s.NodePort != 0 {
			ports = append(ports, s.NodePort)
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// frame tells the correlator of first packets. Whether they are for a Service it
// knows itself.
func (w *tableWatch) frame(ctx context.Context, f trace.Frame) {
	list := w.decoder.Decode(f, nil)
	list = slices.DeleteFunc(list, func(s trace.Sighting) bool {
		p := &s.Packet
		return p.Tuple.Proto() == conntrack.TCP && p.Name() != "SYN" || passesBy(w.raw, p.Tuple.Dst().Addr())
	})
	if len(list) == 0 {
		return
	}
	_ = w.t.do(ctx, func(c *correlate.Correlator) {
		for i := range list {
			c.Witnessed(list[i].Packet.Tuple, list[i].Packet.Seq, list[i].Time)
		}
	})
}

// untracked lists rules of table raw that may drop packets before they are tracked, or
// keep them from being tracked.
func untracked(ctx context.Context) (rules []string) {
	var tools xtables.Tools
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
			table := "raw"
			if fl == xtables.Legacy {
				table = "" // those there are: asking for one makes it
			}
			text, err := tools.SaveText(ctx, fl, fa, table, false)
			if err != nil {
				continue
			}
			raw := false
			for line := range strings.Lines(text) {
				if strings.HasPrefix(line, "*") {
					raw = strings.TrimSpace(line) == "*raw"
				}
				if !raw {
					continue
				}
				if strings.Contains(line, "NOTRACK") || strings.Contains(line, "--notrack") || strings.Contains(line, "-j DROP") {
					rules = append(rules, line)
				}
			}
		}
	}
	return rules
}

// passesBy reports whether one of these rules may be about packets to an address.
func passesBy(rules []string, to netip.Addr) bool {
	for _, r := range rules {
		_, rest, ok := strings.Cut(r, " -d ")
		if !ok || strings.Contains(r, "! -d ") {
			return true
		}
		dst, _, _ := strings.Cut(rest, " ")
		if p, err := netip.ParsePrefix(dst); err != nil || p.Contains(to) {
			return true
		}
	}
	return false
}
