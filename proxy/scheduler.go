package proxy

import (
	"fmt"
	"slices"
	"strings"
)

// MaxSchedulerLen is the longest name of an IPVS scheduler in bytes
// (IP_VS_SCHEDNAME_MAXLEN without its NUL, linux/ip_vs.h).
const MaxSchedulerLen = 15

// Scheduler is an IPVS scheduler and what can be set of it.
type Scheduler struct {
	// Name is the kernel's name, such as "wlc". It need not be one that
	// kptrace knows.
	Name string
	// NoFallback has sh and mh refuse the clients of an endpoint that is out or
	// leaving, for as long as it has connections, rather than send them to another;
	// Port has them look at the client's port beside its address.
	NoFallback, Port bool
}

// The flags of a Scheduler as they are written.
const (
	schedulerFallback   = "fallback"
	schedulerNoFallback = "no-fallback"
	schedulerPort       = "port"
	schedulerNoPort     = "no-port"
)

// ParseScheduler reads a scheduler's name with its flags: "wlc",
// "sh,port,no-fallback". Only sh and mh have flags. As in kube-proxy mh looks at
// the client's port; "mh,no-port" does not. Both fall back unless told not to.
func ParseScheduler(text string) (Scheduler, error) {
	name, rest, flags := strings.Cut(text, ",")
	s := Scheduler{Name: name, Port: name == "mh"}
	if name == "" || len(name) > MaxSchedulerLen || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_-") != "" {
		return s, fmt.Errorf("%q is no name of an IPVS scheduler: use one such as %s", name, strings.Join(Schedulers(), ", "))
	}
	if !flags {
		return s, nil
	}
	if name != "sh" && name != "mh" {
		return s, fmt.Errorf("scheduler %s has no flags: only sh and mh do", name)
	}
	for f := range strings.SplitSeq(rest, ",") {
		switch strings.TrimSpace(f) {
		case schedulerFallback:
			s.NoFallback = false
		case schedulerNoFallback:
			s.NoFallback = true
		case schedulerPort:
			s.Port = true
		case schedulerNoPort:
			s.Port = false
		default:
			return s, fmt.Errorf("scheduler %s has no flag %q: use %s, %s, %s or %s", name, f, schedulerFallback, schedulerNoFallback, schedulerPort, schedulerNoPort)
		}
	}
	return s, nil
}

// Schedulers lists the schedulers of Linux 6.1, as `Scheduler.Name`.
func Schedulers() []string {
	return []string{"rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh", "twos"}
}

// Weighs reports whether the scheduler looks at weights other than 0.
func (s Scheduler) Weighs() bool {
	return !slices.Contains([]string{"rr", "lc", "dh"}, s.Name)
}

// String returns what ParseScheduler reads.
func (s Scheduler) String() string {
	text := s.Name
	if s.NoFallback {
		text += "," + schedulerNoFallback
	}
	switch {
	case s.Port && s.Name != "mh":
		text += "," + schedulerPort
	case !s.Port && s.Name == "mh":
		text += "," + schedulerNoPort
	}
	return text
}
