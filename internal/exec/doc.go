// Package exec runs other programs so that they never outlive us and never
// die halfway through our bidding. It is the only importer of os/exec.
//
// Every child is started with PR_SET_PDEATHSIG SIGKILL (prctl(2)). The kernel
// delivers that signal when the thread that forked ends, not the process, so
// each child has a goroutine of its own that keeps its thread
// (runtime.LockOSThread) until the child has been reaped. A kill -9 of this
// process therefore takes its children with it, and no child is left a zombie.
//
// Linux only; elsewhere Start and Run fail with errors.ErrUnsupported.
package exec
