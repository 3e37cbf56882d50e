package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/trace/bundle"
)

// Collect reads from this network namespace what a bug report holds of a node's
// kernel: rules, sets, virtual servers, counters, settings, devices, versions. It
// changes nothing. Each file that cannot be had says why.
func Collect(ctx context.Context) []bundle.File {
	var files []bundle.File
	add := func(name, about string, read func() ([]byte, error)) {
		f := bundle.File{Name: name, About: about}
		data, err := read()
		if f.Data = data; err != nil {
			f.Data, f.Why = nil, err.Error()
		}
		files = append(files, f)
	}
	run := func(program string, args ...string) func() ([]byte, error) {
		return func() ([]byte, error) {
			res, err := exec.Run(ctx, exec.Spec{Path: program, Args: args, Grace: -1})
			return res.Stdout, err
		}
	}
	var tools xtables.Tools
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
			program := xtables.Program(fl, fa, "save")
			add(bundle.RulesDir+program+".txt", "the rules with their counters", func() ([]byte, error) {
				text, err := tools.SaveText(ctx, fl, fa, "", true)
				return []byte(text), err
			})
		}
	}
	add(bundle.NFTRules, "all tables of nf_tables", run("nft", "list", "ruleset"))
	add(bundle.IPSets, "ipsets", run("ipset", "save"))
	add("ipvs.txt", "virtual servers (/proc/net/ip_vs)", func() ([]byte, error) { return os.ReadFile("/proc/thread-self/net/ip_vs") })
	add("recent.txt", "clients of session affinity (xt_recent)", readRecent)
	add("conntrack.json", "what connection tracking counts", readCounters)
	add("sysctls.txt", "settings that matter to Services", readSettings)
	add("devices.txt", "interfaces and their addresses", readDevices)
	add("versions.txt", "kernel, system and tools", func() ([]byte, error) { return versions(ctx), nil })
	return files
}

func readRecent() ([]byte, error) {
	names, err := filepath.Glob("/proc/thread-self/net/xt_recent/*")
	if err == nil && len(names) == 0 {
		err = errors.New("there are no lists of clients: no Service has session affinity, or none was used")
	}
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it has just gone
		}
		fmt.Fprintf(&b, "# %s\n%s", filepath.Base(name), text)
	}
	return b.Bytes(), nil
}

func readCounters() ([]byte, error) {
	conn, err := conntrack.Open(conntrack.Config{})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stats, err := conn.Stats()
	if err != nil {
		return nil, err
	}
	return json.MarshalIndent(stats, "", "  ")
}

// settings are the sysctls of a bug report, by pattern below /proc/sys.
var settings = []string{ //nolint:gochecknoglobals // a table
	"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/*/rp_filter", "net/ipv4/conf/*/route_localnet",
	"net/ipv4/conf/*/forwarding", "net/ipv4/conf/all/arp_ignore", "net/ipv4/conf/all/arp_announce",
	"net/ipv4/ip_local_port_range", "net/ipv4/ip_local_reserved_ports", "net/ipv4/tcp_max_syn_backlog", "net/core/somaxconn",
	"net/ipv4/tcp_syn_retries", "net/ipv4/tcp_tw_reuse", "net/ipv4/ip_nonlocal_bind",
	"net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables",
	"net/netfilter/nf_conntrack_*", "net/netfilter/nf_log/2", "net/netfilter/nf_log/10", "net/netfilter/nf_log_all_netns",
	"net/ipv4/vs/*",
}

func readSettings() ([]byte, error) {
	var b bytes.Buffer
	for _, pattern := range settings {
		names, err := filepath.Glob("/proc/sys/" + pattern)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			name = strings.TrimPrefix(name, "/proc/sys/")
			if v, err := readSysctl(name); err == nil {
				fmt.Fprintf(&b, "%s = %s\n", name, v)
			}
		}
	}
	return b.Bytes(), nil
}

func readDevices() ([]byte, error) {
	list, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for i := range list {
		fmt.Fprintf(&b, "%d %s mtu %d %s", list[i].Index, list[i].Name, list[i].MTU, list[i].Flags)
		addrs, err := list[i].Addrs()
		for _, a := range addrs {
			fmt.Fprintf(&b, " %s", a)
		}
		if err != nil {
			fmt.Fprintf(&b, " (%v)", err)
		}
		b.WriteByte('\n')
	}
	return b.Bytes(), nil
}

func versions(ctx context.Context) []byte {
	var b bytes.Buffer
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		fmt.Fprintf(&b, "kernel %s %s\n", unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Version[:]))
	}
	fmt.Fprintf(&b, "go %s %s\n", runtime.Version(), runtime.GOARCH)
	if text, err := os.ReadFile("/etc/os-release"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
				b.WriteString("system " + name)
			}
		}
	}
	for _, program := range []string{"iptables", "nft", "ipset", "ipvsadm"} {
		res, err := exec.Run(ctx, exec.Spec{Path: program, Args: []string{"--version"}, Grace: -1})
		if err != nil {
			fmt.Fprintf(&b, "%s: %v\n", program, err)
			continue
		}
		first, _, _ := strings.Cut(string(res.Stdout), "\n")
		fmt.Fprintf(&b, "%s\n", first)
	}
	return b.Bytes()
}

// collect answers a client who makes a bug report, by a bundle of what is as it is:
// whoever asks redacts it.
func (n *node) collect(ctx context.Context, _ relay.CollectRequest) (relay.CollectResponse, error) {
	files := Collect(ctx)
	page := page{header: http.Header{}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "/metrics", http.NoBody)
	if err != nil {
		return relay.CollectResponse{}, err
	}
	n.metrics.Handler().ServeHTTP(&page, req)
	files = append(files,
		bundle.File{Name: "metrics.txt", About: "the metrics, as scraped", Data: page.Bytes()},
		bundle.File{Name: "config.txt", About: "how kptrace was started, without secrets", Data: invocation(os.Args)},
	)
	var b bytes.Buffer
	if err := bundle.Write(&b, bundle.Manifest{Version: n.cfg.Version, Made: time.Now(), Node: n.cfg.Name}, files); err != nil {
		return relay.CollectResponse{}, err
	}
	return relay.CollectResponse{Node: n.cfg.Name, Bundle: b.Bytes()}, nil
}

// page takes a page that is served.
type page struct {
	bytes.Buffer
	header http.Header
}

func (p *page) Header() http.Header { return p.header }
func (p *page) WriteHeader(int)     {}

// secret are options and keys whose values nobody should see.
var secret = regexp.MustCompile(`(?i)header|token|password|secret|key|cert|credential|auth|kubeconfig`)

// invocation is a command line, an argument a line, and the configuration file it
// names, both without what may be secret.
func invocation(args []string) []byte {
	var b strings.Builder
	hide, config := false, ""
	for i, a := range args {
		if i == 0 {
			a = filepath.Base(a)
		}
		name, value, ok := strings.Cut(a, "=")
		option := strings.HasPrefix(a, "-")
		switch {
		case option && ok && secret.MatchString(name):
			a = name + "=(hidden)"
		case !option && hide:
			a = "(hidden)"
		}
		hide = option && !ok && secret.MatchString(name)
		if name == "--config" && ok {
			config = value
		} else if a == "--config" && i+1 < len(args) {
			config = args[i+1]
		}
		b.WriteString(a + "\n")
	}
	if config == "" {
		return []byte(b.String())
	}
	b.WriteString("\n# the file of --config\n")
	text, err := os.ReadFile(config)
	if err != nil {
		b.WriteString("# it cannot be read\n")
	}
	for line := range strings.Lines(string(text)) {
		if key, _, ok := strings.Cut(line, ":"); ok && secret.MatchString(key) {
			line = key + ": (hidden)\n"
		}
		b.WriteString(line)
	}
	return []byte(b.String())
}
