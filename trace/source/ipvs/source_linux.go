package ipvs

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	mobyipvs "github.com/moby/ipvs"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// The flag of a persistent virtual server, and the bits of a server's flags
// that say how it gets its packets (linux/ip_vs.h).
const (
	flagPersistent = 0x1
	forwardMask    = 0x7
)

// connections is the table of connections and templates.
const connections = "ip_vs_conn"

// Run polls the calling thread's network namespace until ctx ends. A kernel
// without IPVS is no error: the note of Stats says so, and it is looked for
// again. It needs CAP_NET_ADMIN in the namespace.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	ready()
	var handle *mobyipvs.Handle
	defer func() {
		if handle != nil {
			handle.Close()
		}
	}()
	buf := new(bytes.Buffer)
	for {
		start := time.Now()
		var notes []error
		for _, table := range []string{"ip_vs", connections} {
			if err := s.read(table, buf, emit); err != nil {
				notes = append(notes, err)
			}
		}
		if len(notes) == 0 {
			var err error
			if handle == nil {
				handle, err = mobyipvs.New("")
			}
			if err == nil {
				err = s.count(handle)
			}
			if err != nil {
				notes = append(notes, fmt.Errorf("statistics: %w", err))
			}
		}
		note := ""
		if err := errors.Join(notes...); err != nil {
			note = err.Error()
			if errors.Is(err, fs.ErrNotExist) {
				note = "this kernel has no IPVS, or it is not loaded"
			}
		}
		s.tally.Note(note)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(s.config.Interval, share*time.Since(start))):
		}
	}
}

// templates counts the clients bound to each server.
func templates(table []byte) map[counterKey]int {
	n := map[counterKey]int{}
	for _, e := range NewDecoder().Decode(trace.Frame{Data: table}, nil) {
		if e.Kind == trace.KindTemplate {
			n[counterKey{e.Tuple.Proto(), e.Tuple.Dst(), e.Reply.Src()}]++
		}
	}
	return n
}

// read emits one table as it is now.
func (s *Source) read(table string, buf *bytes.Buffer, emit func(trace.Frame)) error {
	// Not /proc/net: that is the main thread's namespace.
	f, err := os.Open(filepath.Join(s.config.Proc, "thread-self/net", table))
	if err != nil {
		return err
	}
	defer f.Close()
	buf.Reset()
	n, err := buf.ReadFrom(io.LimitReader(f, mostBytes))
	if err != nil {
		return err
	}
	if table == connections {
		s.bound = templates(buf.Bytes())
	}
	s.tally.Frame(int(n))
	emit(trace.Frame{Source: trace.IPVS, Time: time.Now().UnixNano(), Data: buf.Bytes()})
	if n == mostBytes {
		return fmt.Errorf("%s is larger than %d bytes: the rest of it is not seen", table, mostBytes)
	}
	return nil
}

// count brings the statistics up to date.
func (s *Source) count(h *mobyipvs.Handle) error {
	services, err := h.GetServices()
	if err != nil {
		return err
	}
	all := make([]trace.VirtualServer, 0, len(services))
	seen := make(map[counterKey]counter, len(s.seen))
	for _, svc := range services {
		addr, ok := netip.AddrFromSlice(svc.Address)
		if !ok || svc.FWMark != 0 {
			continue
		}
		v := trace.VirtualServer{
			Addr:  netip.AddrPortFrom(addr.Unmap(), svc.Port),
			Proto: conntrack.Proto(svc.Protocol), Scheduler: svc.SchedName,
		}
		if svc.Flags&flagPersistent != 0 {
			v.Persistence = time.Duration(svc.Timeout) * time.Second
		}
		k := counterKey{v.Proto, v.Addr, netip.AddrPort{}}
		v.Total, v.Rate = s.total(seen, k, svc.Stats)
		servers, err := h.GetDestinations(svc)
		if err != nil {
			return err // it went away meanwhile, or the kernel is at odds with us
		}
		for _, d := range servers {
			addr, ok := netip.AddrFromSlice(d.Address)
			if !ok {
				continue
			}
			r := trace.RealServer{
				Addr:   netip.AddrPortFrom(addr.Unmap(), d.Port),
				Weight: d.Weight, Active: d.ActiveConnections, Inactive: d.InactiveConnections,
				Forwarding: forwarding(d.ConnectionFlags),
			}
			k.server = r.Addr
			r.Persistent = s.bound[k]
			r.Total, r.Rate = s.total(seen, k, mobyipvs.SvcStats(d.Stats))
			v.Servers = append(v.Servers, r)
		}
		slices.SortFunc(v.Servers, func(a, b trace.RealServer) int { return a.Addr.Compare(b.Addr) })
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b trace.VirtualServer) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Proto, b.Proto))
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.servers, s.seen = all, seen
	return nil
}

func (s *Source) total(seen map[counterKey]counter, k counterKey, st mobyipvs.SvcStats) (total, rate trace.Traffic) {
	c := s.seen[k].add(trace.Traffic{
		Connections: uint64(st.Connections), PacketsIn: uint64(st.PacketsIn), PacketsOut: uint64(st.PacketsOut),
		BytesIn: st.BytesIn, BytesOut: st.BytesOut,
	})
	seen[k] = c
	return c.total, trace.Traffic{
		Connections: uint64(st.CPS), PacketsIn: uint64(st.PPSIn), PacketsOut: uint64(st.PPSOut),
		BytesIn: uint64(st.BPSIn), BytesOut: uint64(st.BPSOut),
	}
}

func forwarding(flags uint32) trace.Forwarding {
	switch flags & forwardMask {
	case 0:
		return trace.ForwardNAT
	case 1:
		return trace.ForwardLocal
	case 2:
		return trace.ForwardTunnel
	case 3:
		return trace.ForwardDirect
	}
	return trace.ForwardUnknown
}
