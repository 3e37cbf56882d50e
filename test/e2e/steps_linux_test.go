//go:build e2e

package e2e

import (
	"context"
	"errors"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// step is one change of the objects while both proxies run.
type step struct {
	name string
	do   func(context.Context, kubernetes.Interface) error
}

// steps are changes after which a proxy that only adds, or that forgets what it
// owes, is found out.
func steps() []step {
	return []step{
		{"endpoints come", endpoints("clusterip", "a,b,c local,d,e,f local")},
		{"endpoints go", endpoints("many", "c,h")},
		{"the first endpoint", endpoints("none", "a,b local")},
		{"the last endpoint", endpoints("nodeport", "")},
		{"all terminate", endpoints("external", "a terminating,b local terminating")},
		{"hints vanish", endpoints("zone", "a zone=zone1,b zone=zone2,c")},
		{"hints come", endpoints("affinity", "a zone=zone1,b zone=zone2,c zone=zone1")},
		{"a local endpoint comes", endpoints("external-local-missing", "a,b local")},
		{"the local endpoint goes", endpoints("external-local-lb", "a,b")},
		{"affinity", edit("ports", affinity(120))},
		{"affinity ends", edit("affinity-short", func(s *corev1.Service) {
			s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = corev1.ServiceAffinityNone, nil
		})},
		{"policy", edit("external-local", func(s *corev1.Service) {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
		})},
		{"source ranges", edit("lb", ranges("10.9.0.0/16", "fd00:9::/32"))},
		{"no source ranges", edit("ranges-many", ranges())},
		{"another address in front", status("ranges-two-ips", func(s *corev1.Service) {
			s.Status.LoadBalancer.Ingress = append([]corev1.LoadBalancerIngress{{IP: "198.18.0.99"}, {IP: "fd00:18::99"}}, s.Status.LoadBalancer.Ingress...)
		})},
		{"an address less", status("everything", func(s *corev1.Service) {
			s.Status.LoadBalancer.Ingress = s.Status.LoadBalancer.Ingress[:1]
		})},
		{"external addresses", edit("one", externalIPs(9))},
		{"port and name", edit("unnamed", func(s *corev1.Service) { s.Spec.Ports[0].Port = 81 })},
		{"a node port", edit("udp", nodePort)},
		{"no node port", edit("protocols", func(s *corev1.Service) {
			s.Spec.Type = corev1.ServiceTypeClusterIP
			for i := range s.Spec.Ports {
				s.Spec.Ports[i].NodePort = 0
			}
		})},
		{"one family", edit("sctp", func(s *corev1.Service) {
			s.Spec.IPFamilyPolicy = ptr(corev1.IPFamilyPolicySingleStack)
			s.Spec.IPFamilies, s.Spec.ClusterIPs = s.Spec.IPFamilies[:1], s.Spec.ClusterIPs[:1]
		})},
		{"taken by another proxy", edit("dead", func(s *corev1.Service) {
			s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "another"}
		})},
		{"deleted", func(ctx context.Context, c kubernetes.Interface) error {
			var errs []error
			for _, name := range []string{"v4", "lb-vip", "affinity-local", "none-udp", "internal-local"} {
				errs = append(errs, c.CoreV1().Services(namespace).Delete(ctx, name, metav1.DeleteOptions{}))
			}
			return errors.Join(errs...)
		}},
		{"made again", func(ctx context.Context, c kubernetes.Interface) error {
			o := &objects{}
			o.add("lb-vip", "http:80 new:8080", "", loadBalancer(40))
			return createService(ctx, c, o.services[0])
		}},
		{"another zone", func(ctx context.Context, c kubernetes.Interface) error {
			n, err := c.CoreV1().Nodes().Get(ctx, nodeName, metav1.GetOptions{})
			if err != nil {
				return err
			}
			n.Labels[corev1.LabelTopologyZone] = "zone2"
			_, err = c.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{})
			return err
		}},
	}
}

// endpoints gives a Service other endpoints, in the words of objects.add.
func endpoints(name, list string) func(context.Context, kubernetes.Interface) error {
	return func(ctx context.Context, c kubernetes.Interface) error {
		s, err := c.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
			e := slice(s, family, "a")
			err := c.DiscoveryV1().EndpointSlices(namespace).DeleteCollection(ctx, metav1.DeleteOptions{},
				metav1.ListOptions{FieldSelector: "metadata.name=" + e.Name})
			if err != nil {
				return err
			}
			if list == "" {
				continue
			}
			if _, err := c.DiscoveryV1().EndpointSlices(namespace).Create(ctx, slice(s, family, list), metav1.CreateOptions{}); err != nil {
				return err
			}
		}
		return nil
	}
}

func edit(name string, f func(*corev1.Service)) func(context.Context, kubernetes.Interface) error {
	return func(ctx context.Context, c kubernetes.Interface) error {
		s, err := c.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		f(s)
		_, err = c.CoreV1().Services(namespace).Update(ctx, s, metav1.UpdateOptions{})
		return err
	}
}

func status(name string, f func(*corev1.Service)) func(context.Context, kubernetes.Interface) error {
	return func(ctx context.Context, c kubernetes.Interface) error {
		s, err := c.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		f(s)
		_, err = c.CoreV1().Services(namespace).UpdateStatus(ctx, s, metav1.UpdateOptions{})
		return err
	}
}
