package node

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// relayConfig connects the relay with what it is asked about.
func (n *node) relayConfig() relay.Config {
	return relay.Config{
		Ring: n.tracer.ring, History: n.tracer.history, View: n.view, Status: n.status,
		Live: func(f func(*trace.Flow) bool) {
			err := n.tracer.do(context.Background(), func(c *correlate.Correlator) { c.Flows(f) })
			if err != nil {
				n.cfg.Logger.Warn("open connections cannot be listed", "err", err)
			}
		},
		Watching:       func(delta int) { n.tracer.watchers.Add(int64(delta)) },
		WatchingDirect: func(delta int) { n.tracer.direct.Add(int64(delta)) },
		Direct:         n.tracer.straight, Findings: n.lately.said,
		Unseen:  n.unseen,
		Explain: n.explain, Services: n.services, Check: n.check, Collect: n.collect,
		Trace: n.paths.ask, Settle: n.paths.settle, Record: n.record,
		Logger: n.cfg.Logger,
	}
}

// view returns the newest generation that the kernel has taken, so that nobody
// is told of a state before it is there; nil before the first.
func (n *node) view() *proxy.View {
	for _, v := range n.syncer.Views() {
		if !v.Done.IsZero() {
			return v
		}
	}
	return nil
}

// status says what this node is and does at the moment.
func (n *node) status() relay.Status {
	s := relay.Status{
		Version: n.cfg.Version, Node: n.cfg.Name, Mode: n.cfg.Backend.Mode(),
		Flavour: n.variant, FlavourReason: n.reason,
		PID: os.Getpid(), Started: n.started,
		Ring: n.tracer.ring.Stats(), History: n.tracer.history.Stats(),
		Losses: n.tracer.losses.all(), Groups: []uint16{n.cfg.NFLogGroup},
		Sysctls: n.owner.changed(),
		Blind: []string{
			"what happens on other nodes",
		},
	}
	if f := n.follows(); f != nil {
		s.FlavourReason = f.Found()
	}
	s.Blind = append(n.unseen(), s.Blind...)
	if r, ok := n.cfg.Backend.(proxy.Relay); ok {
		s.FlavourReason += relayWords(r.RelayStats())
	}
	s.State = n.cfg.StateFrom
	s.Exports = n.exports()
	if n.cfg.RequestGroup != 0 {
		s.Groups = append(s.Groups, n.cfg.RequestGroup)
	}
	s.Paths = n.paths.status()
	s.Virtual = n.tracer.virtualServers()
	if n.cfg.StateNotes != nil {
		s.StateNotes = n.cfg.StateNotes()
	}
	s.StateNotes = append(s.StateNotes, n.outNotes()...)
	sync := n.syncer.Stats()
	s.Synced = sync.LastEnd
	if sync.LastError != nil {
		s.SyncError = sync.LastError.Error()
	}
	if n.cfg.Wanted != "" && n.cfg.Wanted != s.Mode {
		s.Problems = append(s.Problems, proxy.Problem{
			Object: "mode " + string(n.cfg.Wanted), Message: "fell back to " + string(s.Mode) + ": " + n.cfg.Fallback,
		})
	}
	if v := n.view(); v != nil {
		s.Rules = len(v.Program.Index())
		s.Services = len(v.Snapshot.Services)
		for i := range v.Snapshot.Services {
			s.Endpoints += len(v.Snapshot.Services[i].Endpoints)
		}
		s.Problems = append(append(s.Problems, v.Snapshot.Problems...), v.Program.Problems()...)
		s.Problems = append(s.Problems, n.ports.Problems()...)
		s.Skipped = v.Snapshot.Skipped
	}
	if n.tracer.restarts.Load() > 0 {
		s.Blind = append(s.Blind, fmt.Sprintf("what happened while the tracer was down: it failed %d times, last with: %v",
			n.tracer.restarts.Load(), *n.tracer.failed.Load()))
	}
	if live := n.tracer.live.Load(); live != nil {
		for _, src := range live.sources {
			s.Sources = append(s.Sources, src.Stats())
		}
		s.Sources = append(s.Sources, n.paths.sources()...)
		st := live.stats()
		s.Table = relay.TableStats{Open: st.Open, Max: maxFlows, Evicted: st.Evicted}
	}
	s.ConntrackEntries = number("net/netfilter/nf_conntrack_count")
	s.ConntrackLimit = number("net/netfilter/nf_conntrack_max")
	return s
}

func number(sysctl string) int {
	text, err := readSysctl(sysctl)
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(text)
	return n
}
