package apiserver

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube"
)

func testService(i int) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprintf("svc-%d", i)},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: fmt.Sprintf("10.96.%d.%d", i>>8, i&255),
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}},
		},
	}
}

// testSlice has n endpoints of Service i, named unless named is false.
func testSlice(i, copies, n int, named bool) *discoveryv1.EndpointSlice {
	port, proto, portName := int32(8080), corev1.ProtocolTCP, "http"
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: fmt.Sprintf("svc-%d-%d", i, copies),
			Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("svc-%d", i)},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Protocol: &proto, Port: &port}},
	}
	for j := range n {
		k := i*10 + j
		node := "node1"
		ep := discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.%d.%d.%d", 100+k>>16, k>>8&255, k&255)}}
		if named {
			ep.NodeName = &node
			ep.TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: fmt.Sprintf("pod-%d", k)}
		}
		s.Endpoints = append(s.Endpoints, ep)
	}
	return s
}

func testPod(name, ip string) *corev1.Pod {
	yes := true
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, Labels: map[string]string{"pod-template-hash": "abc"},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-abc", Controller: &yes}},
		},
		Spec:   corev1.PodSpec{NodeName: "node2"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip},
	}
}

func testNode(name, ip string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: "a"}}}
	if ip != "" {
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}
	}
	return n
}

func snapshots() cmp.Option {
	return cmp.Options{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.EquateEmpty(),
	}
}

// TestIncremental changes objects at random: what is kept up to date is always
// what converting everything anew gives.
func TestIncremental(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(7, 7))
	s := newState("node1")
	s.setOwn("/node1", stripNode(testNode("node1", "192.168.7.1")))
	services, slices, pods := map[int]*corev1.Service{}, map[string]*discoveryv1.EndpointSlice{}, map[int]*corev1.Pod{}
	emitted := 0
	for step := range 3000 {
		i := r.IntN(8)
		key := fmt.Sprintf("shop/svc-%d", i)
		switch r.IntN(8) {
		case 0:
			delete(services, i)
			s.removeService(key)
		case 1, 2:
			services[i] = testService(i)
			services[i].Spec.ClusterIP = fmt.Sprintf("10.96.0.%d", r.IntN(10)) // now and then another's
			s.setService(key, services[i])
		case 3, 4, 5:
			slice := testSlice(i, r.IntN(2), r.IntN(4), r.IntN(3) > 0)
			if r.IntN(4) == 0 {
				slice.Labels[discoveryv1.LabelServiceName] = fmt.Sprintf("svc-%d", r.IntN(8)) // moves to another
			}
			slices["shop/"+slice.Name] = slice
			s.setSlice("shop/"+slice.Name, slice)
		case 6:
			for k := range slices {
				delete(slices, k)
				s.removeSlice(k)
				break
			}
		case 7:
			if _, ok := pods[i]; ok && r.IntN(2) == 0 {
				delete(pods, i)
				s.removePod(fmt.Sprintf("shop/p%d", i))
				break
			}
			pods[i] = testPod(fmt.Sprintf("p%d", i), fmt.Sprintf("10.100.0.%d", i*10+r.IntN(2)))
			s.setPod(fmt.Sprintf("shop/p%d", i), stripPod(pods[i]))
		}
		if r.IntN(3) > 0 {
			continue
		}
		got := s.snapshot()
		if again := s.snapshot(); again != nil {
			t.Fatalf("step %d: a second Snapshot although nothing changed", step)
		}
		if got == nil {
			got = s.last
		} else {
			emitted++
		}
		o := &kube.Objects{Nodes: []corev1.Node{*testNode("node1", "192.168.7.1")}}
		for _, svc := range services {
			o.Services = append(o.Services, *svc)
		}
		for _, slice := range slices {
			// A slice without its Service is nobody's fault here.
			for _, svc := range services {
				if kube.ServiceOf(slice) == svc.Namespace+"/"+svc.Name {
					o.Slices = append(o.Slices, *slice)
				}
			}
		}
		for _, pod := range pods {
			o.Pods = append(o.Pods, *pod)
		}
		if diff := cmp.Diff(kube.Convert(o, "node1"), got, snapshots()); diff != "" {
			t.Fatalf("step %d (-anew +kept):\n%s", step, diff)
		}
	}
	if emitted < 300 {
		t.Errorf("only %d Snapshots compared", emitted)
	}
}

// TestShared changes one of two Services: what is known of the other is the
// same memory as before.
func TestShared(t *testing.T) {
	t.Parallel()
	s := newState("node1")
	for i := range 2 {
		s.setService(fmt.Sprintf("shop/svc-%d", i), testService(i))
		s.setSlice(fmt.Sprintf("shop/svc-%d-0", i), testSlice(i, 0, 3, true))
	}
	a := s.snapshot()
	s.setSlice("shop/svc-1-0", testSlice(1, 0, 2, true))
	b := s.snapshot()
	if len(a.Services[1].Endpoints) != 3 || len(b.Services[1].Endpoints) != 2 {
		t.Errorf("%d then %d endpoints, want 3 then 2", len(a.Services[1].Endpoints), len(b.Services[1].Endpoints))
	}
	if &a.Services[0].Endpoints[0] != &b.Services[0].Endpoints[0] {
		t.Error("endpoints that did not change were made again")
	}
	s.setService("shop/svc-0", testService(0))
	if s.snapshot() != nil {
		t.Error("an equal Service makes a Snapshot")
	}
}

// TestReused gives a pod's address to the next pod while the first still has
// it: the younger one's name counts, and it stays when the older one goes.
func TestReused(t *testing.T) {
	t.Parallel()
	p := newPodNames()
	old, young := testPod("old", "10.244.0.1"), testPod("young", "10.244.0.1")
	old.CreationTimestamp, young.CreationTimestamp = metav1.Unix(100, 0), metav1.Unix(200, 0)
	ip := netip.MustParseAddr("10.244.0.1")
	steps := []struct {
		name    string
		do      func() bool
		changed bool
		want    string
	}{
		{"young", func() bool { return p.set("shop/young", stripPod(young).(*podRecord)) }, true, "young"},
		{"old", func() bool { return p.set("shop/old", stripPod(old).(*podRecord)) }, false, "young"},
		{"young again", func() bool { return p.set("shop/young", stripPod(young).(*podRecord)) }, false, "young"},
		{"young goes", func() bool { return p.set("shop/young", nil) }, true, "old"},
		{"it goes twice", func() bool { return p.set("shop/young", nil) }, false, "old"},
		{"old ends", func() bool {
			old.Status.Phase = corev1.PodSucceeded
			return p.set("shop/old", stripPod(old).(*podRecord))
		}, true, ""},
	}
	for _, st := range steps {
		if changed := st.do(); changed != st.changed || p.names[ip].Name != st.want {
			t.Errorf("%s: changed %v, name %q; want %v, %q", st.name, changed, p.names[ip].Name, st.changed, st.want)
		}
	}
	if len(p.claims) != 0 || len(p.names) != 0 {
		t.Errorf("left over: %v %v", p.claims, p.names)
	}
	if got := stripPod(young).(*podRecord).pod; got != (proxy.Pod{Namespace: "shop", Name: "young", Node: "node2", Workload: "Deployment/web"}) {
		t.Errorf("kept of a pod: %+v", got)
	}
}

// BenchmarkChange is the cost of a Snapshot after one change of 5,000 Services
// with 10 endpoints each, with and without a watch of Pods.
func BenchmarkChange(b *testing.B) {
	for _, pods := range []bool{false, true} {
		s := newState("node1")
		for i := range 5000 {
			s.setService(fmt.Sprintf("shop/svc-%d", i), testService(i))
			s.setSlice(fmt.Sprintf("shop/svc-%d-0", i), testSlice(i, 0, 10, true))
			for j := range 10 {
				if name, k := fmt.Sprintf("pod-%d", i*10+j), i*10+j; pods {
					s.setPod("shop/"+name, stripPod(testPod(name, fmt.Sprintf("10.%d.%d.%d", 100+k>>16, k>>8&255, k&255))))
				}
			}
		}
		steps := []struct {
			name string
			do   func(n int)
			none bool
		}{
			{name: "everything", do: func(int) {
				s.parts, s.last = nil, nil
				for key := range s.services {
					s.dirty[key] = true
				}
			}},
			{name: "ready", do: func(n int) {
				slice, ready := testSlice(77, 0, 10, true), n%2 == 0
				slice.Endpoints[3].Conditions.Ready = &ready
				s.setSlice("shop/svc-77-0", slice)
			}},
			{name: "endpoint", do: func(n int) { s.setSlice("shop/svc-77-0", testSlice(77, 0, 8+n%2, true)) }},
			{name: "nothing", do: func(int) { s.setService("shop/svc-77", testService(77)) }, none: true},
		}
		for _, step := range steps {
			n := 0
			b.Run(fmt.Sprintf("%s,pods=%v", step.name, pods), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					n++
					if step.do(n); (s.snapshot() == nil) != step.none {
						b.Fatalf("a Snapshot: %v", step.none)
					}
				}
			})
		}
	}
}
