package nflog

import (
	"time"
)

// TapConfig says which group to tap.
type TapConfig struct {
	// Group is the NFLOG group, taken as it stands: 0 is where TRACE rules of
	// iptables-legacy report.
	Group uint16
	// CopyRange is how many bytes of each packet are copied; zero means all.
	CopyRange uint32
	// ReceiveBuffer is the socket's buffer in bytes; zero means 1 MiB.
	ReceiveBuffer int
}

// TapPacket is one report with all that the kernel tells of the packet.
type TapPacket struct {
	Prefix string
	// Payload is the packet from its IP header on, cut off at the copy range.
	Payload []byte
	// Hook is the netfilter hook; devices are interface indexes, 0 for none.
	Hook                           uint8
	Mark                           uint32
	InDev, OutDev, PhysIn, PhysOut uint32
	// UID is who sent a packet of this machine; valid only if Local.
	UID   uint32
	Local bool
	// Seq numbers the group's reports from 0: a gap is a loss.
	Seq uint32
	// Time is the kernel's stamp, zero in hooks where it makes none.
	Time time.Time
}
