package otlp

import (
	"net/netip"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// The names of our own attributes. Where OpenTelemetry's semantic conventions
// have a name, that is used instead.
const (
	keyFlow        = attribute.Key("kptrace.flow.id")
	keyOutcome     = attribute.Key("kptrace.outcome")
	keyReason      = attribute.Key("kptrace.reason")
	keyPort        = attribute.Key("kptrace.service.port.name")
	keyVia         = attribute.Key("kptrace.service.via")
	keyEstablish   = attribute.Key("kptrace.time_to_establish")
	keyAttempts    = attribute.Key("kptrace.attempts")
	keyRetransmits = attribute.Key("kptrace.retransmits")
	keyOutBytes    = attribute.Key("kptrace.out.bytes")
	keyOutPackets  = attribute.Key("kptrace.out.packets")
	keyInBytes     = attribute.Key("kptrace.in.bytes")
	keyInPackets   = attribute.Key("kptrace.in.packets")
	keyEvidence    = attribute.Key("kptrace.evidence")
	keyMissing     = attribute.Key("kptrace.missing")
	keyIncomplete  = attribute.Key("kptrace.incomplete")
	keyExisting    = attribute.Key("kptrace.existing")
	keyNATAddress  = attribute.Key("kptrace.nat.source.address")
	keyNATPort     = attribute.Key("kptrace.nat.source.port")

	keyMode        = attribute.Key("kptrace.mode")
	keyAlgorithm   = attribute.Key("kptrace.algorithm")
	keyCandidates  = attribute.Key("kptrace.candidates")
	keyProbability = attribute.Key("kptrace.probability")
	keyPolicy      = attribute.Key("kptrace.policy")
	keyMasquerade  = attribute.Key("kptrace.masquerade")
	keyAffinity    = attribute.Key("kptrace.affinity")
	keyAffinityAge = attribute.Key("kptrace.affinity.age")
	keyAffinityTTL = attribute.Key("kptrace.affinity.timeout")
	keyExcluded    = attribute.Key("kptrace.excluded")
	keyNote        = attribute.Key("kptrace.note")

	keyAttempt        = attribute.Key("kptrace.attempt")
	keyAttemptOutcome = attribute.Key("kptrace.attempt.outcome")
	keyICMP           = attribute.Key("kptrace.icmp")

	keyRequestTime  = attribute.Key("kptrace.request.time")
	keyRequestsMore = attribute.Key("kptrace.requests.more")
)

// attrs gathers the attributes of one span.
type attrs []attribute.KeyValue

func (a *attrs) add(kv ...attribute.KeyValue) { *a = append(*a, kv...) }

// text adds a text that is not empty, count a number that is not zero.
func (a *attrs) text(k attribute.Key, v string) {
	if v != "" {
		a.add(k.String(v))
	}
}

func (a *attrs) count(k attribute.Key, v int) {
	if v != 0 {
		a.add(k.Int(v))
	}
}

func (a *attrs) flag(k attribute.Key, v bool) {
	if v {
		a.add(k.Bool(true))
	}
}

func (a *attrs) addr(host, port attribute.Key, ap netip.AddrPort) {
	if ap.IsValid() {
		a.add(host.String(ap.Addr().String()), port.Int(int(ap.Port())))
	}
}

// source and destination add either end of a connection.
func (a *attrs) source(p *trace.Peer) {
	const prefix = "source."
	a.addr(semconv.SourceAddressKey, semconv.SourcePortKey, p.Addr)
	a.text(prefix+semconv.K8SNamespaceNameKey, p.Namespace)
	a.text(prefix+semconv.K8SPodNameKey, p.Pod)
	a.text(prefix+semconv.K8SNodeNameKey, p.Node)
	a.owner(prefix, p)
}

func (a *attrs) destination(p *trace.Peer) {
	const prefix = "destination."
	a.addr(semconv.DestinationAddressKey, semconv.DestinationPortKey, p.Addr)
	a.text(prefix+semconv.K8SNamespaceNameKey, p.Namespace)
	a.text(prefix+semconv.K8SPodNameKey, p.Pod)
	a.text(prefix+semconv.K8SNodeNameKey, p.Node)
	a.owner(prefix, p)
}

func (a *attrs) owner(prefix string, p *trace.Peer) {
	if kind, workload, ok := strings.Cut(p.Workload, "/"); ok {
		a.text(attribute.Key(prefix+"k8s."+strings.ToLower(kind)+".name"), workload)
	}
}

// connection adds what is true of a connection as a whole.
func (a *attrs) connection(f *trace.Flow) {
	a.add(keyFlow.String(f.ID.String()), keyOutcome.String(string(f.Outcome)))
	a.text(keyReason, string(f.Reason))
	a.transport(f.Tuple.Proto())
	if v := f.Service.Addr; v.IsValid() {
		kind := semconv.NetworkTypeIPv4
		if v.Addr().Is6() {
			kind = semconv.NetworkTypeIPv6
		}
		a.add(kind)
	}
	a.source(&f.Client)
	a.addr(semconv.NetworkPeerAddressKey, semconv.NetworkPeerPortKey, f.Service.Addr)
	a.destination(&f.Backend)
	a.addr(keyNATAddress, keyNATPort, f.Decision.SourceSeen)
	n := &f.Service.Name
	a.text(semconv.K8SNamespaceNameKey, n.Namespace)
	a.text(semconv.K8SServiceNameKey, n.Name)
	a.text(keyPort, n.Port)
	a.text(keyVia, string(f.Service.Via))
	a.text(keyMode, string(f.Decision.Mode))
	if f.Decision.Affinity != trace.AffinityNone {
		a.text(keyAffinity, string(f.Decision.Affinity))
	}
	if f.Established >= 0 {
		a.add(keyEstablish.Float64(f.Established.Seconds()))
	}
	if n := len(f.Attempts); n > 1 {
		a.add(keyAttempts.Int(n))
	}
	resent := 0
	for i := range f.Attempts {
		resent += f.Attempts[i].Retransmits
	}
	a.count(keyRetransmits, resent)
	if f.Counted {
		a.add(keyOutBytes.Int64(int64(f.Out.Bytes)), keyOutPackets.Int64(int64(f.Out.Packets)),
			keyInBytes.Int64(int64(f.In.Bytes)), keyInPackets.Int64(int64(f.In.Packets)))
	}
	a.add(keyEvidence.StringSlice(f.Evidence.Names()))
	a.text(keyMissing, f.Missing)
	a.flag(keyIncomplete, f.Incomplete)
	a.flag(keyExisting, f.Existing)
	a.count(keyRequestsMore, int(f.CarriedMore))
	if failed(f) {
		a.add(semconv.ErrorTypeKey.String(errorType(f)))
	}
}

// decision adds why the endpoint was chosen.
func (a *attrs) decision(d *trace.Decision) {
	a.text(keyMode, string(d.Mode))
	a.text(keyNote, d.Note)
	a.text(keyAlgorithm, d.Algorithm)
	a.count(keyCandidates, d.Candidates)
	if d.Probability > 0 {
		a.add(keyProbability.Float64(d.Probability))
	}
	a.text(keyPolicy, d.Policy)
	a.text(keyMasquerade, d.Masquerade)
	a.affinity(d)
	x := &d.Excluded
	a.count(keyExcluded+".not_ready", x.NotReady)
	a.count(keyExcluded+".terminating", x.Terminating)
	a.count(keyExcluded+".other_zone", x.OtherZone)
	a.count(keyExcluded+".not_local", x.NotLocal)
	a.count(keyExcluded+".overlay", x.Overlay)
}

func (a *attrs) affinity(d *trace.Decision) {
	a.text(keyAffinity, string(d.Affinity))
	if d.AffinityTimeout > 0 {
		a.add(keyAffinityTTL.Float64(d.AffinityTimeout.Seconds()))
	}
	if d.Affinity == trace.AffinityHit || d.Affinity == trace.AffinityExpired {
		a.add(keyAffinityAge.Float64(d.AffinityAge.Seconds()))
	}
}

func (a *attrs) transport(p conntrack.Proto) {
	switch p {
	case 0:
	case conntrack.TCP:
		a.add(semconv.NetworkTransportTCP)
	case conntrack.UDP:
		a.add(semconv.NetworkTransportUDP)
	default:
		a.add(semconv.NetworkTransportKey.String(p.String()))
	}
}

// failed reports whether a connection's span is an error: a refusal by a rule
// or the endpoint, a reset by the endpoint, or no answer. A client that resets
// its own connection has a reason nobody else knows.
func failed(f *trace.Flow) bool {
	return f.Outcome.Failed() && f.Reason != trace.ResetByClient
}

// errorType is the stable code of a failure.
func errorType(f *trace.Flow) string {
	if f.Reason != trace.NoReason {
		return string(f.Reason)
	}
	return string(f.Outcome)
}
