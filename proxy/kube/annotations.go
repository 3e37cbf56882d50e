package kube

import (
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/kptrace/kptrace/proxy"
)

// The annotations of a Service that are ours. They matter to mode ipvs alone.
const (
	// annotationScheduler names the Service's scheduler, as
	// proxy.ParseScheduler reads it: "wlc", or "sh,port".
	annotationScheduler = "kptrace.dev/ipvs-scheduler"
	// annotationWeights gives endpoints weights: "foo-5c=3, node/big=4". What
	// stands before = is the name of an endpoint's pod, its address,
	// node/NAME or zone/NAME; where several fit the first of these counts.
	annotationWeights = "kptrace.dev/ipvs-weights"
)

// scheduler reads annotationScheduler.
func (p *part) scheduler(svc *corev1.Service) string {
	text, ok := svc.Annotations[annotationScheduler]
	if !ok {
		return ""
	}
	s, err := proxy.ParseScheduler(strings.TrimSpace(text))
	if err != nil {
		p.bad("Service", svc.Name, "metadata.annotations["+annotationScheduler+"]", "%v; the proxy's own scheduler is used", err)
		return ""
	}
	return s.String()
}

// weigh gives the endpoints of all ports the weights of annotationWeights.
func (p *part) weigh(svc *corev1.Service) {
	text, ok := svc.Annotations[annotationWeights]
	if !ok {
		return
	}
	weights := map[string]uint16{}
	for word := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(word, "=")
		n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 16)
		if key = strings.TrimSpace(key); key == "" || err != nil || n == 0 {
			p.bad("Service", svc.Name, "metadata.annotations["+annotationWeights+"]",
				"%q is not like foo-5c=3, 10.244.1.2=3, node/NAME=3 or zone/NAME=3 with a weight of 1 to 65535; it is left out", strings.TrimSpace(word))
			continue
		}
		weights[key] = uint16(n)
	}
	for i := range p.Services {
		eps := p.Services[i].Endpoints
		for j := range eps {
			for _, key := range []string{eps[j].Pod, eps[j].Addr.Addr().String(), "node/" + eps[j].Node, "zone/" + eps[j].Zone} {
				if n, ok := weights[key]; ok && key != "" {
					eps[j].Weight = n
					break
				}
			}
		}
	}
}
