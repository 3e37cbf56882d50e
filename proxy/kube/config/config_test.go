package config

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

// TestDefaults compares with what kube-proxy 1.36.3 writes by
// --write-config-to.
func TestDefaults(t *testing.T) {
	want, err := os.ReadFile("testdata/defaults.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Encode(Effective(Default()))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	back, warning, err := Decode(got)
	if err != nil || warning != "" || back.HealthzBindAddress != "0.0.0.0:10256" {
		t.Errorf("reading it back: %v, %q, %+v", err, warning, back)
	}
	if err := Validate(Default()); err != nil {
		t.Errorf("the defaults are not valid: %v", err)
	}
}

func TestDecode(t *testing.T) {
	for name, tt := range map[string]struct{ text, warning, err string }{
		"empty object":   {text: head},
		"json":           {text: `{"apiVersion":"kubeproxy.config.k8s.io/v1alpha1","kind":"KubeProxyConfiguration","mode":"ipvs"}`},
		"unknown field":  {text: head + "iptables:\n  masqueradeBits: 3\n", warning: `unknown field "iptables.masqueradeBits"`},
		"field twice":    {text: head + "mode: ipvs\nmode: iptables\n", warning: `"mode" already set`},
		"wrong case":     {text: head + "bindaddress: ::1\n", warning: `unknown field "bindaddress"`},
		"wrong type":     {text: head + "bindAddressHardFail: 3\n", err: "bindAddressHardFail"},
		"unknown kind":   {text: "apiVersion: v1\nkind: ConfigMap\n", err: `it is a ConfigMap of v1, not a KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1`},
		"other version":  {text: "apiVersion: kubeproxy.config.k8s.io/v1\nkind: KubeProxyConfiguration\n", err: "kubeproxy.config.k8s.io/v1"},
		"no kind":        {text: "mode: ipvs\n", err: "apiVersion or kind is missing: they are kubeproxy.config.k8s.io/v1alpha1 and KubeProxyConfiguration"},
		"no yaml at all": {text: "{", err: "decoding"},
	} {
		c, warning, err := Decode([]byte(tt.text))
		switch {
		case tt.err != "":
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: error %v, want one about %s", name, err, tt.err)
			}
			continue
		case err != nil:
			t.Errorf("%s: %v", name, err)
			continue
		case !strings.Contains(warning, tt.warning) || (tt.warning == "") != (warning == ""):
			t.Errorf("%s: warning %q, want one about %q", name, warning, tt.warning)
		}
		if c.IPTables.SyncPeriod.Duration != 30*time.Second {
			t.Errorf("%s: no defaults", name)
		}
	}
}

func TestDefaultsByFamily(t *testing.T) {
	c, _, err := Decode([]byte(head + "bindAddress: \"::\"\n"))
	if err != nil || c.HealthzBindAddress != "[::]:10256" || c.MetricsBindAddress != "[::1]:10249" {
		t.Errorf("%v %s %s", err, c.HealthzBindAddress, c.MetricsBindAddress)
	}
	c, _, err = Decode([]byte(head + "healthzBindAddress: 10.0.0.1\nmetricsBindAddress: \"[fd00::1]\"\n"))
	if err != nil || c.HealthzBindAddress != "10.0.0.1:10256" || c.MetricsBindAddress != "[fd00::1]:10249" {
		t.Errorf("%v %s %s", err, c.HealthzBindAddress, c.MetricsBindAddress)
	}
}

// TestValidate breaks one field at a time: the error names it, and nothing
// else is wrong.
func TestValidate(t *testing.T) {
	for _, tt := range []struct{ text, field string }{
		{"mode: fast", "mode"},
		{"iptables: {masqueradeBit: 32}", "iptables.masqueradeBit"},
		{"iptables: {masqueradeBit: -1}", "iptables.masqueradeBit"},
		{"iptables: {syncPeriod: -1s}", "iptables.syncPeriod"},
		{"iptables: {minSyncPeriod: -1s}", "iptables.minSyncPeriod"},
		{"iptables: {syncPeriod: 5s, minSyncPeriod: 6s}", "iptables.syncPeriod"},
		{"mode: ipvs\nipvs: {tcpTimeout: -1s}", "ipvs.tcpTimeout"},
		{"mode: ipvs\nipvs: {tcpFinTimeout: -1s}", "ipvs.tcpFinTimeout"},
		{"mode: ipvs\nipvs: {udpTimeout: -1s}", "ipvs.udpTimeout"},
		{"mode: ipvs\nipvs: {excludeCIDRs: [10.0.0.0/8, 10.0.0.1]}", "ipvs.excludeCIDRs[1]"},
		{"mode: nftables\nnftables: {masqueradeBit: 40}", "nftables.masqueradeBit"},
		{"conntrack: {maxPerCore: -1}", "conntrack.maxPerCore"},
		{"conntrack: {min: -1}", "conntrack.min"},
		{"conntrack: {tcpEstablishedTimeout: -1s}", "conntrack.tcpEstablishedTimeout"},
		{"conntrack: {tcpCloseWaitTimeout: -1s}", "conntrack.tcpCloseWaitTimeout"},
		{"conntrack: {udpTimeout: -1s}", "conntrack.udpTimeout"},
		{"conntrack: {udpStreamTimeout: -1s}", "conntrack.udpStreamTimeout"},
		{"oomScoreAdj: 1001", "oomScoreAdj"},
		{"configSyncPeriod: -1s", "configSyncPeriod"},
		{"clientConnection: {burst: -1}", "clientConnection.burst"},
		{"bindAddress: nowhere", "bindAddress"},
		{"healthzBindAddress: \"10.0.0.1:0\"", "healthzBindAddress"},
		{"metricsBindAddress: \"localhost:10249\"", "metricsBindAddress"},
		{"nodePortAddresses: [primary, 10.0.0.0/8]", "nodePortAddresses[0]"},
		{"nodePortAddresses: [10.0.0.0/8, 10.0.0.0/40]", "nodePortAddresses[1]"},
		{"detectLocalMode: Guess", "detectLocalMode"},
		{"detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface"},
		{"detectLocalMode: InterfaceNamePrefix", "detectLocal.interfaceNamePrefix"},
		{"clusterCIDR: 10.0.0.0", "clusterCIDR"},
		{"clusterCIDR: \"10.0.0.0/8,11.0.0.0/8\"", "clusterCIDR"},
		{"clusterCIDR: \"10.0.0.0/8,fd00::/8,fd01::/16\"", "clusterCIDR"},
		{"logging: {format: xml}", "logging.format"},
	} {
		c, warning, err := Decode([]byte(head + tt.text))
		if err != nil || warning != "" {
			t.Errorf("%s: %v %s", tt.text, err, warning)
			continue
		}
		err = Validate(c)
		if err == nil || !strings.HasPrefix(err.Error(), tt.field+": ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: error %v, want one that begins with %s", tt.text, err, tt.field)
		}
	}
	for _, text := range []string{
		"clusterCIDR: \"10.0.0.0/8,fd00::/8\"", "nodePortAddresses: [primary]", "mode: userspace",
		"detectLocalMode: NodeCIDR\nclusterCIDR: whatever", "iptables: {syncPeriod: 2s}",
	} {
		c, _, err := Decode([]byte(head + text))
		if err == nil {
			err = Validate(c)
		}
		if err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestConfigz(t *testing.T) {
	b, err := Configz(Default())
	var got map[string]map[string]any
	if err == nil {
		err = json.Unmarshal(b, &got)
	}
	c := got["kubeproxy.config.k8s.io"]
	if err != nil || c["kind"] != "KubeProxyConfiguration" || c["apiVersion"] != "kubeproxy.config.k8s.io/v1alpha1" ||
		c["healthzBindAddress"] != "0.0.0.0:10256" {
		t.Errorf("%v\n%s", err, b)
	}
}

// TestWatch changes the file in the ways that editors and the kubelet do.
func TestWatch(t *testing.T) {
	t.Parallel()
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unfit := func(now []byte) bool { return len(now) == 0 }
	for name, change := range map[string]func(t *testing.T, path string){
		"written in place": func(t *testing.T, path string) { write(t, path, "new") },
		"replaced": func(t *testing.T, path string) {
			write(t, path+".swp", "new")
			if err := os.Rename(path+".swp", path); err != nil {
				t.Error(err)
			}
		},
		"gone and back": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Error(err)
			}
			time.Sleep(2 * settle)
			write(t, path, "new")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "config.yaml")
			write(t, path, "old")
			done := make(chan error, 1)
			go func() { done <- Watch(t.Context(), path, []byte("old"), unfit) }()
			time.Sleep(settle)
			write(t, path, "old") // the same again is no change
			time.Sleep(2 * settle)
			write(t, path, "") // the disk was full
			select {
			case err := <-done:
				t.Fatalf("ended without a change: %v", err)
			case <-time.After(2 * settle):
			}
			change(t, path)
			select {
			case err := <-done:
				if !errors.Is(err, ErrChanged) {
					t.Errorf("ended with %v", err)
				}
			case <-time.After(5 * time.Second):
				t.Error("the change was not seen")
			}
		})
	}
	t.Run("a link moved as in a ConfigMap", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		for _, v := range []string{"v1", "v2"} {
			if err := os.Mkdir(filepath.Join(dir, v), 0o700); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, v, "config.conf"), v)
		}
		for link, to := range map[string]string{"..data": "v1", "config.conf": "..data/config.conf"} {
			if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
				t.Fatal(err)
			}
		}
		done := make(chan error, 1)
		go func() { done <- Watch(t.Context(), filepath.Join(dir, "config.conf"), []byte("v1"), unfit) }()
		time.Sleep(2 * settle)
		if err := os.Symlink("v2", filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			if !errors.Is(err, ErrChanged) {
				t.Errorf("ended with %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("the change was not seen")
		}
	})
	t.Run("the end", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "config.yaml")
		write(t, path, "old")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := Watch(ctx, path, []byte("old"), nil); err != nil {
			t.Error(err)
		}
	})
}
