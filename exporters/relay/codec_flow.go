package relay

import (
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

func flowToPB(f *trace.Flow) *Flow {
	return &Flow{
		Id: uint64(f.ID), Revision: f.Revision, Start: timeToPB(f.Start), Node: f.Node,
		Tuple: tupleToPB(f.Tuple), Reply: tupleToPB(f.Reply), Ctid: f.CTID,
		Client: peerToPB(&f.Client),
		Service: &ServiceRef{
			Name: portNameToPB(f.Service.Name), Addr: addrPortToPB(f.Service.Addr), Via: string(f.Service.Via),
		},
		Backend: peerToPB(&f.Backend), Decision: decisionToPB(&f.Decision),
		Attempts: each(f.Attempts, ref(attemptToPB)),
		Outcome:  string(f.Outcome), Reason: string(f.Reason), Cause: f.Cause, Ended: f.Ended,
		Established: int64(f.Established), Duration: int64(f.Duration),
		Out: countersToPB(f.Out), In: countersToPB(f.In), Counted: f.Counted,
		Paths: each(f.Paths, ref(pathToPB)), Evidence: uint32(f.Evidence), Missing: f.Missing,
		Incomplete: f.Incomplete, Existing: f.Existing,
		Completed: f.Completed, Carried: each(f.Carried, ref(carriedToPB)), CarriedMore: f.CarriedMore, IpvsState: uint32(f.IPVSState),
	}
}

func flowFromPB(f *Flow) *trace.Flow {
	return &trace.Flow{
		ID: trace.FlowID(f.GetId()), Revision: f.GetRevision(), Start: timeFromPB(f.GetStart()), Node: f.GetNode(),
		Tuple: tupleFromPB(f.GetTuple()), Reply: tupleFromPB(f.GetReply()), CTID: f.GetCtid(),
		Client: peerFromPB(f.GetClient()),
		Service: trace.ServiceRef{
			Name: portNameFromPB(f.GetService().GetName()), Addr: addrPortFromPB(f.GetService().GetAddr()),
			Via: proxy.Via(f.GetService().GetVia()),
		},
		Backend: peerFromPB(f.GetBackend()), Decision: decisionFromPB(f.GetDecision()),
		Attempts: each(f.GetAttempts(), attemptFromPB),
		Outcome:  trace.Outcome(f.GetOutcome()), Reason: trace.Reason(f.GetReason()), Cause: f.GetCause(), Ended: f.GetEnded(),
		Established: time.Duration(f.GetEstablished()), Duration: time.Duration(f.GetDuration()),
		Out: countersFromPB(f.GetOut()), In: countersFromPB(f.GetIn()), Counted: f.GetCounted(),
		Paths: each(f.GetPaths(), pathFromPB), Evidence: trace.Evidence(f.GetEvidence()), Missing: f.GetMissing(),
		Incomplete: f.GetIncomplete(), Existing: f.GetExisting(),
		Completed: f.GetCompleted(), Carried: each(f.GetCarried(), carriedFromPB), CarriedMore: f.GetCarriedMore(), IPVSState: trace.IPVSState(f.GetIpvsState()),
	}
}

func decisionToPB(d *trace.Decision) *Decision {
	return &Decision{
		Known: d.Known, Note: d.Note, Mode: string(d.Mode), Algorithm: d.Algorithm,
		Candidates: int64(d.Candidates), Probability: d.Probability, Policy: d.Policy,
		Excluded: &Excluded{
			NotReady: int64(d.Excluded.NotReady), Terminating: int64(d.Excluded.Terminating),
			OtherZone: int64(d.Excluded.OtherZone), NotLocal: int64(d.Excluded.NotLocal),
			Overlay: int64(d.Excluded.Overlay),
		},
		Affinity: string(d.Affinity), AffinityAge: int64(d.AffinityAge), AffinityTimeout: int64(d.AffinityTimeout),
		Masquerade: d.Masquerade, SourceSeen: addrPortToPB(d.SourceSeen),
		Load: loadToPB(d.Load), Forwarding: uint32(d.Forwarding),
	}
}

func loadToPB(l *trace.Load) *Load {
	if l == nil {
		return nil
	}
	out := &Load{Age: int64(l.Age), Picked: int64(l.Picked)}
	for _, s := range l.Servers {
		out.Servers = append(out.Servers, &ServerLoad{
			Addr: addrPortToPB(s.Addr), Active: int64(s.Active), Inactive: int64(s.Inactive), Weight: int64(s.Weight),
		})
	}
	return out
}

func loadFromPB(l *Load) *trace.Load {
	if l == nil {
		return nil
	}
	return &trace.Load{
		Age: time.Duration(l.GetAge()), Picked: int(l.GetPicked()), Servers: each(l.GetServers(), serverLoadFromPB),
	}
}

func serverLoadFromPB(s *ServerLoad) trace.ServerLoad {
	return trace.ServerLoad{
		Addr: addrPortFromPB(s.GetAddr()), Active: int(s.GetActive()), Inactive: int(s.GetInactive()), Weight: int(s.GetWeight()),
	}
}

func decisionFromPB(d *Decision) trace.Decision {
	x := d.GetExcluded()
	return trace.Decision{
		Known: d.GetKnown(), Note: d.GetNote(), Mode: proxy.Mode(d.GetMode()), Algorithm: d.GetAlgorithm(),
		Candidates: int(d.GetCandidates()), Probability: d.GetProbability(), Policy: d.GetPolicy(),
		Excluded: proxy.Excluded{
			NotReady: int(x.GetNotReady()), Terminating: int(x.GetTerminating()),
			OtherZone: int(x.GetOtherZone()), NotLocal: int(x.GetNotLocal()), Overlay: int(x.GetOverlay()),
		},
		Affinity: trace.Affinity(d.GetAffinity()), AffinityAge: time.Duration(d.GetAffinityAge()),
		AffinityTimeout: time.Duration(d.GetAffinityTimeout()),
		Masquerade:      d.GetMasquerade(), SourceSeen: addrPortFromPB(d.GetSourceSeen()),
		Load: loadFromPB(d.GetLoad()), Forwarding: trace.Forwarding(d.GetForwarding()),
	}
}

func attemptToPB(a *trace.Attempt) *Attempt {
	return &Attempt{
		Endpoint: peerToPB(&a.Endpoint), Start: timeToPB(a.Start), Outcome: a.Outcome,
		Latency: int64(a.Latency), Retransmits: int64(a.Retransmits), Icmp: a.ICMP,
		Resent: int64(a.Resent), Reason: string(a.Reason), Cause: a.Cause,
	}
}

func attemptFromPB(a *Attempt) trace.Attempt {
	return trace.Attempt{
		Endpoint: peerFromPB(a.GetEndpoint()), Start: timeFromPB(a.GetStart()), Outcome: a.GetOutcome(),
		Latency: time.Duration(a.GetLatency()), Retransmits: int(a.GetRetransmits()), ICMP: a.GetIcmp(),
		Resent: time.Duration(a.GetResent()), Reason: trace.Reason(a.GetReason()), Cause: a.GetCause(),
	}
}

func carriedToPB(c *trace.Carried) *Carried {
	return &Carried{Time: timeToPB(c.Time), TraceId: c.Trace[:], SpanId: c.Span[:], Flags: uint32(c.Flags)}
}

func carriedFromPB(c *Carried) trace.Carried {
	out := trace.Carried{Time: timeFromPB(c.GetTime())}
	copy(out.Trace[:], c.GetTraceId())
	copy(out.Span[:], c.GetSpanId())
	out.Flags = byte(c.GetFlags())
	return out
}
