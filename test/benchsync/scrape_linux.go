package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/netns"
)

// metricsAddr is where a proxy serves its metrics, in its own namespace.
const metricsAddr = "127.0.0.1:10249"

// metrics is what is read of a proxy's own, of IPv4: how many full and partial
// syncs there were, how many seconds they took together, and the rules in nat.
type metrics struct {
	fulls, full, partials, partial, rules float64
}

func (m metrics) syncs() float64 { return m.fulls + m.partials }
func (m metrics) took() float64  { return m.full + m.partial }

// scrape asks the proxy in a namespace.
func scrape(ctx context.Context, ns *netns.NS, mode string) (m metrics, err error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, DisableCompression: true,
		DialContext: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
			err = ns.Do(func() error {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return conn, err
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddr+"/metrics", nil)
	if err != nil {
		return m, err
	}
	res, err := client.Do(req)
	if err != nil {
		return m, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return m, fmt.Errorf("%s from /metrics", res.Status)
	}
	const prefix = "kubeproxy_sync_"
	want := map[string]*float64{
		prefix + `full_proxy_rules_duration_seconds_count{ip_family="IPv4"}`:    &m.fulls,
		prefix + `full_proxy_rules_duration_seconds_sum{ip_family="IPv4"}`:      &m.full,
		prefix + `partial_proxy_rules_duration_seconds_count{ip_family="IPv4"}`: &m.partials,
		prefix + `partial_proxy_rules_duration_seconds_sum{ip_family="IPv4"}`:   &m.partial,
		prefix + `proxy_rules_iptables_total{ip_family="IPv4",table="nat"}`:     &m.rules,
	}
	if mode == modeIPVS { // every sync is a whole one there
		want = map[string]*float64{
			prefix + `proxy_rules_duration_seconds_count{ip_family="IPv4"}`: &m.fulls,
			prefix + `proxy_rules_duration_seconds_sum{ip_family="IPv4"}`:   &m.full,
		}
	}
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if to := want[name]; to != nil {
			if *to, err = strconv.ParseFloat(value, 64); err != nil {
				return m, fmt.Errorf("%s: %w", lines.Text(), err)
			}
		}
	}
	return m, lines.Err()
}
