// Command benchsync measures how long the iptables mode takes to program the
// kernel, beside the floor, which is the same bytes given to iptables-restore by
// nobody, and beside upstream kube-proxy. Each line is measured in a process and
// network namespaces of its own, so its memory is its own.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
)

// cell is one line of the first table.
type cell struct {
	// Mode is "ipvs" for what is measured in a guest; else it is iptables.
	Mode                string `json:",omitempty"`
	Flavour             string
	Services, Endpoints int
	NodePorts, Trace    bool
	// Rounds is how often a full sync is measured; the best counts, of ours as
	// of the floor, because whatever else runs only ever adds to it.
	Rounds int
}

// result is what was measured. Times are in seconds, memory in bytes.
type result struct {
	cell
	Rules, Commits        int
	Full, FloorFull       float64
	Endpoint, Add, Remove float64
	FloorEndpoint         float64
	Minimum               float64 // of the kernel, for one rule of nf_tables
	Restart               float64
	Memory                int64
	DriftCPU, DriftSeen   float64
	FloorAdd, FloorRemove float64
	Repaired              float64
}

// options are the flags.
type options struct {
	cell, beside string
	quick, ipvs  bool
	guest        bool
	lock         string
	limit        time.Duration
	services     int
	binary       string
}

func main() {
	umlguest.Init() // does not return in the first process of a sandbox or a guest
	var o options
	flag.StringVar(&o.cell, "cell", "", "measure one line, given as JSON, and print it as JSON")
	flag.StringVar(&o.beside, "beside", "", "measure one size beside upstream, given as JSON, and print it as JSON")
	flag.BoolVar(&o.quick, "quick", false, "50 Services only, to see that it works")
	flag.BoolVar(&o.ipvs, "ipvs", false, "measure mode ipvs beside upstream, in a guest (user-mode Linux), which needs no root")
	flag.IntVar(&o.services, "services", 0, "with -ipvs, this size alone")
	flag.BoolVar(&o.guest, "guest", false, "this is the guest")
	flag.StringVar(&o.lock, "lock", "", "a file to lock while a line is measured, so that nothing else that does the same disturbs it")
	flag.DurationVar(&o.limit, "limit", 45*time.Second, "how long upstream may take for its first full sync")
	flag.StringVar(&o.binary, "kptrace", "bin/kptrace", "the binary to measure beside upstream")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "benchsync:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	if o.ipvs {
		return inGuest(o)
	}
	if os.Geteuid() != 0 || netns.Rootless() {
		return errors.New("this measures as root only: in a user namespace the kernel refuses forced socket buffers, and with them large commits of iptables-nft")
	}
	// The lock of iptables is one for the whole machine. Others must not make
	// us wait, nor we them.
	dir, err := os.MkdirTemp("", "benchsync")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv("XTABLES_LOCKFILE", filepath.Join(dir, "xtables.lock")); err != nil {
		return err
	}
	ctx := context.Background()
	switch {
	case o.cell != "":
		return answer(o.cell, func(c cell) (*result, error) { return measure(ctx, c) })
	case o.beside != "":
		return answer(o.beside, func(c cell) ([]besideResult, error) { return beside(ctx, c, o) })
	}
	return tables(o)
}

// answer measures what is asked for in JSON and prints it in JSON.
func answer[R any](asked string, measure func(cell) (R, error)) error {
	var c cell
	if err := json.Unmarshal([]byte(asked), &c); err != nil {
		return err
	}
	r, err := measure(c)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// tables measures and prints everything.
func tables(o options) error {
	sizes := []int{1000, 5000}
	if o.quick {
		sizes = []int{50}
	}
	var cells []cell
	for _, trace := range []bool{false, true} {
		for _, n := range sizes {
			for _, flavour := range []string{"nft", "legacy"} {
				cells = append(cells, cell{"", flavour, n, 10, false, trace, fullRounds(flavour, n, trace)})
			}
		}
	}
	if !o.quick {
		cells = append(cells, cell{"", "nft", 2000, 10, true, true, 1}, cell{"", "legacy", 2000, 10, true, true, 1})
	}
	printHead()
	var all []result
	for _, c := range cells {
		var r result
		if err := child(o, "-cell", c, &r); err != nil {
			return err
		}
		r.print()
		all = append(all, r)
	}
	fmt.Println("\nkptrace and upstream as they run, each against the same API server with the same objects, without tracing:")
	printBesideHead()
	var pairs [][]besideResult
	for _, n := range sizes {
		var rs []besideResult
		if err := child(o, "-beside", cell{Services: n, Endpoints: 10}, &rs); err != nil {
			return err
		}
		for i := 0; i+1 < len(rs); i += 2 {
			printPair(rs[i], rs[i+1])
			pairs = append(pairs, rs[i:i+2])
		}
	}
	printGoals(all, pairs)
	return nil
}

// fullRounds is how often a full sync is measured: as often as the time allows.
func fullRounds(flavour string, services int, trace bool) int {
	switch {
	case services <= 1000, flavour == "legacy" && !trace:
		return 2
	}
	return 1
}

// child measures one line in a process of its own.
func child(o options, what string, c cell, into any) error {
	arg, err := json.Marshal(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 12*time.Minute)
	defer cancel()
	spec := exec.Spec{Path: "/proc/self/exe", Args: []string{what, string(arg), "-limit", o.limit.String(), "-kptrace", o.binary}, Stderr: os.Stderr}
	if o.lock != "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		spec.Path, spec.Args = "flock", append([]string{o.lock, self}, spec.Args...)
	}
	res, err := exec.Run(ctx, spec)
	if err != nil {
		return fmt.Errorf("measuring %+v: %w", c, err)
	}
	return json.NewDecoder(bytes.NewReader(res.Stdout)).Decode(into)
}
