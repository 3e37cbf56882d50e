package umlguest

import (
	"bytes"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The guest's kernel (6.1) keeps a process's vector registers in 2,696 bytes and
// hands them to ptrace(2) as they are. Where the CPU has more of them, as with AMX,
// ptrace refuses that with EFAULT, and the guest ends before it has begun. Denied
// NT_X86_XSTATE when it asks for it first, it keeps only what PTRACE_GETFPREGS has:
// x87 and SSE. The wider ones then belong to nobody, so programs inside must not
// use them.

// narrowGo is the value of GODEBUG that has Go use nothing wider than SSE.
const narrowGo = "cpu.avx=off,cpu.avx2=off,cpu.fma=off,cpu.avx512f=off,cpu.avx512cd=off,cpu.avx512bw=off,cpu.avx512dq=off,cpu.avx512vl=off"

// noAVX has Go's and glibc's programs use nothing wider than SSE.
func noAVX() []string {
	return []string{
		"GODEBUG=" + narrowGo,
		"GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW",
	}
}

// wideRegisters reports whether this CPU has registers that the guest's kernel has
// no room for.
func wideRegisters() bool {
	b, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && bytes.Contains(b, []byte(" amx_tile"))
}

// denyXState has ptrace(PTRACE_GETREGSET, NT_X86_XSTATE) and its opposite fail with
// EINVAL in this thread and in all that comes of it.
func denyXState() error {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		give  = unix.BPF_RET | unix.BPF_K

		number, request, kind = 0, 16, 32 // in struct seccomp_data
		noteXState            = 0x202
	)
	filter := []unix.SockFilter{
		{Code: load, K: number},
		{Code: equal, K: unix.SYS_PTRACE, Jf: 6},
		{Code: load, K: request},
		{Code: equal, K: unix.PTRACE_GETREGSET, Jt: 1},
		{Code: equal, K: unix.PTRACE_SETREGSET, Jf: 3},
		{Code: load, K: kind},
		{Code: equal, K: noteXState, Jf: 1},
		{Code: give, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EINVAL)},
		{Code: give, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return fmt.Errorf("a filter of system calls: %w", err)
	}
	return nil
}
