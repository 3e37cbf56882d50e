package nfnl

// SubsysAcct is the subsystem of named counters, which rules with the match
// nfacct feed (linux/netfilter/nfnetlink_acct.h).
const SubsysAcct = 7

// Its messages and attributes.
const (
	acctNew = 0
	acctGet = 1
	acctDel = 3

	acctName    = 1 // string with a NUL
	acctPackets = 2 // 64 bits
)
