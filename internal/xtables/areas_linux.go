package xtables

import (
	"bytes"
	"hash/maphash"
	"io"
	"os"
	"slices"
	"strconv"
	"time"
)

// areasFile lists the areas of memory that the kernel put together of single
// pages, with addresses, or something made of them that is the same for the same
// address (Documentation/core-api/printk-formats.rst, %pK). Only root reads it.
const areasFile = "/proc/vmallocinfo"

// areaOwner is the function of net/netfilter/x_tables.c that asks for the memory of
// a table. iptables-legacy replaces a table as a whole, and the kernel frees the
// old one when it has the new one: so a table that was written lies elsewhere
// than before. Written once more it may lie where it lay at first.
const areaOwner = " xt_alloc_table_info"

// areaSlack is how much larger than the table an area may be: what is round and
// goes with it, up to 2 MiB for pages of that size.
const areaSlack = 2<<20 + 64<<10

// areasSoon is the longest wait from one look to the next: on a machine that is
// busy a look seems to take long.
const areasSoon = 900 * time.Millisecond

// areas tells whether large tables are where they were.
type areas struct {
	file  string
	seed  maphash.Seed
	buf   []byte
	sizes []uint32 // of our large tables

	known bool
	sum   uint64
	// next is when to look again: not so often that it takes more than a
	// hundredth of the time.
	next time.Time
}

// note remembers where tables of the given sizes lie, if that can be seen.
func (a *areas) note(sizes []uint32) {
	a.sizes, a.known, a.next = sizes, false, time.Time{}
	if len(sizes) > 0 {
		sum, seen, ok := a.look()
		a.sum, a.known = sum, ok && seen >= len(sizes)
	}
}

// moved reports whether one of the tables is elsewhere now, or one as large as
// that in another network namespace.
func (a *areas) moved() bool {
	now := time.Now()
	if !a.known || now.Before(a.next) {
		return false
	}
	sum, _, ok := a.look()
	a.next = now.Add(min(contentShare*time.Since(now), areasSoon))
	a.known = ok
	return ok && sum != a.sum
}

// look adds up what tells the areas of tables as large as ours apart, and counts
// them. It is not ok if they cannot be seen.
func (a *areas) look() (sum uint64, seen int, ok bool) {
	f, err := os.Open(a.file)
	if err != nil {
		return 0, 0, false
	}
	defer f.Close()
	if a.buf == nil {
		a.buf = make([]byte, 64<<10)
	}
	have := 0
	for {
		n, err := f.Read(a.buf[have:])
		have += n
		rest := a.buf[:have]
		for {
			line, after, whole := bytes.Cut(rest, []byte("\n"))
			if !whole {
				break
			}
			rest = after
			if at, is := a.table(line); is {
				if at == nil {
					return 0, 0, false
				}
				seen++
				sum += maphash.Bytes(a.seed, at)
			}
		}
		have = copy(a.buf, rest)
		if err == io.EOF {
			return sum, seen, true
		}
		if err != nil || have == len(a.buf) {
			return 0, 0, false
		}
	}
}

// table reports whether a line is of the area of a table as large as ours, and returns the
// text of its addresses, nil where the kernel does not say them.
func (a *areas) table(line []byte) (at []byte, is bool) {
	if !bytes.Contains(line, []byte(areaOwner)) {
		return nil, false
	}
	fields := bytes.Fields(line)
	if len(fields) < 2 {
		return nil, false
	}
	size, err := strconv.ParseUint(string(fields[1]), 10, 64)
	if err != nil || !slices.ContainsFunc(a.sizes, func(n uint32) bool { return size >= uint64(n) && size-uint64(n) <= areaSlack }) {
		return nil, false
	}
	from, _, _ := bytes.Cut(fields[0], []byte("-"))
	if addr, err := strconv.ParseUint(string(bytes.TrimPrefix(from, []byte("0x"))), 16, 64); err != nil || addr == 0 {
		return nil, true
	}
	return fields[0], true
}
