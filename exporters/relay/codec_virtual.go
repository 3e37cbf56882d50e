package relay

import (
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

func virtualToPB(v *trace.VirtualServer) *VirtualServer {
	return &VirtualServer{
		Addr: addrPortToPB(v.Addr), Proto: uint32(v.Proto), Service: portNameToPB(v.Service), Scheduler: v.Scheduler,
		Persistence: int64(v.Persistence), Total: trafficToPB(v.Total), Rate: trafficToPB(v.Rate),
		Servers: each(v.Servers, ref(realToPB)),
	}
}

func virtualFromPB(v *VirtualServer) trace.VirtualServer {
	return trace.VirtualServer{
		Addr: addrPortFromPB(v.GetAddr()), Proto: conntrack.Proto(v.GetProto()), Service: portNameFromPB(v.GetService()),
		Scheduler: v.GetScheduler(), Persistence: time.Duration(v.GetPersistence()),
		Total: trafficFromPB(v.GetTotal()), Rate: trafficFromPB(v.GetRate()), Servers: each(v.GetServers(), realFromPB),
	}
}

func realToPB(r *trace.RealServer) *RealServer {
	return &RealServer{
		Addr: addrPortToPB(r.Addr), Weight: int64(r.Weight), Active: int64(r.Active), Inactive: int64(r.Inactive), Persistent: int64(r.Persistent),
		Forwarding: uint32(r.Forwarding), Total: trafficToPB(r.Total), Rate: trafficToPB(r.Rate),
	}
}

func realFromPB(r *RealServer) trace.RealServer {
	return trace.RealServer{
		Addr: addrPortFromPB(r.GetAddr()), Weight: int(r.GetWeight()), Active: int(r.GetActive()), Inactive: int(r.GetInactive()), Persistent: int(r.GetPersistent()),
		Forwarding: trace.Forwarding(r.GetForwarding()), Total: trafficFromPB(r.GetTotal()), Rate: trafficFromPB(r.GetRate()),
	}
}

func trafficToPB(t trace.Traffic) *Traffic {
	return &Traffic{
		Connections: t.Connections, PacketsIn: t.PacketsIn, PacketsOut: t.PacketsOut, BytesIn: t.BytesIn, BytesOut: t.BytesOut,
	}
}

func trafficFromPB(t *Traffic) trace.Traffic {
	return trace.Traffic{
		Connections: t.GetConnections(), PacketsIn: t.GetPacketsIn(), PacketsOut: t.GetPacketsOut(),
		BytesIn: t.GetBytesIn(), BytesOut: t.GetBytesOut(),
	}
}
