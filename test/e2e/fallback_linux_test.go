//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	eventsv1 "k8s.io/api/events/v1"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
)

// testModeFallback wants mode ipvs on nodes whose kernel has no IPVS: one falls back
// to iptables, one, whose iptables lacks the match statistic too, to userspace. Each
// says so by an Event at its Node, a metric, its status and its log; one that may not
// fall back ends, and says nothing to the API server.
func testModeFallback(t *testing.T, c *cluster) {
	const noStatistic = "mode iptables cannot run either: the kernel lacks the match statistic"
	for _, tt := range []struct {
		node, mode, why string
		flags, env      []string
	}{
		{node: "falls-once", mode: "iptables", why: "mode ipvs"},
		{node: "falls-twice", mode: "userspace", why: noStatistic, env: []string{"PATH=" + withoutStatistic(t) + ":" + os.Getenv("PATH")}},
		{node: "refuses", flags: []string{"--mode-fallback=false"}},
	} {
		t.Run(tt.node, func(t *testing.T) {
			t.Parallel()
			createNode(t, c.client, tt.node)
			ns := newNode(t, c)
			p, out, ask := runKptraceEnv(t, c, ns, xtables.NFT, tt.env, append(tt.flags, "--proxy-mode=ipvs", "--hostname-override="+tt.node)...)
			if tt.mode == "" {
				select {
				case <-p.Done():
				case <-time.After(60 * time.Second):
					t.Fatal("--mode-fallback=false does not refuse")
				}
				if p.ExitCode() != 1 || !strings.Contains(out.String(), "mode ipvs cannot run here: ") {
					t.Errorf("it ended with %d:\n%s", p.ExitCode(), out)
				}
				for _, e := range events(t, c) {
					if e.Regarding.Name == tt.node {
						t.Errorf("an Event of a node that does not start: %+v", e)
					}
				}
				return
			}
			var told []eventsv1.Event
			eventually(t, "the Event", func() error {
				told = nil
				for _, e := range events(t, c) {
					if e.Reason == "ProxyModeFallback" && e.Regarding.Name == tt.node {
						told = append(told, e)
					}
				}
				if told == nil {
					return fmt.Errorf("none\n%s", out)
				}
				return nil
			})
			e := told[0]
			if len(told) != 1 || e.Type != "Warning" || e.Action != "StartKubeProxy" || e.Regarding.Kind != "Node" || e.ReportingInstance != "kube-proxy-"+tt.node ||
				!strings.HasPrefix(e.Note, "mode ipvs was asked for and cannot run: ") || !strings.HasSuffix(e.Note, "; using "+tt.mode) ||
				tt.mode == "userspace" && !strings.Contains(e.Note, tt.why) {
				t.Errorf("%d Events: %+v", len(told), told)
			}
			why := strings.TrimSuffix(strings.TrimPrefix(e.Note, "mode ipvs was asked for and cannot run: "), "; using "+tt.mode)
			eventually(t, "the metric", func() error {
				text, err := inside(ns, "http://127.0.0.1:10249/metrics")
				if want := fmt.Sprintf("\nkptrace_proxy_mode_fallback{mode=%q,wanted=\"ipvs\"} 1\n", tt.mode); err == nil && !strings.Contains(text, want) {
					err = fmt.Errorf("no%s in\n%s", want, text)
				}
				return err
			})
			eventually(t, "the status", func() error {
				s, err := ask("status")
				if err == nil && (!strings.Contains(s, "fell back to "+tt.mode) || !strings.Contains(s, why)) {
					err = errors.New(s)
				}
				return err
			})
			if !strings.Contains(out.String(), "falling back to the "+tt.mode+" mode") {
				t.Errorf("the log does not say it:\n%s", out)
			}
		})
	}
}

// withoutStatistic is a folder with an iptables-nft-restore that refuses the match
// statistic, as a kernel without it does.
func withoutStatistic(t *testing.T) string {
	t.Helper()
	restore, err := exec.LookPath("iptables-nft-restore")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	err = os.WriteFile(filepath.Join(dir, "iptables-nft-restore"), []byte(`#!/bin/sh
text=$(cat)
line=$(printf '%s\n' "$text" | grep -n -m 1 statistic)
if [ -n "$line" ]; then
	echo "iptables-nft-restore: line ${line%%:*} failed: no match statistic" >&2
	exit 2
fi
printf '%s\n' "$text" | exec `+restore+` "$@"
`), 0o700) //nolint:gosec // a program
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// inside gets a page in a namespace.
func inside(ns *netns.NS, url string) (string, error) {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
			into := ns.Do(func() error { // the socket is made here
				conn, err = new(net.Dialer).DialContext(ctx, network, addr)
				return nil
			})
			return conn, errors.Join(into, err)
		},
	}}
	res, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}
