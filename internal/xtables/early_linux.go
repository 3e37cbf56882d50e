package xtables

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/nfnl"
)

// More messages and attributes of linux/netfilter/nf_tables.h.
const (
	nftNewTable = 0

	nftaTableFlags   = 2
	nftaHookPriority = 2
	nftaChainType    = 7
	nftaRuleExprs    = 4
	nftTableOwner    = 2 // NFT_TABLE_F_OWNER
	nlaNested        = 0x8000
)

// Early is a table of nf_tables in which copies of rules stand before all that
// iptables-nft has. The kernel removes it when its socket is closed, whatever becomes
// of the process.
type Early struct{ socket *nfnl.Socket }

// earlyPriority is behind the putting together of fragments (-400) and before
// the table raw (-300).
const earlyPriority = -390

// CopyEarly makes EarlyTable with a copy of a chain of the table raw of
// iptables-nft, and of the rules that jump to it from PREROUTING and OUTPUT, but for
// rules with hashlimit. It needs Linux 5.12 and rules without extensions that ask for
// the protocol outside of themselves, as iptables 1.8.6 and later write them; the error
// says what was refused. Nothing is left of an attempt that failed.
func CopyEarly(fa Family, chain string) (e *Early, err error) {
	family := uint8(nfnl.FamilyIPv4)
	if fa == IPv6 {
		family = nfnl.FamilyIPv6
	}
	s, err := nfnl.Open(nftDumpBuffer)
	if err != nil {
		return nil, fmt.Errorf("xtables: %w", err)
	}
	defer func() {
		if err != nil {
			s.Close()
			err = fmt.Errorf("xtables: copying raw/%s to an earlier table: %w", chain, err)
		}
	}()
	rules, err := rawRules(s, family, chain)
	if err != nil {
		return nil, err
	}
	var msgs [][]byte
	add := func(msg uint8, attrs []byte) {
		msgs = append(msgs, nfnl.AppendMessage(nil, nfnl.Type(nfnl.SubsysNFTables, msg),
			nfnl.FlagRequest|nfnl.FlagAck|nfnl.FlagCreate|nlmAppend, 0, family, 0, attrs))
	}
	text := func(attrs []byte, typ uint16, s string) []byte {
		return nfnl.AppendAttr(attrs, typ, append([]byte(s), 0)...)
	}
	number := func(attrs []byte, typ uint16, n uint32) []byte {
		return nfnl.AppendAttr(attrs, typ, binary.BigEndian.AppendUint32(nil, n)...)
	}
	add(nftNewTable, number(text(nil, nftaTableName, EarlyTable), nftaTableFlags, nftTableOwner))
	add(nftNewChain, text(text(nil, nftaTableName, EarlyTable), nftaChainName, chain))
	for _, base := range []struct {
		name string
		hook uint32
	}{{"PREROUTING", unix.NF_INET_PRE_ROUTING}, {"OUTPUT", unix.NF_INET_LOCAL_OUT}} {
		attrs := text(text(nil, nftaTableName, EarlyTable), nftaChainName, base.name)
		priority := int32(earlyPriority)
		hook := number(number(nil, nftaHookNum, base.hook), nftaHookPriority, uint32(priority))
		attrs = nfnl.AppendAttr(attrs, nftaChainHook|nlaNested, hook...)
		add(nftNewChain, text(attrs, nftaChainType, "filter"))
	}
	for _, r := range rules {
		attrs := text(text(nil, nftaTableName, EarlyTable), nftaRuleChain, r.chain)
		add(nftNewRule, nfnl.AppendAttr(attrs, nftaRuleExprs|nlaNested, r.exprs...))
	}
	if err := s.Batch(nfnl.SubsysNFTables, msgs...); err != nil {
		return nil, err
	}
	return &Early{socket: s}, nil
}

// nlmAppend is NLM_F_APPEND.
const nlmAppend = 0x800

// rawRule is a rule as the kernel tells it.
type rawRule struct {
	chain string
	exprs []byte
}

// rawRules lists the rules of a chain of the table raw, and those that name it.
func rawRules(s *nfnl.Socket, family uint8, chain string) (rules []rawRule, err error) {
	err = s.Dump(nfnl.Type(nfnl.SubsysNFTables, nftGetRule), family, nil, func(data []byte) {
		for m := nfnl.NewMessages(data); m.Next(); {
			if m.Type != nfnl.Type(nfnl.SubsysNFTables, nftNewRule) || m.Family != family {
				continue
			}
			table, r := "", rawRule{}
			for a := m.Attrs(); a.Next(); {
				switch a.Type {
				case nftaTableName:
					table = cstring(a.Data)
				case nftaRuleChain:
					r.chain = cstring(a.Data)
				case nftaRuleExprs:
					r.exprs = slices.Clone(a.Data)
				}
			}
			if table == "raw" && !limited(r.exprs) && (r.chain == chain || slices.Contains([]string{"PREROUTING", "OUTPUT"}, r.chain) && jumpsTo(r.exprs, chain)) {
				rules = append(rules, r)
			}
		}
	})
	return rules, err
}

// limited reports whether a rule counts what it lets through in a table of hashlimit,
// which a copy would share.
func limited(exprs []byte) bool { return bytes.Contains(exprs, []byte("hashlimit\x00")) }

// jumpsTo reports whether a rule's expressions name a chain.
func jumpsTo(exprs []byte, chain string) bool {
	return bytes.Contains(exprs, append([]byte(chain), 0))
}

// Close removes the table.
func (e *Early) Close() error {
	if e == nil {
		return nil
	}
	return e.socket.Close()
}
