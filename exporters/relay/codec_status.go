package relay

import (
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

func statusToPB(s *Status) *StatusResponse {
	return &StatusResponse{
		Version: s.Version, Node: s.Node, Mode: string(s.Mode),
		Flavour: s.Flavour, FlavourReason: s.FlavourReason, Pid: int64(s.PID),
		Started: timeToPB(s.Started), Synced: timeToPB(s.Synced), SyncError: s.SyncError,
		Rules: int64(s.Rules), Services: int64(s.Services), Endpoints: int64(s.Endpoints),
		Problems: each(s.Problems, func(p proxy.Problem) *Problem {
			return &Problem{File: p.File, Object: p.Object, Field: p.Field, Message: p.Message}
		}),
		Skipped: each(s.Skipped, func(k proxy.Skipped) *Skipped {
			return &Skipped{Namespace: k.Namespace, Name: k.Name, Reason: k.Reason}
		}),
		Sources: each(s.Sources, ref(sourceToPB)),
		Table:   &FlowTableStats{Open: int64(s.Table.Open), Max: int64(s.Table.Max), Evicted: s.Table.Evicted},
		Ring: &RingStats{
			Size: int64(s.Ring.Size), Published: s.Ring.Published, Readers: int64(s.Ring.Readers),
		},
		History: &HistoryStats{
			Since: timeToPB(s.History.Since), FailuresSince: timeToPB(s.History.FailuresSince),
			Failures: int64(s.History.Failures), FailuresMax: int64(s.History.FailuresMax),
			Successes: int64(s.History.Successes), SuccessesMax: int64(s.History.SuccessesMax),
		},
		Losses: each(s.Losses, ref(lossToPB)),
		Groups: each(s.Groups, func(g uint16) uint32 { return uint32(g) }),
		Sysctls: each(s.Sysctls, func(c Sysctl) *SysctlChange {
			return &SysctlChange{Name: c.Name, Before: c.Before, Now: c.Now}
		}),
		ConntrackEntries: int64(s.ConntrackEntries), ConntrackLimit: int64(s.ConntrackLimit),
		Blind: s.Blind,
		State: s.State, StateNotes: s.StateNotes, Paths: s.Paths,
		Exports: each(s.Exports, ref(exportToPB)),
		Virtual: each(s.Virtual, ref(virtualToPB)),
	}
}

func statusFromPB(s *StatusResponse) *Status {
	h := s.GetHistory()
	return &Status{
		Version: s.GetVersion(), Node: s.GetNode(), Mode: proxy.Mode(s.GetMode()),
		Flavour: s.GetFlavour(), FlavourReason: s.GetFlavourReason(), PID: int(s.GetPid()),
		Started: timeFromPB(s.GetStarted()), Synced: timeFromPB(s.GetSynced()), SyncError: s.GetSyncError(),
		Rules: int(s.GetRules()), Services: int(s.GetServices()), Endpoints: int(s.GetEndpoints()),
		Problems: each(s.GetProblems(), func(p *Problem) proxy.Problem {
			return proxy.Problem{File: p.GetFile(), Object: p.GetObject(), Field: p.GetField(), Message: p.GetMessage()}
		}),
		Skipped: each(s.GetSkipped(), func(k *Skipped) proxy.Skipped {
			return proxy.Skipped{Namespace: k.GetNamespace(), Name: k.GetName(), Reason: k.GetReason()}
		}),
		Sources: each(s.GetSources(), sourceFromPB),
		Table: TableStats{
			Open: int(s.GetTable().GetOpen()), Max: int(s.GetTable().GetMax()), Evicted: s.GetTable().GetEvicted(),
		},
		Ring: trace.RingStats{
			Size: int(s.GetRing().GetSize()), Published: s.GetRing().GetPublished(), Readers: int(s.GetRing().GetReaders()),
		},
		History: trace.HistoryStats{
			Since: timeFromPB(h.GetSince()), FailuresSince: timeFromPB(h.GetFailuresSince()),
			Failures: int(h.GetFailures()), FailuresMax: int(h.GetFailuresMax()),
			Successes: int(h.GetSuccesses()), SuccessesMax: int(h.GetSuccessesMax()),
		},
		Losses: each(s.GetLosses(), lossFromPB),
		Groups: each(s.GetGroups(), func(g uint32) uint16 { return uint16(g) }),
		Sysctls: each(s.GetSysctls(), func(c *SysctlChange) Sysctl {
			return Sysctl{Name: c.GetName(), Before: c.GetBefore(), Now: c.GetNow()}
		}),
		ConntrackEntries: int(s.GetConntrackEntries()), ConntrackLimit: int(s.GetConntrackLimit()),
		Blind: s.GetBlind(),
		State: s.GetState(), StateNotes: s.GetStateNotes(), Paths: s.GetPaths(),
		Exports: each(s.GetExports(), exportFromPB),
		Virtual: each(s.GetVirtual(), virtualFromPB),
	}
}

func exportToPB(e *Export) *ExportStats {
	return &ExportStats{
		Signal: e.Signal, Endpoint: e.Endpoint, Protocol: e.Protocol, Seen: e.Seen, Unsampled: e.Unsampled,
		Dropped: e.Dropped, Queued: e.Queued, Capacity: e.Capacity, Sent: e.Sent, Failed: e.Failed,
		Rejected: e.Rejected, Overrun: e.Overrun,
		LastError: e.LastError, LastErrorAt: timeToPB(e.LastErrorAt), Failing: timeToPB(e.Failing),
	}
}

func exportFromPB(e *ExportStats) Export {
	return Export{
		Signal: e.GetSignal(), Endpoint: e.GetEndpoint(), Protocol: e.GetProtocol(), Seen: e.GetSeen(), Unsampled: e.GetUnsampled(),
		Dropped: e.GetDropped(), Queued: e.GetQueued(), Capacity: e.GetCapacity(), Sent: e.GetSent(), Failed: e.GetFailed(),
		Rejected: e.GetRejected(), Overrun: e.GetOverrun(),
		LastError: e.GetLastError(), LastErrorAt: timeFromPB(e.GetLastErrorAt()), Failing: timeFromPB(e.GetFailing()),
	}
}
