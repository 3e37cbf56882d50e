package syscount

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

func TestMain(m *testing.M) { netns.Main(m) }

const calls, otherCalls = 10_000, 1_000_000

// otherEnv makes TestOther what it is.
const otherEnv = "KPTRACE_TEST_OTHER"

// TestOther is the process of another pid namespace; alone it has nothing to do.
func TestOther(*testing.T) {
	if os.Getenv(otherEnv) != "" {
		for range otherCalls {
			unix.Getppid()
		}
	}
}

// TestCount counts this process's calls, and not those of another namespace.
func TestCount(t *testing.T) {
	c, err := Start()
	if netns.Rootless() {
		if err == nil || !strings.Contains(err.Error(), "needs root outside of user namespaces,") {
			t.Errorf("in a user namespace: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	before, err := c.Read()
	if err != nil {
		t.Fatal(err)
	}
	for range calls {
		unix.Getppid()
	}
	_, err = exec.Run(t.Context(), exec.Spec{
		Path: os.Args[0], Args: []string{"-test.run=^TestOther$"}, Env: []string{otherEnv + "=1"}, NewNamespaces: unix.CLONE_NEWPID,
	})
	if err != nil {
		t.Fatal(err)
	}
	after, err := c.Read()
	if err != nil {
		t.Fatal(err)
	}
	if n := after - before; n < calls || n > otherCalls/2 {
		t.Errorf("%d calls were counted, of %d here and %d elsewhere", n, calls, otherCalls)
	}
}
