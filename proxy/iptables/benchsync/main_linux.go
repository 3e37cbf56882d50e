// Command benchsync measures how long the iptables mode takes to program the
// kernel, beside the floor: the same bytes given to iptables-restore by nobody.
// Each line is measured in a process and network namespaces of its own, so its
// memory is its own.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// cell is one line of the table.
type cell struct {
	Flavour             string
	Services, Endpoints int
	NodePorts, Trace    bool
}

// result is what was measured. Times are in seconds, memory in bytes.
type result struct {
	cell
	Rules, Commits                int
	Full, Endpoint, Add, Remove   float64
	FloorFull, FloorEndpoint      float64
	Restart                       float64
	Memory                        int64
	DriftCPU, DriftSeen, Repaired float64
}

func main() {
	netns.Init()
	one := flag.String("cell", "", "measure one line, given as JSON, and print it as JSON")
	quick := flag.Bool("quick", false, "50 Services only, to see that it works")
	flag.Parse()
	if err := run(*one, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "benchsync:", err)
		os.Exit(1)
	}
}

func run(one string, quick bool) error {
	if os.Geteuid() != 0 || netns.Rootless() {
		return errors.New("this measures as root only: in a user namespace the kernel refuses forced socket buffers, and with them large commits of iptables-nft")
	}
	if one != "" {
		var c cell
		if err := json.Unmarshal([]byte(one), &c); err != nil {
			return err
		}
		r, err := measure(context.Background(), c)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	sizes := []int{1000, 5000}
	if quick {
		sizes = []int{50}
	}
	var cells []cell
	for _, trace := range []bool{false, true} {
		for _, n := range sizes {
			for _, flavour := range []string{"nft", "legacy"} {
				cells = append(cells, cell{flavour, n, 10, false, trace})
			}
		}
	}
	if !quick {
		cells = append(cells, cell{"nft", 2000, 10, true, true}, cell{"legacy", 2000, 10, true, true})
	}
	fmt.Println("Services x endpoints  flavour  rules    full sync (floor)   one endpoint (floor)  Service added  removed    restart    memory   drift seen in")
	for _, c := range cells {
		r, err := child(c)
		if err != nil {
			return err
		}
		r.print()
	}
	return nil
}

// child measures one line in a process of its own.
func child(c cell) (r result, err error) {
	arg, err := json.Marshal(c)
	if err != nil {
		return r, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	res, err := exec.Run(ctx, exec.Spec{Path: "/proc/self/exe", Args: []string{"-cell", string(arg)}})
	if err != nil {
		return r, fmt.Errorf("measuring %+v: %w", c, err)
	}
	return r, json.NewDecoder(bytes.NewReader(res.Stdout)).Decode(&r)
}

func (r *result) print() {
	what := fmt.Sprintf("%d x %d", r.Services, r.Endpoints)
	if r.NodePorts {
		what += " NodePort"
	}
	if r.Trace {
		what += " traced"
	}
	fmt.Printf("%-21s %-7s %7d  %7s (%7s)   %8s (%7s)     %8s  %8s  %8s  %5d MiB  %s, %.2f %% CPU\n", what, r.Flavour, r.Rules,
		show(r.Full), show(r.FloorFull), show(r.Endpoint), show(r.FloorEndpoint), show(r.Add), show(r.Remove), show(r.Restart),
		r.Memory>>20, show(r.DriftSeen), 100*r.DriftCPU)
}

func show(seconds float64) string {
	if seconds < 1 {
		return fmt.Sprintf("%.0f ms", 1000*seconds)
	}
	return fmt.Sprintf("%.2f s", seconds)
}
