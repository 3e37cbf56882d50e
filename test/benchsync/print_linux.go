package main

import (
	"fmt"
	"os"
	"strings"
)

// The goals, of 5,000 Services with 10 endpoints each, in seconds and ratios.
const (
	goalServices = 5000
	goalFull     = 15
	goalEndpoint = 0.060
	goalService  = 0.100
	goalFloor    = 1.1
	goalMemory   = 0.7
)

func printHead() {
	fmt.Printf("load %s; full syncs: the best of some; small changes: the median of %d; each in turn with the floor\n\n", load(), rounds)
	fmt.Println("Services x endpoints  flavour  rules    full sync (floor)   one endpoint (floor)  Service added (floor)  removed (floor)       kernel's minimum  restart    memory   drift seen in")
}

func (r *result) print() {
	what := fmt.Sprintf("%d x %d", r.Services, r.Endpoints)
	if r.NodePorts {
		what += " NodePort"
	}
	if r.Trace {
		what += " traced"
	}
	least := "-"
	if r.Minimum > 0 {
		least = show(r.Minimum)
	}
	fmt.Printf("%-21s %-7s %7d  %7s (%7s)   %8s (%7s)     %8s (%7s)     %8s (%7s)   %16s  %8s  %5d MiB  %s, %.2f %% CPU\n", what, r.Flavour, r.Rules,
		show(r.Full), show(r.FloorFull), show(r.Endpoint), show(r.FloorEndpoint), show(r.Add), show(r.FloorAdd), show(r.Remove), show(r.FloorRemove),
		least, show(r.Restart), r.Memory>>20, show(r.DriftSeen), 100*r.DriftCPU)
}

func show(seconds float64) string {
	if seconds < 1 {
		return fmt.Sprintf("%.0f ms", 1000*seconds)
	}
	return fmt.Sprintf("%.2f s", seconds)
}

func printBesideHead() {
	fmt.Println("Services x endpoints  flavour  proxy      full sync    one endpoint  Service added  removed    peak memory")
}

// printPair prints a line for each of two proxies, and ours divided by theirs.
func printPair(theirs, ours besideResult) {
	what := fmt.Sprintf("%d x %d", theirs.Services, theirs.Endpoints)
	const line = "%-21s %-8s %-9s  %-11s  %-12s  %-13s  %-9s  %s\n"
	for _, r := range []besideResult{theirs, ours} {
		fmt.Printf(line, what, r.Flavour, r.Proxy, r.Full, r.Endpoint, r.Add, r.Remove, fmt.Sprintf("%d MiB", r.Memory>>20))
		what = ""
	}
	fmt.Printf(line, "", "", "ratio", ours.Full.by(theirs.Full), ours.Endpoint.by(theirs.Endpoint), ours.Add.by(theirs.Add),
		ours.Remove.by(theirs.Remove), fmt.Sprintf("%.2f", float64(ours.Memory)/float64(theirs.Memory)))
}

// printGoals says of each goal whether it is met.
func printGoals(all []result, pairs [][]besideResult) {
	fmt.Printf("\ngoals, with 5,000 Services (load now %s):\n", load())
	say := func(met bool, format string, args ...any) {
		word := "met   "
		if !met {
			word = "missed"
		}
		fmt.Printf("  %s  %s\n", word, fmt.Sprintf(format, args...))
	}
	for _, r := range all {
		if r.Services != goalServices || r.Trace || r.NodePorts {
			continue
		}
		if r.Flavour == "legacy" {
			say(r.Full <= goalFloor*r.FloorFull, "legacy, full sync: %.2f of the floor, goal %.1f", r.Full/r.FloorFull, goalFloor)
			say(r.Endpoint <= goalFloor*r.FloorEndpoint, "legacy, one endpoint: %.2f of the floor, goal %.1f", r.Endpoint/r.FloorEndpoint, goalFloor)
			continue
		}
		say(r.Full <= goalFull, "nft, full sync: %s, goal %d s", show(r.Full), goalFull)
		for _, g := range []struct {
			what              string
			took, goal, floor float64
		}{
			{"one endpoint", r.Endpoint, goalEndpoint, r.FloorEndpoint}, {"Service added", r.Add, goalService, r.FloorAdd},
			{"Service removed", r.Remove, goalService, r.FloorRemove},
		} {
			text := fmt.Sprintf("nft, %s: %s, goal %s", g.what, show(g.took), show(g.goal))
			if g.took > g.goal {
				text += fmt.Sprintf("; %.2f of the floor", g.took/g.floor)
				if g.what != "Service removed" { // a commit that only removes is not checked
					text += fmt.Sprintf("; %.2f of the kernel's minimum: %s for a transaction of one rule", g.took/r.Minimum, show(r.Minimum))
				}
			}
			say(g.took <= g.goal, "%s", text)
		}
	}
	for _, p := range pairs {
		if p[0].Services != goalServices {
			continue
		}
		share := float64(p[1].Memory) / float64(p[0].Memory)
		say(share <= goalMemory, "memory at %d Services, %s: %.2f of upstream's, goal %.1f", p[0].Services, p[0].Flavour, share, goalMemory)
	}
}

// load is how many processes want to run, over a minute.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	one, _, _ := strings.Cut(string(b), " ")
	return one
}
