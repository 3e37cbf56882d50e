package archtest

import "strings"

// Rules says what a tree may look like.
type Rules struct {
	// Order lists the top-level folders that hold Go code. A package imports
	// only from folders left of its own.
	Order []string
	// Free lists the folders inside which packages may import each other,
	// as long as no cycle arises, tests included. Inside all others a package
	// imports its ancestors only.
	Free []string
	// Homes gives heavy or dangerous imports the folders they may appear in.
	Homes []Home
}

// Home says where some imports may appear.
type Home struct {
	// Imports are import paths. Each also covers what is below it.
	Imports []string
	// Folders are the folders, relative to the module, in and below which
	// these imports are allowed. None means nowhere.
	Folders []string
}

// Kptrace returns the rules of this module.
func Kptrace() Rules {
	return Rules{
		Order: []string{
			"internal", "conntrack", "proxy", "trace", "exporters",
			"dashboards", "kube", "node", "lab", "cmd", "test",
		},
		Free: []string{"internal"},
		Homes: []Home{
			{
				Imports: []string{"k8s.io", "sigs.k8s.io"},
				Folders: []string{"proxy/kube", "kube", "cmd", "test"},
			},
			{
				Imports: []string{"github.com/prometheus/client_golang"},
				Folders: []string{"exporters/prom"},
			},
			{
				Imports: []string{"github.com/grafana/grafana-foundation-sdk"},
				Folders: []string{"dashboards/generate"},
			},
			{
				Imports: []string{"go.opentelemetry.io"},
				Folders: []string{"exporters/otlp"},
			},
			{
				Imports: []string{"google.golang.org/grpc", "google.golang.org/protobuf", "google.golang.org/genproto"},
				Folders: []string{"exporters/relay", "exporters/otlp", "cmd"},
			},
			{
				Imports: []string{
					"github.com/google/gopacket", "github.com/florianl/go-nflog",
					"github.com/ti-mo/conntrack", "github.com/ti-mo/netfilter",
				},
				Folders: []string{"trace", "conntrack", "internal"},
			},
			{Imports: []string{"github.com/moby/ipvs"}, Folders: []string{"proxy/ipvs", "trace"}},
			{Imports: []string{"github.com/cilium/ebpf"}, Folders: []string{"trace/source/drop", "internal/dataplane", "internal/syscount"}},
			{Imports: []string{"os/exec"}, Folders: []string{"internal/exec"}},
			// The binary is built without cgo and cross-built for other systems.
			{Imports: []string{"C"}},
		},
	}
}

// rank is the place of a top-level folder in the order, -1 if it has none.
func (r Rules) rank(folder string) int {
	for i, f := range r.Order {
		if f == folder {
			return i
		}
	}
	return -1
}

func (r Rules) free(folder string) bool {
	for _, f := range r.Free {
		if f == folder {
			return true
		}
	}
	return false
}

// top is the first element of a slash-separated path.
func top(path string) string {
	first, _, _ := strings.Cut(path, "/")
	return first
}

// within reports whether path is folder or lies below it.
func within(path, folder string) bool {
	return path == folder || strings.HasPrefix(path, folder+"/")
}
