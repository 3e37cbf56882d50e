package redact

import (
	"errors"
	"fmt"
	"io"

	"github.com/kptrace/kptrace/trace/record"
)

// LearnRecording takes the names in all states of a recording, as far as it is
// readable.
func (r *Redactor) LearnRecording(in io.Reader) {
	rec, err := record.NewReader(in)
	if err != nil {
		return
	}
	r.Node(rec.Header().Node)
	for {
		it, err := rec.Next()
		if err != nil {
			return
		}
		if it.State != nil {
			r.Learn(it.State.Snapshot)
		}
	}
}

// Recording writes a recording again with everything replaced. Frames of sources
// that it does not know are left out and counted as dropped. Of one that was cut off
// it writes what is readable, and no end.
func (r *Redactor) Recording(out io.Writer, in io.Reader) error {
	rec, err := record.NewReader(in)
	if err != nil {
		return err
	}
	h := rec.Header()
	h.Node, h.Redacted = r.Node(h.Node), h.Redacted || r.level != None
	h.Addrs = each(h.Addrs, r.Addr)
	w, err := record.NewWriter(out, h)
	if err != nil {
		return err
	}
	var unknown uint64
	for {
		it, err := rec.Next()
		switch {
		case errors.Is(err, io.EOF):
			return w.Flush()
		case err != nil:
			return errors.Join(fmt.Errorf("redact: %w", err), w.Flush())
		case it.State != nil:
			s := *it.State
			s.Snapshot, s.Overlay = r.Snapshot(s.Snapshot), r.Overlay(s.Overlay)
			s.Rules4, s.Rules6 = r.Rules(s.Rules4), r.Rules(s.Rules6)
			err = w.State(s)
		case it.Rules != nil:
			x := *it.Rules
			x.Rules4, x.Rules6 = r.Rules(x.Rules4), r.Rules(x.Rules6)
			x.Chains = each(x.Chains, func(c record.Chain) record.Chain {
				b := []byte(c.Name)
				r.codeBytes(b)
				c.Name = string(b)
				return c
			})
			err = w.Rules(x)
		case it.Affinity != nil:
			a := *it.Affinity
			a.Clients = each(a.Clients, func(c record.Client) record.Client {
				c.Addr, c.Service, c.Endpoint = r.Addr(c.Addr), r.PortName(c.Service), r.AddrPort(c.Endpoint)
				return c
			})
			err = w.Affinity(a)
		case it.Names != nil:
			n := record.Names{Devices: make(map[uint32]string, len(it.Names.Devices)), Reasons: it.Names.Reasons}
			for i, name := range it.Names.Devices {
				n.Devices[i] = r.said(name)
			}
			err = w.Names(n)
		case it.Frame != nil:
			f, ok := r.Frame(*it.Frame)
			if !ok {
				unknown++
				continue
			}
			err = w.Frame(f)
		case it.Loss != nil:
			err = w.Loss(*it.Loss)
		case it.End != nil:
			err = w.End(it.End.Dropped + unknown)
		}
		if err != nil {
			return err
		}
	}
}
