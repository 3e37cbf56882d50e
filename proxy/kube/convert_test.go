package kube

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kptrace/kptrace/proxy"
)

func service(name string, change func(*corev1.Service)) corev1.Service {
	s := corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.0.10", ClusterIPs: []string{"10.96.0.10", "fd00:96::10"},
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol},
			Ports:      []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}},
		},
	}
	if change != nil {
		change(&s)
	}
	return s
}

func slice(name string, family discoveryv1.AddressType, port int32, addrs ...string) discoveryv1.EndpointSlice {
	proto, portName := corev1.ProtocolTCP, "http"
	s := discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: "foo"}},
		AddressType: family,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Protocol: &proto, Port: &port}},
	}
	for i, a := range addrs {
		node := "node1"
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{a}, NodeName: &node,
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: fmt.Sprintf("%s-%d", name, i)},
		})
	}
	return s
}

// TestDualStack converts one Service with two addresses: each family has its
// own addresses and endpoints, and nothing of the other.
func TestDualStack(t *testing.T) {
	vip, viaProxy := corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy
	svc := service("foo", func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		s.Spec.HealthCheckNodePort = 32000
		s.Spec.Ports[0].NodePort = 30080
		s.Spec.ExternalIPs = []string{"2001:db8::1", "192.0.2.1"}
		s.Spec.LoadBalancerSourceRanges = []string{" 203.0.113.7/24", "2001:db8:1::/48 "}
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{
			{IP: "198.51.100.1"}, {IP: "2001:db8::100", IPMode: &vip}, {IP: "198.51.100.2", IPMode: &viaProxy}, {Hostname: "lb.example"},
		}
	})
	o := &Objects{
		Services: []corev1.Service{svc},
		Slices: []discoveryv1.EndpointSlice{
			slice("foo-4", discoveryv1.AddressTypeIPv4, 8080, "10.244.1.9", "10.244.1.10"),
			slice("foo-6", discoveryv1.AddressTypeIPv6, 8080, "fd00:244::9"),
			slice("foo-n", discoveryv1.AddressTypeFQDN, 8080, "a.example"),
		},
	}
	s := Convert(o, "node1")
	if len(s.Problems) > 0 {
		t.Errorf("problems: %v", s.Problems)
	}
	if len(s.Services) != 2 {
		t.Fatalf("%d Services, want one of each family: %+v", len(s.Services), s.Services)
	}
	want := []string{
		"10.96.0.10 node 30080 external [192.0.2.1] lb [198.51.100.1] from [203.0.113.0/24] check 32000 to 10.244.1.10:8080 10.244.1.9:8080",
		"fd00:96::10 node 30080 external [2001:db8::1] lb [2001:db8::100] from [2001:db8:1::/48] check 32000 to [fd00:244::9]:8080",
	}
	for i := range s.Services {
		if got := line(&s.Services[i]); got != want[i] {
			t.Errorf("got  %s\nwant %s", got, want[i])
		}
		for _, ep := range s.Services[i].Endpoints {
			if !ep.Local || ep.Pod == "" {
				t.Errorf("endpoint %+v: want it local and named", ep)
			}
			if pod := s.Pods[ep.Addr.Addr()]; pod.Name != ep.Pod {
				t.Errorf("%s is %q in Pods, want %q", ep.Addr, pod.Name, ep.Pod)
			}
		}
	}
}

func line(s *proxy.Service) string {
	text := fmt.Sprintf("%s node %d external %v lb %v from %v check %d to", s.ClusterIP, s.NodePort, s.ExternalIPs, s.LoadBalancerIPs, s.SourceRanges, s.HealthCheckNodePort)
	for _, ep := range s.Endpoints {
		text += " " + ep.Addr.String()
	}
	return text
}

// TestService changes one thing of a Service at a time and looks at all that
// comes of it.
func TestService(t *testing.T) {
	const four, six = "10.96.0.10 node 0 external [] lb [] from [] check 0 to", "fd00:96::10 node 0 external [] lb [] from [] check 0 to"
	tests := []struct {
		name    string
		change  func(*corev1.Service)
		want    []string
		skipped string
		problem string // field: part of the message
	}{
		{name: "both families", want: []string{four, six}},
		{name: "IPv6 first", change: func(s *corev1.Service) {
			s.Spec.ClusterIP, s.Spec.ClusterIPs = "fd00:96::10", []string{"fd00:96::10", "10.96.0.10"}
		}, want: []string{four, six}},
		{name: "IPv6 only", change: func(s *corev1.Service) {
			s.Spec.ClusterIP, s.Spec.ClusterIPs = "fd00:96::10", nil
		}, want: []string{six}},
		{name: "two of a family", change: func(s *corev1.Service) { s.Spec.ClusterIPs[1] = "10.96.0.11" },
			want: []string{four}, problem: "spec.clusterIPs: 10.96.0.11 is a second address"},
		{name: "old zeros are decimal", change: func(s *corev1.Service) {
			s.Spec.ClusterIP, s.Spec.ClusterIPs = "010.096.000.010", nil
		}, want: []string{four}},
		{name: "mapped is IPv4", change: func(s *corev1.Service) {
			s.Spec.ClusterIPs = s.Spec.ClusterIPs[:1]
			s.Spec.ExternalIPs = []string{"::ffff:192.0.2.1"}
			s.Spec.LoadBalancerSourceRanges = []string{"::ffff:203.0.113.0/120"}
		}, want: []string{"10.96.0.10 node 0 external [192.0.2.1] lb [] from [203.0.113.0/24] check 0 to"}},
		{name: "a zone", change: func(s *corev1.Service) { s.Spec.ClusterIPs[1] = "fe80::1%eth0" },
			want: []string{four}, problem: "spec.clusterIPs: \"fe80::1%eth0\" is not an IP"},
		{name: "everything of one family is no limit", change: func(s *corev1.Service) {
			s.Spec.LoadBalancerSourceRanges = []string{"203.0.113.0/24", "2001:db8::/32", "::/0"}
		}, want: []string{"10.96.0.10 node 0 external [] lb [] from [203.0.113.0/24] check 0 to", six}},
		{name: "health check only for Local", change: func(s *corev1.Service) {
			s.Spec.Type, s.Spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, 32000
		}, want: []string{four, six}},
		{name: "no node port for ClusterIP", change: func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 30080 }, want: []string{four, six}},
		{name: "one name twice", change: func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "http", Port: 81})
		}, want: []string{four, six}, problem: "spec.ports[1].name: port name \"http\" is used twice"},
		{name: "one name for two protocols", change: func(s *corev1.Service) {
			s.Spec.ClusterIPs = s.Spec.ClusterIPs[:1]
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "http", Port: 80, Protocol: corev1.ProtocolUDP})
		}, want: []string{four, four}},
		{name: "addresses that differ", change: func(s *corev1.Service) { s.Spec.ClusterIP = "10.96.0.99" },
			want: []string{four, six}, problem: "spec.clusterIP: 10.96.0.99 is not the first"},
		{name: "label with an empty value", change: func(s *corev1.Service) { s.Labels = map[string]string{labelProxyName: ""} }, skipped: "service-proxy-name"},
		{name: "headless by list", change: func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "", []string{"None"} }, skipped: "headless"},
		{name: "ExternalName", change: func(s *corev1.Service) {
			s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "a.example"}
		}, skipped: "ExternalName"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := Convert(&Objects{Services: []corev1.Service{service("foo", tt.change)}}, "node1")
			var got []string
			for i := range s.Services {
				got = append(got, line(&s.Services[i]))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("Services (-want +got):\n%s", diff)
			}
			reason := ""
			if len(s.Skipped) > 0 {
				reason = s.Skipped[0].Reason
			}
			if reason != tt.skipped {
				t.Errorf("left out because %q, want %q", reason, tt.skipped)
			}
			if tt.problem == "" && len(s.Problems) == 0 {
				return
			}
			if len(s.Problems) != 1 || !strings.HasPrefix(s.Problems[0].Field+": "+s.Problems[0].Message, tt.problem) || tt.problem == "" {
				t.Errorf("problems %v, want one: %q", s.Problems, tt.problem)
			}
		})
	}
}

// TestEndpoints looks at which endpoint of a slice counts, and as what.
func TestEndpoints(t *testing.T) {
	yes := true
	slices := []discoveryv1.EndpointSlice{
		slice("a", discoveryv1.AddressTypeIPv4, 8080, "10.244.1.1", "10.244.1.2"),
		slice("b", discoveryv1.AddressTypeIPv4, 8080, "10.244.1.1", "10.244.1.2"),
		slice("c", discoveryv1.AddressTypeIPv6, 8080, "fd00::1", "::ffff:10.244.1.3"),
		slice("d", discoveryv1.AddressTypeIPv4, 8080, "010.244.001.004"),
		slice("e", discoveryv1.AddressTypeIPv4, 9090, "10.244.1.1"),
	}
	slices[0].Endpoints[0].Conditions.Terminating = &yes // and b's is not
	slices[1].Endpoints[1].Conditions.Terminating = &yes // and a's is not
	slices[3].Endpoints[0].NodeName, slices[3].Endpoints[0].TargetRef = nil, nil
	o := &Objects{
		Services: []corev1.Service{service("foo", nil)},
		Slices:   slices,
		Pods: []corev1.Pod{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "d"},
			Spec:       corev1.PodSpec{NodeName: "node1"},
			Status:     corev1.PodStatus{PodIP: "10.244.1.4", PodIPs: []corev1.PodIP{{IP: "10.244.1.4"}, {IP: "fd00::4"}}},
		}},
	}
	s := Convert(o, "node1")
	var got []string
	for i := range s.Services {
		for _, ep := range s.Services[i].Endpoints {
			got = append(got, fmt.Sprintf("%s %s terminating=%v local=%v node=%s", ep.Addr, ep.Pod, ep.Terminating, ep.Local, ep.Node))
		}
	}
	want := []string{
		"10.244.1.1:8080 b-0 terminating=false local=true node=node1",
		"10.244.1.1:9090 e-0 terminating=false local=true node=node1",
		"10.244.1.2:8080 a-1 terminating=false local=true node=node1",
		"10.244.1.4:8080 d terminating=false local=false node=node1",
		"[fd00::1]:8080 c-0 terminating=false local=true node=node1",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("endpoints (-want +got):\n%s", diff)
	}
	if len(s.Problems) != 1 || s.Problems[0].Object != "EndpointSlice shop/c" || s.Problems[0].Field != "endpoints[1].addresses" {
		t.Errorf("problems %v, want one of EndpointSlice shop/c", s.Problems)
	}
	if s.Pods[netip.MustParseAddr("fd00::4")].Name != "d" {
		t.Errorf("pods = %v, want both addresses of d", s.Pods)
	}
}

// TestClaims gives two Services the same things: the first by name has them,
// in each family by itself.
func TestClaims(t *testing.T) {
	nodePort := func(ip4, ip6 string) func(*corev1.Service) {
		return func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ClusterIP, s.Spec.ClusterIPs = corev1.ServiceTypeNodePort, "", nil
			for _, ip := range []string{ip4, ip6} {
				if ip != "" {
					s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, ip)
				}
			}
			s.Spec.Ports[0].NodePort = 30080
		}
	}
	o := &Objects{Services: []corev1.Service{
		service("c", nodePort("10.96.0.3", "fd00:96::3")),
		service("a", nodePort("10.96.0.1", "")),
		service("b", nodePort("10.96.0.1", "fd00:96::2")),
	}}
	s := Convert(o, "node1")
	var got []string
	for i := range s.Services {
		got = append(got, fmt.Sprintf("%s %s %d", s.Services[i].Name.Name, s.Services[i].ClusterIP, s.Services[i].NodePort))
	}
	want := []string{"a 10.96.0.1 30080", "b fd00:96::2 30080", "c 10.96.0.3 0", "c fd00:96::3 0"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(s.Problems) != 3 {
		t.Errorf("problems %v, want three", s.Problems)
	}
}

// TestOrder shuffles the objects: the Snapshot stays the same.
func TestOrder(t *testing.T) {
	o := objects(50, 4)
	want := Convert(o, "node1")
	r := rand.New(rand.NewPCG(1, 2))
	for range 5 {
		r.Shuffle(len(o.Services), func(i, j int) { o.Services[i], o.Services[j] = o.Services[j], o.Services[i] })
		r.Shuffle(len(o.Slices), func(i, j int) { o.Slices[i], o.Slices[j] = o.Slices[j], o.Slices[i] })
		if got := Convert(o, "node1"); !reflect.DeepEqual(want, got) {
			t.Fatal("another order gives another Snapshot")
		}
	}
}

// objects makes dual-stack Services with a slice of n endpoints in each family.
func objects(services, n int) *Objects {
	o := &Objects{}
	for i := range services {
		name := fmt.Sprintf("svc-%05d", i)
		o.Services = append(o.Services, service(name, func(s *corev1.Service) {
			s.Spec.ClusterIP = fmt.Sprintf("10.96.%d.%d", i>>8, i&255)
			s.Spec.ClusterIPs = []string{s.Spec.ClusterIP, fmt.Sprintf("fd00:96::%x", i+1)}
		}))
		for f, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
			var addrs []string
			for j := range n {
				k := i*n + j
				addrs = append(addrs, []string{fmt.Sprintf("10.%d.%d.%d", 100+k>>16, k>>8&255, k&255), fmt.Sprintf("fd00:244::%x", k+1)}[f])
			}
			s := slice(fmt.Sprintf("%s-%d", name, f), family, 8080, addrs...)
			s.Labels[discoveryv1.LabelServiceName] = name
			o.Slices = append(o.Slices, s)
		}
	}
	return o
}

// BenchmarkConvert is the cost of a Snapshot from nothing.
func BenchmarkConvert(b *testing.B) {
	o := objects(5000, 10)
	for i := 0; i < len(o.Slices); i += 2 { // one family
		o.Slices[i/2] = o.Slices[i]
	}
	o.Slices = o.Slices[:5000]
	for i := range o.Services {
		o.Services[i].Spec.ClusterIPs = o.Services[i].Spec.ClusterIPs[:1]
	}
	b.ReportAllocs()
	for b.Loop() {
		if s := Convert(o, "node1"); len(s.Services) != 5000 || len(s.Services[4999].Endpoints) != 10 {
			b.Fatal("not converted")
		}
	}
}

// TestNode reads a dual-stack node.
func TestNode(t *testing.T) {
	node, problems := ConvertNode(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "node1", Labels: map[string]string{corev1.LabelTopologyZone: "a"}},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24", "fd00:244:1::/64"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeHostName, Address: "node1"},
			{Type: corev1.NodeExternalIP, Address: "192.0.2.1"},
			{Type: corev1.NodeInternalIP, Address: "192.168.7.1"},
			{Type: corev1.NodeInternalIP, Address: "fd00:7::1"},
			{Type: corev1.NodeInternalIP, Address: "nonsense"},
		}},
	})
	got := fmt.Sprint(node.Name, node.Zone, node.Addrs, node.PodCIDRs)
	if want := "node1a[192.168.7.1 fd00:7::1 192.0.2.1][10.244.1.0/24 fd00:244:1::/64]"; strings.ReplaceAll(got, " ", "") != strings.ReplaceAll(want, " ", "") {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(problems) != 1 || problems[0].Field != "status.addresses[4].address" {
		t.Errorf("problems %v, want one of the last address", problems)
	}
}
