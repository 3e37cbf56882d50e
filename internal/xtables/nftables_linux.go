package xtables

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/nfnl"
)

// More messages and attributes of linux/netfilter/nf_tables.h.
const (
	nftGetChain = 4
	nftGetRule  = 7

	nftaRuleHandle = 3
	nftaChainHook  = 4
	nftaHookNum    = 1
	nftFlagNoFlush = 0x100 // NLM_F_NONREC: refuse to delete what is not empty
	nftDumpBuffer  = 4 << 20
	nftAskBuffer   = 64 << 10
)

// NFTRule is a rule of nf_tables without what it does.
type NFTRule struct {
	Family       uint8
	Table, Chain string
	Handle       uint64
}

// NFTHook is a built-in chain of nf_tables and the number of its hook.
type NFTHook struct {
	Family       uint8
	Table, Chain string
	Hook         uint32
}

// NFTGeneration returns the number of commits to nf_tables in the calling
// thread's network namespace. It wraps.
func NFTGeneration() (uint32, error) {
	s, err := nfnl.Open(nftAskBuffer)
	if err != nil {
		return 0, fmt.Errorf("xtables: %w", err)
	}
	defer s.Close()
	w := nftWatch{ask: s}
	gen, err := w.generation()
	if err != nil {
		return 0, fmt.Errorf("xtables: %w", err)
	}
	return gen, nil
}

// NFTRules lists all rules of nf_tables of a family (nfnl.FamilyUnspec: of all),
// each chain's in order, and the built-in chains. It needs CAP_NET_ADMIN in the
// namespace of the calling thread.
func NFTRules(family uint8) (rules []NFTRule, hooks []NFTHook, err error) {
	s, err := nfnl.Open(nftDumpBuffer)
	if err != nil {
		return nil, nil, fmt.Errorf("xtables: %w", err)
	}
	defer s.Close()
	names := map[string]string{}
	name := func(b []byte) string {
		text := cstring(b)
		if have, ok := names[text]; ok {
			return have
		}
		names[text] = text
		return text
	}
	err = s.Dump(nfnl.Type(nfnl.SubsysNFTables, nftGetRule), family, nil, func(data []byte) {
		for m := nfnl.NewMessages(data); m.Next(); {
			if m.Type != nfnl.Type(nfnl.SubsysNFTables, nftNewRule) {
				continue
			}
			r := NFTRule{Family: m.Family}
			for a := m.Attrs(); a.Next(); {
				switch a.Type {
				case nftaTableName:
					r.Table = name(a.Data)
				case nftaRuleChain:
					r.Chain = name(a.Data)
				case nftaRuleHandle:
					r.Handle = a.Uint64()
				}
			}
			rules = append(rules, r)
		}
	})
	if err != nil {
		return nil, nil, fmt.Errorf("xtables: listing the rules of nf_tables: %w", err)
	}
	err = s.Dump(nfnl.Type(nfnl.SubsysNFTables, nftGetChain), family, nil, func(data []byte) {
		for m := nfnl.NewMessages(data); m.Next(); {
			if m.Type != nfnl.Type(nfnl.SubsysNFTables, nftNewChain) {
				continue
			}
			h, hooked := NFTHook{Family: m.Family}, false
			for a := m.Attrs(); a.Next(); {
				switch a.Type {
				case nftaTableName:
					h.Table = name(a.Data)
				case nftaChainName:
					h.Chain = name(a.Data)
				case nftaChainHook:
					for in := nfnl.NewAttrs(a.Data); in.Next(); {
						if in.Type == nftaHookNum {
							h.Hook, hooked = in.Uint32(), true
						}
					}
				}
			}
			if hooked {
				hooks = append(hooks, h)
			}
		}
	})
	if err != nil {
		return nil, nil, fmt.Errorf("xtables: listing the chains of nf_tables: %w", err)
	}
	return rules, hooks, nil
}

// RemoveEmptyTable removes a table of iptables-nft with its built-in chains if no
// rule is left in it, and reports whether it did. Chains of a user stay, and with
// them the table.
func RemoveEmptyTable(fa Family, table string) (removed bool, err error) {
	family := uint8(nfnl.FamilyIPv4)
	if fa == IPv6 {
		family = nfnl.FamilyIPv6
	}
	_, hooks, err := NFTRules(family)
	if err != nil {
		return false, err
	}
	s, err := nfnl.Open(nftAskBuffer)
	if err != nil {
		return false, fmt.Errorf("xtables: %w", err)
	}
	defer s.Close()
	var msgs [][]byte
	tableAttr := nfnl.AppendAttr(nil, nftaTableName, append([]byte(table), 0)...)
	del := func(msg uint8, attrs []byte) {
		msgs = append(msgs, nfnl.AppendMessage(nil, nfnl.Type(nfnl.SubsysNFTables, msg),
			nfnl.FlagRequest|nfnl.FlagAck|nftFlagNoFlush, 0, family, 0, attrs))
	}
	for _, h := range hooks {
		if h.Table == table {
			attrs := append([]byte(nil), tableAttr...)
			del(nftDelChain, nfnl.AppendAttr(attrs, nftaChainName, append([]byte(h.Chain), 0)...))
		}
	}
	if len(msgs) == 0 {
		return false, nil
	}
	del(nftDelTable, tableAttr)
	err = s.Batch(nfnl.SubsysNFTables, msgs...)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOENT):
		return false, nil // somebody else uses it, or was faster
	}
	return false, fmt.Errorf("xtables: removing the empty table %s: %w", table, err)
}
