package xtables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Socket options and structures of linux/netfilter_ipv4/ip_tables.h and
// linux/netfilter_ipv6/ip6_tables.h, which differ in the size of an entry's
// address part.
const (
	soGetInfo    = 64
	soGetEntries = 65

	tableNameLen = 32
	infoLen      = 84 // struct ipt_getinfo
	infoEntries  = 76
	infoSize     = 80
	entriesLen   = 40 // struct ipt_get_entries without entries
	countersLen  = 16
)

// entryLayout says where things are in struct ipt_entry and ip6t_entry.
type entryLayout struct{ next, counters, size int }

var layouts = [...]entryLayout{IPv4: {90, 96, 112}, IPv6: {142, 152, 168}}

// legacyWatch asks how large the tables are, where large ones are, and now and then
// what is in the others.
type legacyWatch struct {
	cfg   *WatchConfig
	fd    int
	level int
	seed  maphash.Seed
	// info and content are what the tables were like when we settled; looked
	// says that content was looked at since. Tables that areas knows about have
	// none.
	info    map[string][2]uint32
	content map[string]uint64
	looked  bool
	// due is when to look at the content next, soon when to do it if somebody
	// used the lock, in whose file lock reads what happened.
	due, soon time.Time
	lock      int // -1 while there is none
	file      *os.File
	done      chan struct{} // closed when nobody waits for the lock any more

	mu      sync.Mutex // protects what follows
	areas   areas
	touched bool
	// settled is set while nobody of us writes, moved if a table did not stay
	// where it was meanwhile.
	settled, moved bool
}

func openLegacyWatch(cfg *WatchConfig) (*legacyWatch, error) {
	domain, level := unix.AF_INET, unix.SOL_IP
	if cfg.Family == IPv6 {
		domain, level = unix.AF_INET6, unix.SOL_IPV6
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("opening a raw socket: %w", err)
	}
	seed := maphash.MakeSeed()
	return &legacyWatch{cfg: cfg, fd: fd, level: level, seed: seed, lock: -1, areas: areas{file: areasFile, seed: seed}}, nil
}

func (w *legacyWatch) close() error {
	if w.lock >= 0 {
		_ = w.file.Close()
		<-w.done
	}
	return unix.Close(w.fd)
}

// pause looks as thoroughly as it must, for what was not seen until now will
// be taken for ours afterwards.
func (w *legacyWatch) pause(s *Sight) error {
	w.mu.Lock()
	w.areas.next = time.Time{} // now, whatever it costs
	w.mu.Unlock()
	err := w.look(s)
	if w.used() && err == nil && s.Suspicion == Quiet {
		err = w.compare(s)
	}
	w.mu.Lock()
	w.settled = false
	w.mu.Unlock()
	return err
}

// settle looks at the content of small tables at once, at that of large ones
// when we look next, unless it can tell where they are.
func (w *legacyWatch) settle(s *Sight, _ int) error {
	w.info, w.content, w.looked, w.due = make(map[string][2]uint32), make(map[string]uint64), false, time.Time{}
	size := uint32(0)
	var large []uint32
	for _, table := range w.cfg.Tables {
		info, err := w.getInfo(table)
		if errors.Is(err, unix.ENOENT) {
			continue // the kernel makes a table that is asked for, but not this one
		} else if err != nil {
			return err
		}
		w.info[table] = info
		n := info[1]
		size += n
		if n > smallTables {
			large = append(large, n)
		}
	}
	w.listen()
	w.mu.Lock()
	w.locked() // by us
	w.areas.note(large)
	w.touched, w.moved, w.settled = false, false, true
	if w.areas.known {
		for _, n := range large {
			size -= n
		}
	}
	w.mu.Unlock()
	if size > smallTables {
		return nil
	}
	return w.compare(s)
}

// aside overlooks that the lock is used meanwhile, not that it was before.
func (w *legacyWatch) aside(f func()) {
	w.mu.Lock()
	w.heard()
	w.see()
	was := w.settled
	w.settled = false
	w.mu.Unlock()
	f()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.locked()
	if w.settled = was; was && w.areas.known {
		w.areas.note(w.areas.sizes)
	}
}

// heard takes note of what happened to the lock, and if that was anything, of
// where tables are. What happens while we write is ours. The caller holds mu.
func (w *legacyWatch) heard() {
	if !w.locked() || !w.settled {
		return
	}
	w.touched = true
	w.see()
}

// see looks whether tables are where they were. The caller holds mu.
func (w *legacyWatch) see() {
	w.moved = w.moved || w.settled && w.areas.moved()
}

// used reports whether somebody used the lock since content was looked at.
func (w *legacyWatch) used() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.touched
}

func (w *legacyWatch) look(s *Sight) error {
	for table, was := range w.info {
		now, err := w.getInfo(table)
		if err != nil {
			return err
		}
		if now != was {
			s.note(Certain, fmt.Sprintf("table %s had %d entries of %d bytes, has %d of %d", table, was[0], was[1], now[0], now[1]))
		}
	}
	w.mu.Lock()
	w.heard()
	w.see()
	touched, moved := w.touched, w.moved
	w.mu.Unlock()
	if moved {
		s.note(Written, "a table as large as one of ours was written")
	}
	if touched && !w.looked && len(w.info) > 0 {
		s.note(Doubt, "the lock of iptables was used before the tables were looked at")
	}
	now := time.Now()
	if s.Suspicion != Quiet || now.Before(w.due) && (!touched || now.Before(w.soon)) {
		return nil
	}
	return w.compare(s)
}

// compare looks at the content of the tables, but for those of which it is known
// where they are. The first time after settle it is only remembered.
func (w *legacyWatch) compare(s *Sight) error {
	start := time.Now()
	w.mu.Lock()
	w.touched = false
	known := w.areas.known
	w.mu.Unlock()
	for table, info := range w.info {
		if known && info[1] > smallTables {
			continue
		}
		now, err := w.hash(table, info[1])
		if err != nil {
			return err
		}
		if was, ok := w.content[table]; ok && now != was {
			s.note(Certain, "rules in table "+table+" changed")
		}
		w.content[table] = now
	}
	w.looked = true
	took := time.Since(start)
	w.due = start.Add(max(contentEvery, contentShare*took))
	w.soon = start.Add(min(contentSoon, contentShare*took))
	return nil
}

// listen opens the lock's file, which every iptables-legacy of this mount
// namespace opens and closes, and looks where tables are whenever one did: two
// that follow each other may leave a table where it was.
// Without it the content is looked at no earlier than it is due.
func (w *legacyWatch) listen() {
	if w.lock >= 0 {
		return
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return
	}
	file := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, w.cfg.lockFile(), unix.IN_CLOSE); err != nil {
		_ = file.Close()
		return
	}
	raw, err := file.SyscallConn()
	if err != nil {
		_ = file.Close()
		return
	}
	w.lock, w.file, w.done = fd, file, make(chan struct{})
	go func() {
		defer close(w.done)
		_ = raw.Read(func(uintptr) bool { // until the file is closed
			w.mu.Lock()
			defer w.mu.Unlock()
			w.heard()
			return false
		})
	}()
}

// locked reports whether somebody used the lock since the last time. The caller
// holds mu.
func (w *legacyWatch) locked() (used bool) {
	if w.lock < 0 {
		return false
	}
	var b [4096]byte
	for {
		n, err := unix.Read(w.lock, b[:])
		if n <= 0 || err != nil {
			return used
		}
		used = true
	}
}

// getInfo returns the number of a table's entries and their size in bytes.
func (w *legacyWatch) getInfo(table string) (info [2]uint32, err error) {
	var b [infoLen]byte
	copy(b[:tableNameLen-1], table)
	if err := w.get(soGetInfo, b[:]); err != nil {
		return info, fmt.Errorf("asking for the size of table %s: %w", table, err)
	}
	return [2]uint32{binary.NativeEndian.Uint32(b[infoEntries:]), binary.NativeEndian.Uint32(b[infoSize:])}, nil
}

// hash returns a hash of a table's entries without their counters, 0 where the
// table is not of that size any more.
func (w *legacyWatch) hash(table string, size uint32) (uint64, error) {
	b, err := unix.Mmap(-1, 0, entriesLen+int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return 0, fmt.Errorf("reading table %s: %w", table, err)
	}
	defer func() { _ = unix.Munmap(b) }() // tens of megabytes, which Go would keep
	copy(b[:tableNameLen-1], table)
	binary.NativeEndian.PutUint32(b[tableNameLen:], size)
	if err := w.get(soGetEntries, b); errors.Is(err, unix.EAGAIN) {
		return 0, nil
	} else if err != nil {
		return 0, fmt.Errorf("reading table %s: %w", table, err)
	}
	entries := b[entriesLen:]
	layout := layouts[w.cfg.Family]
	for e := entries; len(e) >= layout.size; {
		clear(e[layout.counters : layout.counters+countersLen])
		next := int(binary.NativeEndian.Uint16(e[layout.next:]))
		if next < layout.size || next > len(e) {
			return 0, fmt.Errorf("reading table %s: an entry of %d bytes", table, next)
		}
		e = e[next:]
	}
	return maphash.Bytes(w.seed, entries), nil
}

// get is getsockopt(2) into a structure that also holds the question.
func (w *legacyWatch) get(option int, b []byte) error {
	size := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(w.fd), uintptr(w.level), uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
