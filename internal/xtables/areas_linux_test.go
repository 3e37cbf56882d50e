package xtables

import (
	"fmt"
	"hash/maphash"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// TestAreas reads lists as the kernel prints them.
func TestAreas(t *testing.T) {
	const list = `0x00000000c43bbe29-0x000000008b9ef796 54530048 xt_alloc_table_info+0x2f/0x90 pages=13312 vmalloc vpages N0=13312
0x0000000006fa5e54-0x00000000fe745535  110592 xt_alloc_table_info+0x2f/0x90 pages=26 vmalloc N0=26
0x000000009e782dcb-0x000000001c1c9ea1 54530048 pcpu_create_chunk+0x1f/0x90 pages=13312 vmalloc
0x000000005ceecd71-0x00000000d5a931f8 64530048 xt_alloc_table_info+0x2f/0x90 pages=15000 vmalloc vpages N0=13312
0x0000000033cf550d-0x00000000823a900a       0 unpurged vm_area
`
	file := filepath.Join(t.TempDir(), "vmallocinfo")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fresh := func() *areas {
		a := &areas{file: file, seed: maphash.MakeSeed()}
		a.note([]uint32{52645184})
		return a
	}
	write(list)
	for name, c := range map[string]struct {
		list         string
		moved, known bool
	}{
		"the same":                   {list, false, true},
		"long lines":                 {strings.Repeat("0x0000000000000001-0x0000000000000002 4096 x\n", 5000) + list, false, true},
		"ours is elsewhere":          {strings.Replace(list, "0x00000000c43bbe29", "0x00000000c43bbe30", 1), true, true},
		"another's is elsewhere":     {strings.Replace(list, "0x000000005ceecd71", "0x00000000c43bbe30", 1), false, true},
		"a small one is elsewhere":   {strings.Replace(list, "0x0000000006fa5e54", "0x00000000c43bbe30", 1), false, true},
		"there is a second one":      {list + strings.Replace(list, "0x00000000c43bbe29", "0x00000000c43bbe30", 1), true, true},
		"ours is away":               {strings.Replace(list, "54530048 xt", "34530048 xt", 1), true, true},
		"addresses are not told":     {strings.ReplaceAll(list, "0x00000000c43bbe29", "0x0000000000000000"), false, false},
		"addresses are not told yet": {strings.ReplaceAll(list, "0x00000000c43bbe29", "(____ptrval____)"), false, false},
		"a line longer than any is":  {list + strings.Repeat("x", 1<<20), false, false},
	} {
		write(list)
		a := fresh()
		if !a.known {
			t.Fatal("the table is not found")
		}
		write(c.list)
		if moved := a.moved(); moved != c.moved || a.known != c.known {
			t.Errorf("%s: moved %t, known %t, want %t and %t", name, moved, a.known, c.moved, c.known)
		}
	}
	write(strings.ReplaceAll(list, "54530048", "34530048"))
	if fresh().known {
		t.Error("a table that is in no area is known")
	}
}

// TestLegacyLarge has a rule of a large table replaced by one of the same size, with
// and without the list of areas.
func TestLegacyLarge(t *testing.T) {
	for _, file := range []string{areasFile, "/nonexistent"} {
		t.Run(filepath.Base(file), func(t *testing.T) {
			ns, err := netns.New()
			if err != nil {
				t.Fatal(err)
			}
			defer ns.Close()
			lock := filepath.Join(t.TempDir(), "lock")
			if err := os.WriteFile(lock, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			run := func(program, stdin string, args ...string) {
				t.Helper()
				if _, err := exec.Run(t.Context(), exec.Spec{Path: program, Args: args, Netns: ns.Fd(),
					Env: []string{"XTABLES_LOCKFILE=" + lock}, Stdin: strings.NewReader(stdin)}); err != nil {
					t.Fatal(err)
				}
			}
			const rules = 30_000
			var b strings.Builder
			b.WriteString("*nat\n:A - [0:0]\n")
			for i := range rules {
				fmt.Fprintf(&b, "-A A -d 10.1.%d.%d -j RETURN\n", i>>8, i&255)
			}
			b.WriteString("COMMIT\n")
			run("iptables-legacy-restore", b.String())
			w, err := OpenWatch(WatchConfig{Flavour: Legacy, Netns: ns.Fd(), LockFile: lock, Tables: []string{"nat"}})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			side := w.side.(*legacyWatch)
			side.areas.file = file
			w.Settle(1)
			if n := side.info["nat"][1]; n <= smallTables {
				t.Fatalf("the table has %d bytes, want more than %d", n, smallTables)
			}
			known := side.areas.known
			if b, err := os.ReadFile(file); known != (err == nil && strings.Contains(string(b), areaOwner) && !strings.Contains(string(b), "0x0000000000000000")) {
				t.Errorf("where tables are is known: %t; its list: %v, %d bytes", known, err, len(b))
			}
			look := func() Sight {
				time.Sleep(10 * time.Millisecond) // so that it looks again
				return w.Look()
			}
			look() // at the content for the first time
			run("iptables-legacy", "", "-w", "-t", "nat", "-S", "PREROUTING")
			if got := look(); got.Suspicion != Quiet {
				t.Errorf("after the lock was used: %+v", got)
			}
			if read := side.content["nat"] != 0; read == known {
				t.Errorf("where the table is is known: %t, its content was read: %t", known, read)
			}
			// What we write ourselves, and our other family, is no sign of others.
			w.Pause(false)
			run("iptables-legacy", "", "-w", "-t", "nat", "-R", "A", "2", "-d", "10.2.0.2", "-j", "RETURN")
			w.Settle(1)
			look()
			w.Aside(func() { run("ip6tables-legacy", "", "-w", "-t", "nat", "-S", "PREROUTING") })
			if got := look(); got.Suspicion != Quiet {
				t.Errorf("after we wrote: %+v", got)
			}
			run("iptables-legacy", "", "-w", "-t", "nat", "-R", "A", "1", "-d", "10.2.0.1", "-j", "RETURN")
			got := look()
			for end := time.Now().Add(10 * time.Second); got.Suspicion == Quiet && time.Now().Before(end); got = look() {
			}
			if want := map[bool]Suspicion{true: Written, false: Certain}[known]; got.Suspicion != want {
				t.Errorf("a changed rule: %+v, want suspicion %d", got, want)
			}
			w.Pause(true)
			w.Settle(0)
			if got := w.Look(); got.Suspicion != Quiet {
				t.Errorf("after all was compared: %+v", got)
			}
		})
	}
}
