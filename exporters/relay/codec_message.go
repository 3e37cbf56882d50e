package relay

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

func messageToPB(m *trace.Message) *Message {
	out := &Message{Node: m.Node, Gone: m.Gone}
	switch {
	case m.Flow != nil:
		out.Kind = &Message_Flow{Flow: flowToPB(m.Flow)}
	case m.Header != nil:
		out.Kind = &Message_Header{Header: headerToPB(m.Header)}
	case m.Loss != nil:
		out.Kind = &Message_Loss{Loss: lossToPB(m.Loss)}
	case m.Idle != nil:
		out.Kind = &Message_Idle{Idle: idleToPB(m.Idle)}
	case m.End != nil:
		out.Kind = &Message_End{End: &End{Losses: each(m.End.Losses, ref(lossToPB)), Direct: directToPB(m.End.Direct)}}
	}
	return out
}

func messageFromPB(m *Message) trace.Message {
	out := trace.Message{Node: m.GetNode(), Gone: m.GetGone()}
	switch k := m.GetKind().(type) {
	case *Message_Flow:
		out.Flow = flowFromPB(k.Flow)
	case *Message_Header:
		out.Header = headerFromPB(k.Header)
	case *Message_Loss:
		l := lossFromPB(k.Loss)
		out.Loss = &l
	case *Message_Idle:
		out.Idle = idleFromPB(k.Idle)
	case *Message_End:
		out.End = &trace.End{Losses: each(k.End.GetLosses(), lossFromPB), Direct: directFromPB(k.End.GetDirect())}
	}
	return out
}

func headerToPB(h *trace.Header) *Header {
	return &Header{
		Node: h.Node, Mode: string(h.Mode), Version: h.Version,
		Services: each(h.Services, ref(serviceInfoToPB)), Unknown: h.Unknown,
		Since: timeToPB(h.Since), FailuresSince: timeToPB(h.FailuresSince), Blind: h.Blind, Notes: h.Notes,
	}
}

func headerFromPB(h *Header) *trace.Header {
	return &trace.Header{
		Node: h.GetNode(), Mode: proxy.Mode(h.GetMode()), Version: h.GetVersion(),
		Services: each(h.GetServices(), serviceInfoFromPB), Unknown: h.GetUnknown(),
		Since: timeFromPB(h.GetSince()), FailuresSince: timeFromPB(h.GetFailuresSince()),
		Blind: h.GetBlind(), Notes: h.GetNotes(),
	}
}

func serviceInfoToPB(s *trace.ServiceInfo) *ServiceInfo {
	return &ServiceInfo{
		Name: portNameToPB(s.Name), Type: s.Type, ClusterIp: s.ClusterIP.AsSlice(),
		Port: uint32(s.Port), NodePort: uint32(s.NodePort),
		Ready: int64(s.Ready), Total: int64(s.Total), Affinity: int64(s.Affinity),
	}
}

func serviceInfoFromPB(s *ServiceInfo) trace.ServiceInfo {
	return trace.ServiceInfo{
		Name: portNameFromPB(s.GetName()), Type: s.GetType(), ClusterIP: addrFromPB(s.GetClusterIp()),
		Port: uint16(s.GetPort()), NodePort: uint16(s.GetNodePort()),
		Ready: int(s.GetReady()), Total: int(s.GetTotal()), Affinity: time.Duration(s.GetAffinity()),
	}
}

func idleToPB(i *trace.Idle) *Idle {
	return &Idle{
		For: int64(i.For), Services: each(i.Services, ref(serviceInfoToPB)), Rules: int64(i.Rules),
		Synced: timeToPB(i.Synced), SyncError: i.SyncError, Last: timeToPB(i.Last), Others: i.Others,
		Sources: each(i.Sources, ref(sourceToPB)), Blind: i.Blind,
		Direct: directToPB(i.Direct), Findings: i.Findings,
	}
}

func idleFromPB(i *Idle) *trace.Idle {
	return &trace.Idle{
		For: time.Duration(i.GetFor()), Services: each(i.GetServices(), serviceInfoFromPB), Rules: int(i.GetRules()),
		Synced: timeFromPB(i.GetSynced()), SyncError: i.GetSyncError(), Last: timeFromPB(i.GetLast()),
		Others: i.GetOthers(), Sources: each(i.GetSources(), sourceFromPB), Blind: i.GetBlind(),
		Direct: directFromPB(i.GetDirect()), Findings: i.GetFindings(),
	}
}

func directToPB(d trace.Direct) *Direct {
	return &Direct{Pods: d.Pods, Node: d.Node, Elsewhere: d.Elsewhere}
}

func directFromPB(d *Direct) trace.Direct {
	return trace.Direct{Pods: d.GetPods(), Node: d.GetNode(), Elsewhere: d.GetElsewhere()}
}

func sourceToPB(s *trace.SourceStats) *SourceStats {
	return &SourceStats{
		Source: uint32(s.Source), Frames: s.Frames, Bytes: s.Bytes, Events: s.Events, Lost: s.Lost,
		Overruns: s.Overruns, Foreign: s.Foreign, Damaged: s.Damaged,
		ReceiveBuffer: int64(s.ReceiveBuffer), Note: s.Note,
	}
}

func sourceFromPB(s *SourceStats) trace.SourceStats {
	return trace.SourceStats{
		Source: trace.SourceID(s.GetSource()), Frames: s.GetFrames(), Bytes: s.GetBytes(), Events: s.GetEvents(),
		Lost: s.GetLost(), Overruns: s.GetOverruns(), Foreign: s.GetForeign(), Damaged: s.GetDamaged(),
		ReceiveBuffer: int(s.GetReceiveBuffer()), Note: s.GetNote(),
	}
}

func requestToPB(r *trace.Request) *Request {
	return &Request{
		Filter: &Filter{
			Resources: each(r.Filter.Resources, ref(selectorToPB)), Namespace: r.Filter.Namespace,
			From: each(r.Filter.From, ref(selectorToPB)), To: each(r.Filter.To, ref(selectorToPB)),
			Ports:       each(r.Filter.Ports, portToPB),
			Outcomes:    each(r.Filter.Outcomes, func(o trace.Outcome) string { return string(o) }),
			MinDuration: int64(r.Filter.MinDuration),
		},
		Since: timeToPB(r.Since), Last: int64(r.Last), Interval: int64(r.Interval), Wait: r.Wait,
		PathPackets: int64(r.Path.Packets), Direct: r.Direct,
	}
}

func requestFromPB(r *Request) trace.Request {
	f := r.GetFilter()
	return trace.Request{
		Filter: trace.Filter{
			Resources: each(f.GetResources(), selectorFromPB), Namespace: f.GetNamespace(),
			From: each(f.GetFrom(), selectorFromPB), To: each(f.GetTo(), selectorFromPB),
			Ports:       each(f.GetPorts(), portFromPB),
			Outcomes:    each(f.GetOutcomes(), func(s string) trace.Outcome { return trace.Outcome(s) }),
			MinDuration: time.Duration(f.GetMinDuration()),
		},
		Since: timeFromPB(r.GetSince()), Last: int(r.GetLast()), Interval: time.Duration(r.GetInterval()),
		Wait: r.GetWait(), Path: trace.PathRequest{Packets: int(r.GetPathPackets())}, Direct: r.GetDirect(),
	}
}

func selectorToPB(s *trace.Selector) *Selector {
	out := &Selector{
		Kind: string(s.Kind), Namespace: s.Namespace, Name: s.Name, Owner: s.Owner, Port: portToPB(s.Port),
	}
	if s.Prefix.IsValid() {
		out.Prefix = s.Prefix.String()
	}
	return out
}

func selectorFromPB(s *Selector) trace.Selector {
	prefix, _ := netip.ParsePrefix(s.GetPrefix())
	return trace.Selector{
		Kind: trace.SelectorKind(s.GetKind()), Namespace: s.GetNamespace(), Name: s.GetName(), Owner: s.GetOwner(),
		Port: portFromPB(s.GetPort()), Prefix: prefix,
	}
}

func portToPB(p trace.Port) *Port { return &Port{Number: uint32(p.Number), Name: p.Name} }

func portFromPB(p *Port) trace.Port {
	return trace.Port{Number: uint16(p.GetNumber()), Name: p.GetName()}
}
