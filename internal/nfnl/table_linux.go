package nfnl

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Drops returns how many datagrams the kernel could not put into the socket's
// buffer since it was opened, from /proc/net/netlink. For conntrack events a
// datagram is one event; for NFLOG it is a batch. It wraps at 32 bits, and
// may be called from any goroutine.
func (s *Socket) Drops() (uint32, error) {
	row, err := findSocket(s.table, s.portID)
	if err != nil {
		return 0, err
	}
	return row.drops, nil
}

// DropsOf is Drops for a socket of the calling thread's network namespace that
// somebody else opened, such as a library.
func DropsOf(portID uint32) (uint32, error) {
	table, err := os.Open("/proc/thread-self/net/netlink")
	if err != nil {
		return 0, fmt.Errorf("nfnl: opening the table of netlink sockets: %w", err)
	}
	defer table.Close()
	row, err := findSocket(table, portID)
	return row.drops, err
}

// row is what /proc/net/netlink tells of one socket.
type row struct {
	drops uint32
	inode string
}

// findSocket finds the NETLINK_NETFILTER socket with a port id in the table
// (net/netlink/af_netlink.c: sk Eth Pid Groups Rmem Wmem Dump Locks Drops
// Inode).
func findSocket(table io.ReaderAt, portID uint32) (row, error) {
	text, err := io.ReadAll(io.NewSectionReader(table, 0, 64<<20))
	if err != nil {
		return row{}, fmt.Errorf("nfnl: reading the table of netlink sockets: %w", err)
	}
	id := strconv.FormatUint(uint64(portID), 10)
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		if len(f) < 10 || f[1] != strconv.Itoa(unix.NETLINK_NETFILTER) || f[2] != id {
			continue
		}
		drops, err := strconv.ParseUint(f[8], 10, 32)
		if err != nil {
			return row{}, fmt.Errorf("nfnl: reading the drops of socket %s: %w", id, err)
		}
		return row{drops: uint32(drops), inode: f[9]}, nil
	}
	return row{}, fmt.Errorf("nfnl: looking for socket %s in the table of netlink sockets: %w", id, os.ErrNotExist)
}

// Process is who holds a socket. The zero Process is somebody we cannot see.
type Process struct {
	PID int
	// Command is the program's name as the kernel keeps it, at most 15 bytes.
	Command string
}

// Owner finds the process that holds the NETLINK_NETFILTER socket with a port
// id in the calling thread's network namespace. It looks through /proc, so it
// is for error messages; what /proc does not show stays zero.
func Owner(portID uint32) Process {
	table, err := os.Open("/proc/thread-self/net/netlink")
	if err != nil {
		return Process{}
	}
	defer table.Close()
	row, err := findSocket(table, portID)
	if err != nil {
		return Process{}
	}
	link := "socket:[" + row.inode + "]"
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return Process{}
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !holds(pid, link) {
			continue
		}
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		return Process{PID: pid, Command: strings.TrimSpace(string(comm))}
	}
	return Process{}
}

// Groups lists the NFLOG groups that are held in the calling thread's network
// namespace, and the port ids of the sockets that hold them
// (net/netfilter/nfnetlink_log.c: group, port id, queue length, copy mode, copy
// range, timeout, references).
func Groups() (map[uint16]uint32, error) {
	text, err := os.ReadFile("/proc/thread-self/net/netfilter/nfnetlink_log")
	if err != nil {
		return nil, fmt.Errorf("nfnl: reading the NFLOG groups: %w", err)
	}
	held := map[uint16]uint32{}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		group, err1 := strconv.ParseUint(f[0], 10, 16)
		id, err2 := strconv.ParseUint(f[1], 10, 32)
		if err1 == nil && err2 == nil {
			held[uint16(group)] = uint32(id)
		}
	}
	return held, nil
}

func holds(pid int, link string) bool {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, e := range entries {
		if to, err := os.Readlink(dir + "/" + e.Name()); err == nil && to == link {
			return true
		}
	}
	return false
}
