package main

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/nfnl"
)

// minimum is what the kernel takes for the smallest change of a table, whoever
// makes it: one transaction that adds one rule to a chain of its own, which
// nothing leads to. The rule is "return", because whatever leads packets anywhere
// has the kernel check all rules that packets can reach. No program runs for it
// and nothing is listed.
func minimum(ns *netns.NS, table string) (seconds float64, err error) {
	err = ns.Do(func() error {
		t, err := openTable(table)
		if err != nil {
			return err
		}
		defer t.Close()
		if err := t.Batch(nfnl.SubsysNFTables, t.message(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, t.chain(unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME))); err != nil {
			return err
		}
		add := t.rule(immediateReturn())
		start := time.Now()
		if err := t.Batch(nfnl.SubsysNFTables, add); err != nil {
			return err
		}
		seconds = time.Since(start).Seconds()
		return t.Batch(nfnl.SubsysNFTables,
			t.message(unix.NFT_MSG_DELRULE, 0, t.chain(unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN)),
			t.message(unix.NFT_MSG_DELCHAIN, 0, t.chain(unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME)))
	})
	return seconds, err
}

// minimumChain is the chain that minimum adds its rules to.
const minimumChain = "BENCHSYNC"

// rawTable writes to a table of IPv4 by netlink.
type rawTable struct {
	*nfnl.Socket
	name string
}

func openTable(name string) (*rawTable, error) {
	s, err := nfnl.Open(1 << 20)
	return &rawTable{s, name}, err
}

func (t *rawTable) message(msg uint8, flags uint16, attrs []byte) []byte {
	return nfnl.AppendMessage(nil, nfnl.Type(nfnl.SubsysNFTables, msg), nfnl.FlagRequest|nfnl.FlagAck|flags, 0, nfnl.FamilyIPv4, 0, attrs)
}

func (t *rawTable) chain(table, chain uint16) []byte {
	attrs := nfnl.AppendAttr(nil, table, append([]byte(t.name), 0)...)
	return nfnl.AppendAttr(attrs, chain, append([]byte(minimumChain), 0)...)
}

func (t *rawTable) rule(expr []byte) []byte {
	attrs := t.chain(unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN)
	attrs = nested(attrs, unix.NFTA_RULE_EXPRESSIONS, nested(nil, unix.NFTA_LIST_ELEM, expr))
	return t.message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, attrs)
}

// immediateReturn is the expression "return".
func immediateReturn() []byte {
	returns := int32(unix.NFT_RETURN)
	verdict := nfnl.AppendAttr(nil, unix.NFTA_VERDICT_CODE, binary.BigEndian.AppendUint32(nil, uint32(returns))...)
	data := nfnl.AppendAttr(nil, unix.NFTA_IMMEDIATE_DREG, binary.BigEndian.AppendUint32(nil, unix.NFT_REG_VERDICT)...)
	data = nested(data, unix.NFTA_IMMEDIATE_DATA, nested(nil, unix.NFTA_DATA_VERDICT, verdict))
	return nested(nfnl.AppendAttr(nil, unix.NFTA_EXPR_NAME, []byte("immediate\x00")...), unix.NFTA_EXPR_DATA, data)
}

func nested(b []byte, typ uint16, data []byte) []byte {
	return nfnl.AppendAttr(b, typ|unix.NLA_F_NESTED, data...)
}
