//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
	"github.com/kptrace/kptrace/trace/explain/explaintest"
)

// The Services that are always there, beside generated ones.
const (
	fixedServices = `
		shop/web:p   tcp 10.96.3.200:80 nodeport=30190 a:8080 b:8080 c:8080
		shop/none:p  tcp 10.96.3.201:80 nodeport=30191 external=198.51.100.111
		shop/away:p  tcp 10.96.3.202:80 nodeport=30192 policy=external c:8080
		shop/far:p   tcp 10.96.3.203:80 policy=internal c:8080
		shop/range:p tcp 10.96.3.204:80 lb=198.51.100.114 range=203.0.113.0/24 a:8080 c:8080
		shop/kept:p  tcp 10.96.3.205:80 affinity=1h a:8080 b:8080 c:8080
	`
	generated = 12
)

var webAddr = netip.MustParseAddrPort("10.96.3.200:80")

// TestPredictedIsObservedUpstream generates Services, endpoints, policies and clients,
// creates them through the API server, and beside upstream kube-proxy, in iptables mode
// of both flavours and in nftables mode, asks an agent what would become of each
// client's first packet by the live rules, sends it, and wants the agent to see the
// kernel do that, rule by rule, given the endpoint that was picked. Then picks must have
// the shares predicted, and each of a list of wrong rules must be noticed.
func TestPredictedIsObservedUpstream(t *testing.T) {
	t.Parallel()
	seed := proxytest.Seed(t)
	text := fixedServices + proxytest.RandomServices(rand.New(rand.NewPCG(seed, 0)), generated, "r")
	snap := proxytest.Services(text)
	c := start(t, controlplane.Config{RBAC: true})
	objectsOf(snap).create(t, c.client)
	for i, v := range []struct {
		mode    string
		flavour xtables.Flavour
	}{{"iptables", xtables.NFT}, {"iptables", xtables.Legacy}, {"nftables", xtables.NFT}} {
		t.Run(v.mode+"-"+v.flavour.String(), func(t *testing.T) {
			t.Parallel()
			o := newObserver(t, c, v.mode, v.flavour)
			r := rand.New(rand.NewPCG(seed, uint64(i)+1)) //nolint:gosec // an index
			o.asPredicted(t, r, snap, text)
			o.keeps(t)
			o.followOdds(t)
			end(t, o.upstream)
			if v.mode == "nftables" {
				o.wrong(t, o.nftMistakes(t))
			} else {
				o.wrong(t, o.mistakes(t))
			}
		})
	}
}

// observer is a node with upstream kube-proxy, an agent beside it, and a follower of
// the paths of all packets to Services.
type observer struct {
	w        *proxytest.World
	flavour  xtables.Flavour
	upstream *exec.Process
	client   *relay.Client
	port     uint16 // the last one from which something was sent

	mu    sync.Mutex // guards what follows
	paths map[uint16]trace.Path
	flows map[uint16]string // what became of the connection, for a failure's message
}

func newObserver(t *testing.T, c *cluster, mode string, fl xtables.Flavour) *observer {
	t.Helper()
	o := &observer{w: proxytest.NewWorld(t, false), flavour: fl, port: 20000, paths: map[uint16]trace.Path{}, flows: map[uint16]string{}}
	stop, err := c.Forward(o.w.Node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	// Later syncs of its own would be changes that the test did not make.
	o.upstream = startUpstream(t, c, o.w.Node, fl, "--proxy-mode="+mode, "--cluster-cidr="+clusterCIDR, "--iptables-sync-period=1h")
	eventually(t, "upstream's rules", func() error {
		text, err := o.rules(t)
		if err == nil && !strings.Contains(text, "shop/web") {
			err = errors.New("nothing of shop/web yet")
		}
		return err
	})
	a := startAgent(t, c, o.w.Node)
	if o.client, err = relay.Dial(a.socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.client.Close() })
	eventually(t, "the agent to know the rules", func() error {
		p, err := o.explain(t.Context(), proxytest.FromPod, conntrack.TCP, webAddr)
		if err == nil && (len(p.Cases) != 1 || len(p.Cases[0].Choices) != 3) {
			err = fmt.Errorf("it says %+v", p)
		}
		return err
	})
	o.follow(t)
	return o
}

// rules are those of kube-proxy's, and all beside them, of IPv4.
func (o *observer) rules(t *testing.T) (string, error) {
	tools := xtables.Tools{Netns: o.w.Node.Fd()}
	text, err := tools.SaveText(t.Context(), o.flavour, xtables.IPv4, "", false)
	if err == nil && o.flavour == xtables.NFT {
		var more string
		more, err = tools.NFTAll(t.Context())
		text += more
	}
	return text, err
}

// follow keeps the paths of first packets.
func (o *observer) follow(t *testing.T) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	began, ended := make(chan error, 1), make(chan error, 1)
	go func() {
		ended <- o.client.Follow(ctx, trace.Request{Filter: trace.Filter{Namespace: namespace}, Path: trace.PathRequest{Packets: 1}}, func(m trace.Message) error {
			if m.Header != nil {
				var err error
				if len(m.Header.Notes) > 0 {
					err = errors.New(strings.Join(m.Header.Notes, "; "))
				}
				began <- err
			}
			if m.Flow == nil {
				return nil
			}
			o.mu.Lock()
			defer o.mu.Unlock()
			o.flows[m.Flow.Client.Addr.Port()] = fmt.Sprintf("%v %v, %d paths", m.Flow.Outcome, m.Flow.Reason, len(m.Flow.Paths))
			for _, p := range m.Flow.Paths {
				if !p.Reply {
					o.paths[m.Flow.Client.Addr.Port()] = p
					break
				}
			}
			return nil
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("following: %v", err)
		}
	})
	select {
	case err := <-began:
		if err != nil {
			t.Logf("the follower was told: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("following did not begin")
	}
}

// explain asks the agent for the way of a packet by the live rules.
func (o *observer) explain(ctx context.Context, from proxytest.Source, proto conntrack.Proto, to netip.AddrPort) (*explain.Answer, error) {
	all, err := o.client.Explain(ctx, relay.ExplainRequest{Packet: &proxy.Packet{
		Proto: proto, Src: netip.AddrPortFrom(from.Addr(), 40000), Dst: to, FromNode: from == proxytest.FromNode,
	}})
	if err == nil && len(all) != 1 {
		err = fmt.Errorf("%d answers", len(all))
	}
	if err != nil {
		return nil, err
	}
	return &all[0], nil
}

// send sends first packets from a source.
func (o *observer) send(t *testing.T, from proxytest.Source, packets ...proxy.Packet) {
	t.Helper()
	err := o.w.NS[from].Do(func() error {
		for _, p := range packets {
			proxytest.Send(p.Proto, p.Src.Port(), p.Dst, 30*time.Millisecond)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

var errNoPath = errors.New("no path of the packet")

// seen waits for the path of the first packet from a port.
func (o *observer) seen(port uint16, within time.Duration) (*trace.Path, error) {
	for end := time.Now().Add(within); ; time.Sleep(20 * time.Millisecond) {
		o.mu.Lock()
		p, ok := o.paths[port]
		flow := o.flows[port]
		o.mu.Unlock()
		if ok {
			return &p, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("%w from port %d was seen; its connection: %q", errNoPath, port, flow)
		}
	}
}

// asPredicted sends what the trials say.
func (o *observer) asPredicted(t *testing.T, r *rand.Rand, snap *proxy.Snapshot, text string) {
	trials := proxytest.Trials(r, snap, &o.port)
	predicted := make([]*explain.Answer, len(trials))
	began := time.Now()
	for i := range trials {
		var err error
		if predicted[i], err = o.explain(t.Context(), trials[i].From, trials[i].Packet.Proto, trials[i].Packet.Dst); err != nil {
			t.Fatal(err)
		}
	}
	asked := time.Since(began)
	for i := range trials {
		o.send(t, trials[i].From, trials[i].Packet)
	}
	verdicts, failed := map[proxy.Verdict]int{}, 0
	for i := range trials {
		pkt, a := trials[i].Packet, predicted[i]
		v, same := a.Cases[0].Verdict()
		if !same {
			t.Errorf("%s to %s %s: no one verdict is predicted: %+v", trials[i].From, pkt.Proto, pkt.Dst, a)
			continue
		}
		if v == proxy.Pass {
			continue // it is for no Service, and not traced
		}
		patience := 10 * time.Second
		if failed > 0 {
			patience = time.Second / 2 // it will not come
		}
		p, err := o.seen(pkt.Src.Port(), patience)
		why := ""
		if err != nil {
			why = err.Error()
		} else {
			why = explaintest.Differs(a, p, true)
		}
		if why != "" {
			if failed++; failed <= 8 {
				t.Errorf("%s to %s %s (%v): %s", trials[i].From, pkt.Proto, pkt.Dst, v, why)
			}
			continue
		}
		verdicts[v]++
	}
	t.Logf("as predicted: %v packets; asking took %v, all %v", verdicts, asked.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	if failed > 0 {
		t.Fatalf("%d of %d packets went otherwise; Services:\n%s", failed, len(trials), text)
	}
	if verdicts[proxy.Forward] < 40 || verdicts[proxy.Reject] < 4 || verdicts[proxy.Drop] < 2 {
		t.Errorf("too few packets of one kind: %v", verdicts)
	}
}

// burst sends packets to web from a pod and from outside, and returns the endpoints
// that were picked and the first path that is not as predicted.
//
// A path that is missing is an error of its own: it says nothing about the rules.
func (o *observer) burst(t *testing.T, n int, predicted map[proxytest.Source]*explain.Answer) (picks map[netip.AddrPort]float64, why string, missing error) {
	t.Helper()
	picks = map[netip.AddrPort]float64{}
	for _, from := range slices.Sorted(maps.Keys(predicted)) {
		var packets []proxy.Packet
		for range n {
			o.port++
			packets = append(packets, proxy.Packet{Proto: conntrack.TCP, Src: netip.AddrPortFrom(from.Addr(), o.port), Dst: webAddr})
		}
		o.send(t, from, packets...)
		for _, pkt := range packets {
			patience := 2 * time.Second
			if missing != nil {
				patience = 0 // where one is missing, others are
			}
			p, err := o.seen(pkt.Src.Port(), patience)
			if err != nil {
				missing = err
				continue
			}
			if why := explaintest.Differs(predicted[from], p, true); why != "" {
				return picks, why, missing
			}
			picks[p.Endpoint()]++
		}
	}
	return picks, "", missing
}

// web is what is predicted of its clients now.
func (o *observer) web(t *testing.T) map[proxytest.Source]*explain.Answer {
	t.Helper()
	all := map[proxytest.Source]*explain.Answer{}
	for _, from := range []proxytest.Source{proxytest.FromPod, proxytest.FromOutside} {
		a, err := o.explain(t.Context(), from, conntrack.TCP, webAddr)
		if err != nil {
			t.Fatal(err)
		}
		all[from] = a
	}
	return all
}

// followOdds wants picks to have the shares predicted.
func (o *observer) followOdds(t *testing.T) {
	t.Helper()
	predicted := o.web(t)
	odds, why := explaintest.Odds(predicted[proxytest.FromPod])
	if why != "" {
		t.Fatal(why)
	}
	picks, why, missing := o.burst(t, 150, predicted)
	if why != "" || missing != nil {
		t.Error(why, missing)
	}
	chi := proxytest.ChiSquared(picks, odds)
	t.Logf("picks %v, chi-squared %.2f", picks, chi)
	if len(odds) != 3 || chi > 23 {
		t.Errorf("picks %v do not follow the odds %v: chi-squared %.2f", picks, odds, chi)
	}
}

// keeps wants a client that has been sent to an endpoint to be predicted to go there, by
// the rules that it then meets.
func (o *observer) keeps(t *testing.T) {
	t.Helper()
	to := netip.MustParseAddrPort("10.96.3.205:80")
	var first netip.AddrPort
	for i := range 4 {
		a, err := o.explain(t.Context(), proxytest.FromPod, conntrack.TCP, to)
		if err != nil {
			t.Fatal(err)
		}
		odds, why := explaintest.Odds(a)
		if i > 0 && (why != "" || len(odds) != 1 || odds[first] != 1) {
			t.Errorf("a client of %v is predicted to go to %v %s", first, odds, why)
		}
		o.port++
		o.send(t, proxytest.FromPod, proxy.Packet{Proto: conntrack.TCP, Src: netip.AddrPortFrom(proxytest.FromPod.Addr(), o.port), Dst: to})
		p, err := o.seen(o.port, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if first = p.Endpoint(); i > 0 {
			if why := explaintest.Differs(a, p, true); why != "" {
				t.Errorf("the client of %v: %s", first, why)
			}
		}
	}
}

// mistake is a change of live rules by hand.
type mistake struct {
	name string
	make func() (undo func())
}

// wrong makes mistakes one at a time, and wants each to be noticed: packets that do not
// go as was predicted before, or a check that finds what it did not find before.
func (o *observer) wrong(t *testing.T, mistakes []mistake) {
	t.Helper()
	predicted := o.web(t)
	found := func() map[string]bool {
		res, err := o.client.Check(t.Context(), relay.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]bool{}
		for _, f := range res.Findings {
			all[f.Code+" "+f.Object] = true
		}
		return all
	}
	before := found()
	byPath, byCheck := 0, 0
	for _, m := range mistakes {
		undo := m.make()
		var why string
		var missing error
		// The agent may read changed rules only a moment later. A connection that the
		// changed rules claim for no Service has no path: that is for a check to notice.
		for end := time.Now().Add(6 * time.Second); why == "" && missing == nil && time.Now().Before(end); {
			_, why, missing = o.burst(t, 3, predicted)
		}
		new := []string{}
		for f := range found() {
			if !before[f] {
				new = append(new, f)
			}
		}
		if why != "" {
			byPath++
		}
		if len(new) > 0 {
			byCheck++
		}
		if why == "" && len(new) == 0 {
			t.Errorf("%s: not noticed (%v)", m.name, missing)
		}
		why, _, _ = strings.Cut(why, "\n")
		t.Logf("%s: %d findings of a check; path: %s", m.name, len(new), why)
		undo()
		if err := retry(t.Context(), 20*time.Second, func() error {
			_, why, missing := o.burst(t, 2, predicted)
			if why != "" {
				return errors.New(why)
			}
			return missing
		}); err != nil {
			t.Fatalf("%s: after it was undone: %v", m.name, err)
		}
	}
	t.Logf("%d wrong rules: %d noticed by a path, %d by a check", len(mistakes), byPath, byCheck)
}

// run runs a program in the node's namespace.
func (o *observer) run(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	res, err := exec.Run(t.Context(), exec.Spec{Path: args[0], Args: args[1:], Netns: o.w.Node.Fd(), Stdin: strings.NewReader(stdin)})
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return string(res.Stdout)
}

// mistakes are those of iptables mode.
func (o *observer) mistakes(t *testing.T) []mistake {
	t.Helper()
	nat, err := (&xtables.Tools{Netns: o.w.Node.Fd()}).SaveText(t.Context(), o.flavour, xtables.IPv4, "nat", false)
	if err != nil {
		t.Fatal(err)
	}
	var all []mistake
	for _, m := range proxytest.WrongRules() {
		m.Find = strings.ReplaceAll(m.Find, "10.96.3.10/", "10.96.3.200/")
		all = append(all, mistake{m.Name, func() func() {
			undo := o.w.Mutate(t, o.flavour, m)
			return func() {
				undo()
				if m.Table == "nat" {
					o.run(t, nat, "iptables-"+o.flavour.String()+"-restore", "-w")
				}
			}
		}})
	}
	return all
}

// nftMistakes are those of nftables mode. What is not tracked is not among them: it
// belongs to no connection, so that no path of it is given to one; that a check notices it
// is in TestExplainUpstreamNFTables.
func (o *observer) nftMistakes(t *testing.T) []mistake {
	t.Helper()
	const table = "ip kube-proxy"
	text := o.run(t, "", "nft", "-a", "-s", "list", "table", "ip", "kube-proxy")
	undo := func() {
		o.run(t, "delete table "+table+"\n"+text+"\nadd table ip guard\ndelete table ip guard\n", "nft", "-f", "-")
	}
	chain := func(prefix string) string {
		for _, l := range nftables.List(text) {
			if strings.HasPrefix(l.Chain, prefix) {
				return l.Chain
			}
		}
		t.Fatalf("no chain %s", prefix)
		return ""
	}
	web := ""
	for _, l := range nftables.List(text) {
		if strings.HasPrefix(l.Chain, "service-") && strings.HasSuffix(l.Chain, "-shop/web/tcp/p") {
			web = l.Chain
		}
	}
	// rule changes one rule of a chain; instead "" deletes it.
	rule := func(name, in, find, instead string) mistake {
		return mistake{name, func() func() {
			for _, l := range nftables.List(o.run(t, "", "nft", "-a", "-s", "list", "table", "ip", "kube-proxy")) {
				if l.Chain != in || !strings.Contains(l.Text, find) {
					continue
				}
				place := table + " " + in + " handle " + strconv.FormatUint(l.Handle, 10)
				if instead == "" {
					o.run(t, "delete rule "+place, "nft", "-f", "-")
				} else {
					o.run(t, "replace rule "+place+" "+strings.Replace(l.Text, find, instead, 1), "nft", "-f", "-")
				}
				return undo
			}
			t.Fatalf("%s: no rule with %q in %s", name, find, in)
			return nil
		}}
	}
	do := func(name, script string) mistake {
		return mistake{name, func() func() {
			o.run(t, script, "nft", "-f", "-")
			return undo
		}}
	}
	return []mistake{
		rule("DNAT to another port", web, "10.244.1.2 . 8080", "10.244.1.2 . 8443"),
		rule("DNAT to another endpoint", web, "10.244.1.2 . 8080", "10.244.2.2 . 8080"),
		rule("no DNAT", web, "dnat", ""),
		rule("odds of the picks", web, "mod 3", "mod 30"),
		rule("no masquerade of outside clients", "services", "ip saddr != 10.244.0.0/16", ""),
		rule("another mark", "masquerading", "mark ^ 0x00004000", "mark ^ 0x00008000"),
		rule("the mark is not looked for", "masquerading", "meta mark", ""),
		rule("Services are not looked up", "services", "vmap @service-ips", ""),
		rule("the jump to the Services is gone", "nat-prerouting", "jump services", ""),
		do("another service port", "delete element "+table+" service-ips { 10.96.3.200 . tcp . 80 }\n"+
			"add element "+table+" service-ips { 10.96.3.200 . tcp . 81 : goto "+web+" }"),
		do("another Service's endpoints", "delete element "+table+" service-ips { 10.96.3.200 . tcp . 80 }\n"+
			"add element "+table+" service-ips { 10.96.3.200 . tcp . 80 : goto "+chain("local-")+" }"),
		do("its address is no cluster IP", "delete element "+table+" cluster-ips { 10.96.3.200 }"),
		do("somebody accepts it before", "insert rule "+table+" nat-prerouting tcp dport 80 accept"),
		do("somebody drops it", "add table ip guard\nadd chain ip guard forward { type filter hook forward priority 0; }\n"+
			"add rule ip guard forward tcp dport 8080 drop"),
	}
}

// objectsOf writes a Snapshot as an API server has it.
func objectsOf(s *proxy.Snapshot) *objects {
	o := &objects{}
	for i := range s.Services {
		svc := &s.Services[i]
		proto := corev1.Protocol(strings.ToUpper(svc.Name.Proto.String()))
		x := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: svc.Name.Name}, Spec: corev1.ServiceSpec{
			Type: corev1.ServiceType(svc.Type), ClusterIP: svc.ClusterIP.String(),
			Ports: []corev1.ServicePort{{Name: svc.Name.Port, Protocol: proto, Port: int32(svc.Port), NodePort: int32(svc.NodePort)}},
		}}
		if svc.Type == "LoadBalancer" {
			x.Spec.AllocateLoadBalancerNodePorts = ptr(svc.NodePort != 0)
		}
		for _, a := range svc.ExternalIPs {
			x.Spec.ExternalIPs = append(x.Spec.ExternalIPs, a.String())
		}
		for _, a := range svc.LoadBalancerIPs {
			x.Status.LoadBalancer.Ingress = append(x.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a.String()})
		}
		for _, r := range svc.SourceRanges {
			x.Spec.LoadBalancerSourceRanges = append(x.Spec.LoadBalancerSourceRanges, r.String())
		}
		if svc.ExternalLocal && svc.ExternallyReachable() {
			x.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}
		if svc.InternalLocal {
			x.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicyLocal)
		}
		if svc.Affinity > 0 {
			x.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
			x.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr(int32(svc.Affinity.Seconds()))}}
		}
		o.services = append(o.services, x)
		e := &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: namespace, Name: svc.Name.Name + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: svc.Name.Name},
			},
			AddressType: discoveryv1.AddressTypeIPv4,
		}
		for j := range svc.Endpoints {
			ep := &svc.Endpoints[j]
			e.Ports = []discoveryv1.EndpointPort{{Name: ptr(svc.Name.Port), Protocol: ptr(proto), Port: ptr(int32(ep.Addr.Port()))}}
			node := "node2"
			if ep.Local {
				node = nodeName
			}
			e.Endpoints = append(e.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{ep.Addr.Addr().String()}, NodeName: &node,
				Conditions: discoveryv1.EndpointConditions{Ready: &ep.Ready, Serving: &ep.Serving, Terminating: &ep.Terminating},
			})
		}
		o.slices = append(o.slices, e)
	}
	return o
}
