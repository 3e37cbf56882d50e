package syscount

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Counter counts from Start to Close.
type Counter struct {
	count *ebpf.Map
	prog  *ebpf.Program
	link  link.Link
}

// Start begins to count. While it does, every system call of the machine takes
// a little longer.
func Start() (_ *Counter, err error) {
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &ns); err != nil {
		return nil, fmt.Errorf("syscount: %w", err)
	}
	c := &Counter{}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	refused := func(what string, err error) error {
		return fmt.Errorf("syscount: the kernel refuses %s (needs root outside of user namespaces, and a kernel that traces system calls): %w", what, err)
	}
	if c.count, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1}); err != nil {
		return nil, refused("a BPF map", err)
	}
	c.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "kptrace_syscalls", Type: ebpf.RawTracepoint, License: "Dual MIT/GPL",
		Instructions: program(kernelDev(ns.Dev), ns.Ino, c.count),
	})
	if err != nil {
		return nil, refused("a BPF program", err)
	}
	if c.link, err = link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sys_enter", Program: c.prog}); err != nil {
		return nil, refused("the tracepoint sys_enter", err)
	}
	return c, nil
}

// kernelDev is a device number as the kernel itself has it.
func kernelDev(dev uint64) uint64 {
	return uint64(unix.Major(dev))<<20 | uint64(unix.Minor(dev))
}

// program counts if the current task is of the pid namespace with this inode on
// the device of the kernel's namespaces.
func program(dev, ino uint64, count *ebpf.Map) asm.Instructions {
	return asm.Instructions{
		asm.LoadImm(asm.R1, int64(dev), asm.DWord),
		asm.LoadImm(asm.R2, int64(ino), asm.DWord),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -8),
		asm.Mov.Imm(asm.R4, 8),
		asm.FnGetNsCurrentPidTgid.Call(),
		asm.JNE.Imm(asm.R0, 0, "exit"),
		asm.StoreImm(asm.RFP, -12, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, count.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -12),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "exit"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("exit"),
		asm.Return(),
	}
}

// Read returns how many there were so far.
func (c *Counter) Read() (n uint64, err error) {
	var cpus []uint64
	if err := c.count.Lookup(uint32(0), &cpus); err != nil {
		return 0, fmt.Errorf("syscount: reading the count: %w", err)
	}
	for _, k := range cpus {
		n += k
	}
	return n, nil
}

// Close ends counting.
func (c *Counter) Close() {
	if c.link != nil {
		_ = c.link.Close()
	}
	if c.prog != nil {
		_ = c.prog.Close()
	}
	if c.count != nil {
		_ = c.count.Close()
	}
}
