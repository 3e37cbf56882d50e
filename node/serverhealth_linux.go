package node

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/serverhealth"
)

// overlayPatience is how long to wait for the kernel to have an outage before
// stuck connections are let go.
const overlayPatience = 5 * time.Second

// Words of Events about endpoints.
const (
	reasonEndpointOut  = "EndpointOut"
	reasonEndpointBack = "EndpointBack"
	reasonEndpointKept = "EndpointKept"
	actionHealth       = "CheckEndpoint"
)

// checkServers keeps endpoints out that do not answer, until ctx ends.
func (n *node) checkServers(ctx context.Context) {
	for ctx.Err() == nil {
		err := guard(func() error {
			cfg := serverhealth.Config{View: n.view, SetOverlay: n.setOverlay, Changed: n.endpointChanged, Logger: n.cfg.Logger}
			table, err := conntrack.Open(conntrack.Config{})
			if err != nil {
				n.cfg.Logger.Warn("endpoints are checked by connecting to them alone", "err", err)
			} else {
				defer table.Close()
				cfg.Table = table
			}
			c := serverhealth.NewChecker(cfg)
			n.servers.Store(c)
			return c.Run(ctx)
		})()
		if ctx.Err() != nil {
			return
		}
		n.syncer.SetOverlay(proxy.Overlay{}) // nobody watches them any more
		n.cfg.Logger.Error("endpoints are not checked; trying again", "in", upkeepAgain, "err", err)
		pause(ctx, upkeepAgain)
	}
}

// setOverlay has o programmed and waits for it a while.
func (n *node) setOverlay(ctx context.Context, o proxy.Overlay) {
	late := time.NewTimer(overlayPatience)
	defer late.Stop()
	synced := n.syncer.Synced()
	n.syncer.SetOverlay(o)
	for {
		if v := n.view(); v != nil && !v.Done.IsZero() && sameOut(v.Overlay, o) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-late.C:
			return
		case <-synced:
			synced = n.syncer.Synced()
		}
	}
}

func sameOut(a, b proxy.Overlay) bool {
	if len(a.Out) != len(b.Out) {
		return false
	}
	for addr := range a.Out {
		if _, ok := b.Out[addr]; !ok {
			return false
		}
	}
	return true
}

// endpointChanged says what became of an endpoint.
func (n *node) endpointChanged(c serverhealth.Change) {
	what := n.endpointName(c.Endpoint)
	kind, reason, note := proxy.EventWarning, reasonEndpointOut, ""
	switch {
	case c.Kept:
		reason = reasonEndpointKept
		note = fmt.Sprintf("endpoint %s %s; it stays, for too few others are left", what, c.Reason)
	case c.Out:
		note = fmt.Sprintf("endpoint %s %s; it gets no new connections from this node for %s", what, c.Reason, time.Until(c.Until).Round(time.Second))
	default:
		kind, reason = proxy.EventNormal, reasonEndpointBack
		note = fmt.Sprintf("endpoint %s is back; it was out because it %s", what, c.Reason)
	}
	if kind == proxy.EventWarning {
		n.cfg.Logger.Warn(note)
	} else {
		n.cfg.Logger.Info(note)
	}
	seen := map[string]bool{}
	for _, s := range c.Services {
		if ref := (proxy.ObjectRef{Kind: "Service", Namespace: s.Namespace, Name: s.Name}); !seen[ref.String()] {
			seen[ref.String()] = true
			n.teller.record(proxy.ObjectEvent{Object: ref, Type: kind, Reason: reason, Action: actionHealth, Note: n.cfg.Name + ": " + note})
		}
	}
}

// endpointName names an endpoint by its pod where that is known.
func (n *node) endpointName(addr netip.AddrPort) string {
	if v := n.view(); v != nil {
		if pod, ok := v.Snapshot.Pods[addr.Addr()]; ok && pod.Name != "" {
			return fmt.Sprintf("%s (pod %s/%s)", addr, pod.Namespace, pod.Name)
		}
	}
	return addr.String()
}

// endpointHealth is for metrics; false where nobody checks.
func (n *node) endpointHealth() (prom.EndpointHealth, bool) {
	c := n.servers.Load()
	if c == nil {
		return prom.EndpointHealth{}, false
	}
	s := c.Stats()
	return prom.EndpointHealth{Out: s.Out, Outs: s.Outs, Kept: s.Kept, Answered: s.Probes - s.Failed, Failed: s.Failed, Freed: s.Freed}, true
}

// outNotes says for status which endpoints are out.
func (n *node) outNotes() []string {
	c := n.servers.Load()
	if c == nil {
		return nil
	}
	var notes []string
	for addr, o := range c.Out() {
		notes = append(notes, fmt.Sprintf("endpoint %s is out until %s: it %s", n.endpointName(addr), o.Until.Format(time.TimeOnly), strings.TrimSpace(o.Reason)))
	}
	return notes
}
