package conntrack

// Config says how to talk to the kernel's table.
type Config struct {
	// ReceiveBuffer is how many bytes of answers the kernel may hold for us;
	// zero means 1 MiB. It is granted as far as the system allows.
	ReceiveBuffer int
}

// Stats are the tracker's counters in one network namespace, summed over all
// CPUs since the namespace was made (struct ip_conntrack_stat). They wrap at
// 32 bits per CPU.
type Stats struct {
	// Found counts lookups that found an entry, which the kernel counts only
	// where it looks for a free port.
	Found uint64
	// Invalid counts packets that fit no entry and could not make one.
	Invalid uint64
	// InsertFailed counts entries lost to a race between two first packets of
	// one connection, Drop those refused because the table was full, EarlyDrop
	// those thrown out of a full table to make room.
	InsertFailed, Drop, EarlyDrop uint64
	// SearchRestart counts lookups that began anew as the table was resized.
	SearchRestart uint64
	// ClashResolve counts races that ended well, ChainTooLong entries refused
	// for an overlong hash chain. Both are zero where the kernel is built
	// without CONFIG_NF_CONNTRACK_PROCFS.
	ClashResolve, ChainTooLong uint64
	// Entries is how many there are, Limit how many there may be
	// (nf_conntrack_max, one number for all network namespaces).
	Entries, Limit uint64
}
