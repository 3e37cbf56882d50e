package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube/config"
)

// kubeProxyFlags is a command line with every flag of kube-proxy 1.36.
func kubeProxyFlags() []string {
	return []string{
		"--feature-gates=A=true", "--kubeconfig=/k", "--master=https://m", "--kube-api-content-type=application/json",
		"--kube-api-burst=7", "--kube-api-qps=3.5", "--hostname-override=Node1", "--bind-address=10.0.0.1",
		"--healthz-bind-address=127.0.0.1:1", "--metrics-bind-address=127.0.0.1:2", "--bind-address-hard-fail",
		"--profiling", "--show-hidden-metrics-for-version=1.35", "--proxy-mode=iptables", "--iptables-masquerade-bit=5",
		"--masquerade-all", "--iptables-localhost-nodeports=false", "--iptables-sync-period=20s",
		"--iptables-min-sync-period=2s", "--ipvs-sync-period=40s", "--ipvs-min-sync-period=1s", "--ipvs-scheduler=wrr",
		"--ipvs-exclude-cidrs=10.0.0.0/8,11.0.0.0/8", "--ipvs-strict-arp", "--ipvs-tcp-timeout=1s",
		"--ipvs-tcpfin-timeout=2s", "--ipvs-udp-timeout=3s", "--detect-local-mode=ClusterCIDR", "--pod-bridge-interface=br0",
		"--pod-interface-name-prefix=veth", "--cluster-cidr=10.244.0.0/16,fd00::/64", "--nodeport-addresses=10.0.0.0/8",
		"--oom-score-adj=-500", "--conntrack-max-per-core=10", "--conntrack-min=20",
		"--conntrack-tcp-timeout-established=1h", "--conntrack-tcp-timeout-close-wait=2h", "--conntrack-tcp-be-liberal",
		"--conntrack-udp-timeout=4s", "--conntrack-udp-timeout-stream=5s", "--config-sync-period=1m",
		"--healthz-port=10256", "--metrics-port=10249", "--vmodule=a=1", "--logging-format=text", "--log-flush-frequency=6s", "-v", "2",
	}
}

func parsed(t *testing.T, args ...string) *kubeFlags {
	t.Helper()
	k := &kubeFlags{}
	fl := pflag.NewFlagSet("proxy", pflag.ContinueOnError)
	k.add(fl)
	fl.SetOutput(t.Output())
	if err := fl.Parse(args); err != nil {
		t.Fatal(err)
	}
	return k
}

// TestEveryFlag accepts a whole kube-proxy command line, and has its values.
func TestEveryFlag(t *testing.T) {
	k := parsed(t, kubeProxyFlags()...)
	c, file, said, err := k.resolve()
	if err != nil || file != nil {
		t.Fatal(err, file)
	}
	if c.ClientConnection.Kubeconfig != "/k" || c.ClientConnection.QPS != 3.5 || c.ClientConnection.Burst != 7 ||
		c.HostnameOverride != "Node1" || *c.IPTables.MasqueradeBit != 5 || !c.IPTables.MasqueradeAll ||
		c.IPVS.Scheduler != "wrr" || len(c.IPVS.ExcludeCIDRs) != 2 || c.NodePortAddresses[0] != "10.0.0.0/8" ||
		c.HealthzBindAddress != "127.0.0.1:1" || k.verbosity != 2 || k.master != "https://m" {
		t.Errorf("%+v", c)
	}
	if len(said) != 1 || !strings.HasPrefix(said[0], "accepted, and without effect in kptrace: ") ||
		!strings.Contains(said[0], "--feature-gates") || strings.Contains(said[0], "--masquerade-all") {
		t.Errorf("said %q", said)
	}
}

// TestConfigFile: what the file knows counts, not the flags, but for logging
// and the node's name.
func TestConfigFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	text := "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n" +
		"hostnameOverride: other\niptables: {masqueradeBit: 9}\nlogging: {verbosity: 5}\nclientConnection: {kubeconfig: /from/file}\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k := parsed(t, append(kubeProxyFlags(), "--config", path)...)
	c, file, said, err := k.resolve()
	if err != nil || string(file) != text {
		t.Fatal(err, string(file))
	}
	if *c.IPTables.MasqueradeBit != 9 || c.IPTables.MasqueradeAll || c.ClientConnection.Kubeconfig != "/from/file" ||
		c.HostnameOverride != "Node1" || k.verbosity != 2 || c.HealthzBindAddress != "0.0.0.0:10256" {
		t.Errorf("%+v", c)
	}
	if len(said) != 2 || !strings.HasPrefix(said[0], "ignored because --config is given: ") ||
		said[1] != "accepted, and without effect in kptrace: --log-flush-frequency --vmodule" ||
		!strings.Contains(said[0], "--masquerade-all") || strings.Contains(said[0], "--hostname-override") {
		t.Errorf("said %q", said)
	}
	k = parsed(t, "--config", path)
	if c, _, said, err := k.resolve(); err != nil || len(said) > 0 || c.HostnameOverride != "other" || k.verbosity != 5 {
		t.Errorf("%v %q %+v", err, said, c)
	}
	if err := os.WriteFile(path, []byte(text+"oomScoreAdj: 5000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := parsed(t, "--config", path).resolve(); err == nil || !strings.HasPrefix(err.Error(), path+": oomScoreAdj: ") {
		t.Errorf("error %v, want one that names file and field", err)
	}
}

// TestFlagErrors name the flag.
func TestFlagErrors(t *testing.T) {
	for _, arg := range []string{
		"--mode=fast", "--iptables-masquerade-bit=32", "--iptables-sync-period=0s", "--nodeport-addresses=10.0.0.1",
		"--detect-local-mode=Guess", "--healthz-bind-address=here", "--conntrack-min=-1", "--cluster-cidr=10.0.0.0",
	} {
		_, _, _, err := parsed(t, arg).resolve()
		name, _, _ := strings.Cut(arg, "=")
		if err == nil || !strings.HasPrefix(err.Error(), name+"=") {
			t.Errorf("%s: error %v", arg, err)
		}
	}
}

func TestServed(t *testing.T) {
	for _, tt := range []struct {
		args             []string
		dropIn           bool
		healthz, metrics string
	}{
		{nil, true, "0.0.0.0:10256", "127.0.0.1:10249"},
		{nil, false, "", ""},
		{[]string{"--healthz-bind-address=127.0.0.1:5"}, false, "127.0.0.1:5", ""},
		{[]string{"--healthz-port=0", "--metrics-port=0"}, true, "", ""},
		{[]string{"--metrics-bind-address="}, true, "0.0.0.0:10256", ""},
		{[]string{"--metrics-bind-address=127.0.0.9", "--metrics-port=77"}, true, "0.0.0.0:10256", "127.0.0.9:77"},
	} {
		k := parsed(t, tt.args...)
		c, _, _, err := k.resolve()
		if err != nil {
			t.Fatal(tt.args, err)
		}
		h, err := k.http(c, tt.dropIn)
		if err != nil || h.Healthz != tt.healthz || h.Metrics != tt.metrics || !strings.Contains(string(h.Configz), "kubeproxy.config.k8s.io") {
			t.Errorf("%v: %v %+v", tt.args, err, h)
		}
	}
}

func TestConntrackMax(t *testing.T) {
	for _, tt := range []struct{ perCore, least, cpus, want int }{
		{32768, 131072, 2, 131072}, {32768, 131072, 8, 262144}, {32768, 131072, 64, 1 << 20}, {0, 131072, 8, 0}, {10, 0, 3, 30},
	} {
		if got := conntrackMax(tt.perCore, tt.least, tt.cpus); got != tt.want {
			t.Errorf("%+v: got %d", tt, got)
		}
	}
	names := func(list []node.Sysctl) (n []string) {
		for _, s := range list {
			n = append(n, strings.TrimPrefix(s.Name, "net/netfilter/nf_conntrack_")+"="+s.Value)
		}
		return n
	}
	for _, tt := range []struct {
		args   []string
		dropIn bool
		want   []string
	}{
		{nil, false, nil},
		{[]string{"--conntrack-udp-timeout=9s"}, false, []string{"udp_timeout=9"}},
		{[]string{"--conntrack-max-per-core=0"}, true, []string{"tcp_timeout_established=86400", "tcp_timeout_close_wait=3600"}},
		{[]string{"--conntrack-max-per-core=1", "--conntrack-min=4000", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-be-liberal"}, true,
			[]string{"max=4000", "buckets=1000", "tcp_timeout_close_wait=3600", "tcp_be_liberal=1"}},
	} {
		k := parsed(t, tt.args...)
		c, _, _, err := k.resolve()
		if err != nil {
			t.Fatal(err)
		}
		if got := names(k.sysctls(c, tt.dropIn)); !slices.Equal(got, tt.want) {
			t.Errorf("%v: got %v, want %v", tt.args, got, tt.want)
		}
	}
}

func TestChooseMode(t *testing.T) {
	for _, tt := range []struct {
		text     string
		fallBack bool
		want     proxy.Mode
		bad      bool
	}{
		{"", true, proxy.IPTables, false}, {"iptables", false, proxy.IPTables, false}, {"ipvs", true, proxy.IPVS, false},
		{"userspace", true, proxy.Userspace, false}, {"fast", true, "", true},
		{config.ModeNFTables, true, config.ModeNFTables, false}, {config.ModeNFTables, false, "", true},
	} {
		got, fallback, err := chooseMode(tt.text, tt.fallBack)
		if got != tt.want || (err != nil) != tt.bad || (fallback != "") != (got == config.ModeNFTables) {
			t.Errorf("%q, %v: %q, %q, %v", tt.text, tt.fallBack, got, fallback, err)
		}
	}
}

// TestFromNFTables runs iptables with what was configured for nftables.
func TestFromNFTables(t *testing.T) {
	c, _, err := config.Decode([]byte("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n" +
		"nftables: {masqueradeBit: 3, masqueradeAll: true, syncPeriod: 7s, minSyncPeriod: 2s}\n"))
	if err != nil {
		t.Fatal(err)
	}
	got := fromNFTables(c)
	i := &got.IPTables
	if *i.MasqueradeBit != 3 || !i.MasqueradeAll || i.SyncPeriod.Duration != 7*time.Second || i.MinSyncPeriod.Duration != 2*time.Second ||
		!slices.Equal(got.NodePortAddresses, []string{"primary"}) || c.IPTables.MasqueradeAll {
		t.Errorf("%+v, node ports %v", i, got.NodePortAddresses)
	}
	c.NodePortAddresses = []string{"10.0.0.0/8"}
	if got := fromNFTables(c).NodePortAddresses; !slices.Equal(got, c.NodePortAddresses) {
		t.Errorf("node ports %v", got)
	}
	if err := config.Validate(got); err != nil {
		t.Error(err)
	}
}
