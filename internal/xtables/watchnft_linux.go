package xtables

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/kptrace/kptrace/internal/nfnl"
)

// Messages and attributes of linux/netfilter/nf_tables.h.
const (
	nftNewChain, nftDelChain = 3, 5
	nftNewRule, nftDelRule   = 6, 8
	nftDelTable              = 2
	nftGetGen                = 16

	nftaTableName = 1
	nftaChainName = 3
	nftaRuleChain = 2
	nftaGenID     = 1
)

// nftWatchBuffer holds the announcements of about 10,000 rules.
const nftWatchBuffer = 8 << 20

// nftWatch follows the announcements of nf_tables. While we write ourselves it
// does not listen, which would slow the kernel down, but counts commits.
type nftWatch struct {
	cfg    *WatchConfig
	events *nfnl.Socket
	ask    *nfnl.Socket
	gen    uint32
	joined bool
}

func openNFTWatch(cfg *WatchConfig) (*nftWatch, error) {
	events, err := nfnl.Open(nftWatchBuffer)
	if err != nil {
		return nil, err
	}
	ask, err := nfnl.Open(64 << 10)
	if err != nil {
		events.Close()
		return nil, err
	}
	w := &nftWatch{cfg: cfg, events: events, ask: ask}
	if _, err := w.generation(); err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

func (w *nftWatch) close() error { return errors.Join(w.events.Close(), w.ask.Close()) }

// pause notes the generation first, so that a commit before we leave the group
// is announced or counted, or both.
func (w *nftWatch) pause(s *Sight) (err error) {
	if w.gen, err = w.generation(); err != nil {
		return err
	}
	if !w.joined {
		return nil
	}
	if err := w.events.Leave(nfnl.GroupNFTables); err != nil {
		return err
	}
	w.joined = false
	return w.drain(s)
}

func (w *nftWatch) settle(s *Sight, commits int) error {
	if err := w.events.Join(nfnl.GroupNFTables); err != nil {
		return err
	}
	w.joined = true
	gen, err := w.generation()
	if err != nil {
		return err
	}
	if n := gen - w.gen - uint32(commits); n != 0 {
		s.note(Doubt, fmt.Sprintf("%d commits of others to nf_tables beside ours", int32(n)))
	}
	return nil
}

// aside need not do anything: what is announced says of which family it is.
func (w *nftWatch) aside(f func()) { f() }

func (w *nftWatch) look(s *Sight) error {
	if !w.joined {
		return nil
	}
	return w.drain(s)
}

func (w *nftWatch) drain(s *Sight) error {
	overrun, err := w.events.Drain(func(data []byte) {
		for m := nfnl.NewMessages(data); m.Next(); {
			w.message(s, &m)
		}
	})
	if overrun {
		s.note(Doubt, "more changes to nf_tables than could be followed")
	}
	return err
}

// message looks at one change.
func (w *nftWatch) message(s *Sight, m *nfnl.Messages) {
	if s.Suspicion == Certain || m.Type>>8 != nfnl.SubsysNFTables || m.Family != w.family() {
		return
	}
	table, chain, leads := w.subject(m)
	if !slices.Contains(w.cfg.Tables, table) {
		return
	}
	ours := chain != "" && w.cfg.Ours(table, chain)
	switch msg := m.Type & 0xff; {
	case msg == nftDelTable:
		s.note(Certain, "table "+table+" deleted")
	case msg == nftNewChain && ours:
		s.note(Certain, "chain "+chain+" added to "+table)
	case msg == nftDelChain && ours:
		s.note(Certain, "chain "+chain+" deleted from "+table)
	case msg == nftNewRule && ours:
		s.note(Certain, "rule added to "+table+" "+chain)
	case msg == nftDelRule && (ours || leads):
		s.note(Certain, "rule removed from "+table+" "+chain)
	}
}

// subject returns the table and the chain of a change, and whether one of our
// chains is named in it.
func (w *nftWatch) subject(m *nfnl.Messages) (table, chain string, leads bool) {
	for a := m.Attrs(); a.Next(); {
		switch msg := m.Type & 0xff; {
		case a.Type == nftaTableName: // which is the same number for all
			table = cstring(a.Data)
		case (msg == nftNewChain || msg == nftDelChain) && a.Type == nftaChainName,
			(msg == nftNewRule || msg == nftDelRule) && a.Type == nftaRuleChain:
			chain = cstring(a.Data)
		case msg == nftDelRule:
			for _, t := range w.cfg.Targets {
				leads = leads || bytes.Contains(a.Data, []byte(t))
			}
		}
	}
	return table, chain, leads
}

func (w *nftWatch) family() uint8 {
	if w.cfg.Family == IPv6 {
		return nfnl.FamilyIPv6
	}
	return nfnl.FamilyIPv4
}

// generation asks for the number of commits to nf_tables in the namespace.
func (w *nftWatch) generation() (uint32, error) {
	answer, err := w.ask.Query(nfnl.Type(nfnl.SubsysNFTables, nftGetGen), nfnl.FamilyUnspec, nil)
	if err != nil {
		return 0, fmt.Errorf("asking for the generation of nf_tables: %w", err)
	}
	for m := nfnl.NewMessages(answer); m.Next(); {
		for a := m.Attrs(); a.Next(); {
			if a.Type == nftaGenID {
				return a.Uint32(), nil
			}
		}
	}
	return 0, errors.New("asking for the generation of nf_tables: the answer has none")
}

func cstring(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
