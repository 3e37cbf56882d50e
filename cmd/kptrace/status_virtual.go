package main

import (
	"fmt"

	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// virtualShown is how many lines of virtual servers status prints; -o json has
// all.
const virtualShown = 40

// virtualLines describes the virtual servers of IPVS and their servers.
func virtualLines(all []trace.VirtualServer) []string {
	if len(all) == 0 {
		return nil
	}
	servers, other := 0, 0
	var out []string
	for i := range all {
		v := &all[i]
		name := "of others"
		if v.Service != (proxy.PortName{}) {
			name = v.Service.String()
		}
		head := fmt.Sprintf("%s/%s  %s, %s", v.Addr, v.Proto, name, v.Scheduler)
		if v.Persistence > 0 {
			head += ", persistent " + text.Duration(v.Persistence)
		}
		out = append(out, fmt.Sprintf("%s: %d connections, %d/s", head, v.Total.Connections, v.Rate.Connections))
		for j := range v.Servers {
			r := &v.Servers[j]
			if servers++; r.Forwarding != trace.ForwardNAT {
				other++
			}
			out = append(out, fmt.Sprintf("  %s  %s, weight %d: %d active, %d other, %d connections, %d/s, ↑%s ↓%s", r.Addr, r.Forwarding,
				r.Weight, r.Active, r.Inactive, r.Total.Connections, r.Rate.Connections, text.Bytes(r.Total.BytesIn), text.Bytes(r.Total.BytesOut)))
		}
	}
	sum := fmt.Sprintf("%d virtual servers with %d servers, all by NAT", len(all), servers)
	if other > 0 {
		sum = fmt.Sprintf("%d virtual servers with %d servers, %d not by NAT", len(all), servers, other)
	}
	if more := len(out) - virtualShown; more > 0 {
		out = append(out[:virtualShown], fmt.Sprintf("and %d lines more: -o json has all", more))
	}
	return append([]string{sum}, out...)
}

// virtualJSON is a virtual server in JSON.
type virtualJSON struct {
	Address       string      `json:"address"`
	Protocol      string      `json:"protocol"`
	Service       string      `json:"service,omitempty"`
	Scheduler     string      `json:"scheduler"`
	PersistenceMs int64       `json:"persistenceMs,omitempty"`
	Total         trafficJSON `json:"total"`
	Rate          trafficJSON `json:"perSecond"`
	Servers       []realJSON  `json:"servers"`
}

type realJSON struct {
	Address    string      `json:"address"`
	Forwarding string      `json:"forwarding"`
	Weight     int         `json:"weight"`
	Active     int         `json:"active"`
	Inactive   int         `json:"inactive"`
	Total      trafficJSON `json:"total"`
	Rate       trafficJSON `json:"perSecond"`
}

type trafficJSON struct {
	Connections uint64 `json:"connections"`
	PacketsIn   uint64 `json:"packetsIn"`
	PacketsOut  uint64 `json:"packetsOut"`
	BytesIn     uint64 `json:"bytesIn"`
	BytesOut    uint64 `json:"bytesOut"`
}

func toVirtualJSON(all []trace.VirtualServer) []virtualJSON {
	var out []virtualJSON
	for i := range all {
		v := &all[i]
		x := virtualJSON{
			Address: v.Addr.String(), Protocol: v.Proto.String(), Scheduler: v.Scheduler,
			PersistenceMs: v.Persistence.Milliseconds(), Total: trafficJSON(v.Total), Rate: trafficJSON(v.Rate), Servers: []realJSON{},
		}
		if v.Service != (proxy.PortName{}) {
			x.Service = v.Service.String()
		}
		for j := range v.Servers {
			r := &v.Servers[j]
			x.Servers = append(x.Servers, realJSON{
				Address: r.Addr.String(), Forwarding: r.Forwarding.String(), Weight: r.Weight, Active: r.Active, Inactive: r.Inactive,
				Total: trafficJSON(r.Total), Rate: trafficJSON(r.Rate),
			})
		}
		out = append(out, x)
	}
	return out
}
