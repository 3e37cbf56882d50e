package netns

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Main is for TestMain: it runs the test binary again in a Sandbox, with the
// same arguments, output, and exit code, and there calls m.Run. Flags,
// coverage, -test.run, -test.timeout and fuzzing work as ever. A host that
// forbids the sandbox fails the tests with the reason. It does not return.
func Main(m Runner) {
	Init()
	if os.Getenv(marker) == "inside" { // or below it: a fuzz worker
		os.Exit(m.Run())
	}
	code, err := Reexec(context.Background(), Sandbox{
		Args:  os.Args[1:],
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Forward: []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}
