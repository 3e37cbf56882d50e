package lab

import (
	"fmt"
	"os"
	"testing"

	"github.com/kptrace/kptrace/internal/netns"
)

// TestMain lets the test binary play kptrace in pods, and runs the tests in a
// sandbox.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "lab" && os.Args[2] == "pod" {
		if err := RunPod(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	netns.Main(m)
}
