package lab

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/kptrace/kptrace/internal/netns"
)

// roleEnv makes the test binary play a part: "launcher" puts a "lab" into a
// sandbox of its own, as kptrace does.
const roleEnv = "KPTRACE_LAB_ROLE"

// TestMain lets the test binary play kptrace in pods, and runs the tests in a
// sandbox.
func TestMain(m *testing.M) {
	netns.Init()
	args := os.Args[1:]
	switch {
	case len(args) == 2 && args[0] == "lab" && args[1] == "pod":
		exitWith(RunPod())
	case len(args) > 0 && args[0] == "proxy":
		exitWith(proxyRole(args[1:]))
	case os.Getenv(roleEnv) == "launcher":
		_, err := netns.Reexec(context.Background(), netns.Sandbox{Args: args, Env: []string{roleEnv + "=lab"},
			Stdout: os.Stdout, Stderr: os.Stderr})
		exitWith(err)
	case os.Getenv(roleEnv) == "lab":
		exitWith(labRole(args[0], args[1]))
	}
	netns.Main(m)
}

// labRole is a lab without proxies, until somebody ends it.
func labRole(dir, sockets string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	os.Unsetenv(roleEnv) // pods play another part
	l, err := Start(ctx, Config{Dir: dir, SocketDir: sockets, NoProxy: true})
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.StartTraffic(ctx); err != nil {
		return err
	}
	return l.ServeControl(ctx, func() { fmt.Println("up") }, cancel)
}

func exitWith(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}
