package nfnl

// Drops turns the kernel's count of what it could not deliver, which wraps at
// 32 bits, into losses. It has one user at a time.
type Drops struct {
	// Count reads the count: Socket.Drops.
	Count func() (uint32, error)
	// Since is when the count was last looked at, in nanoseconds since 1970; at
	// first, when it began.
	Since int64
	// Report is told how many were dropped from one look to the next.
	Report func(from, to int64, n uint64)

	seen uint32
	err  error
}

// Look reports what was dropped since the last look. What fails shows in Err;
// the next look reports that time too.
func (d *Drops) Look(now int64) {
	n, err := d.Count()
	if d.err = err; err != nil {
		return
	}
	if lost := n - d.seen; lost != 0 {
		d.Report(d.Since, now, uint64(lost))
	}
	d.seen, d.Since = n, now
}

// Err is why the last look failed.
func (d *Drops) Err() error { return d.err }
