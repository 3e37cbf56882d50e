package netns

import (
	"errors"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// readSysctl returns a value below /proc/sys, or "" where there is none.
func readSysctl(path string) string {
	b, err := os.ReadFile("/proc/sys/" + path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Explain says why the host refused to make namespaces, which for an
// ordinary user include a user namespace, and how to allow it. An err without
// a known errno gives no cause.
func Explain(doing string, err error, userNS bool) *HostError {
	return diagnose(doing, err, userNS, readSysctl)
}

// diagnose explains a failed step of making a sandbox. Settings are read
// with sysctl, so that a test can play a host.
func diagnose(doing string, err error, userNS bool, sysctl func(path string) string) *HostError {
	e := &HostError{Doing: doing, Err: err}
	switch {
	case errors.Is(err, unix.ENOSPC):
		e.Cause, e.Fix = exhausted(userNS, sysctl)
	case errors.Is(err, unix.EUSERS):
		e.Cause = "user or pid namespaces are nested too deeply (32 levels)"
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS):
		e.Cause = "this kernel lacks a kind of namespace (CONFIG_USER_NS, CONFIG_PID_NS, CONFIG_NET_NS)"
		e.Fix = "boot a kernel that has them"
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		e.Cause, e.Fix = forbidden(doing, userNS, sysctl)
	}
	return e
}

func exhausted(userNS bool, sysctl func(string) string) (cause, fix string) {
	kinds := []string{"net", "pid", "mnt"}
	if userNS {
		kinds = append([]string{"user"}, kinds...)
	}
	for _, kind := range kinds {
		if name := "max_" + kind + "_namespaces"; sysctl("user/"+name) == "0" {
			return "user." + name + " is 0", "sysctl -w user." + name + "=15000 (as root)"
		}
	}
	return "the limit of namespaces per user is reached (user.max_*_namespaces, here or in a parent namespace)",
		"end what holds them, or raise the limits (sysctl user)"
}

func forbidden(doing string, userNS bool, sysctl func(string) string) (cause, fix string) {
	switch {
	case userNS && sysctl("kernel/unprivileged_userns_clone") == "0":
		return "user namespaces are for root only here (kernel.unprivileged_userns_clone is 0)",
			"sysctl -w kernel.unprivileged_userns_clone=1 (as root), or run kptrace as root"
	case userNS && sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
		return "AppArmor takes the capabilities away in an unprivileged user namespace " +
				"(kernel.apparmor_restrict_unprivileged_userns is 1)",
			"sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (as root), or run kptrace as root"
	case doing == doMountProc:
		return "parts of /proc are hidden, as in a container",
			"give the container an unmasked /proc (docker run --security-opt systempaths=unconfined), or run it privileged"
	case userNS:
		return "a container's seccomp profile, a security module or a chroot forbids user namespaces",
			"run outside the container, or allow it there (docker run --security-opt seccomp=unconfined), or as root"
	case os.Geteuid() != 0:
		return "only root may, or who is inside a sandbox", "run kptrace as root, or in namespaces of its own"
	default:
		return "root lacks CAP_SYS_ADMIN, or a security module forbids it", "run kptrace with all capabilities of root"
	}
}
