package netns

import (
	"fmt"
	"os"
	"strings"
)

// Sysctl reads a setting of the namespace, such as net.ipv4.ip_forward or
// net/ipv4/conf/eth0.100/rp_filter. A name with a slash is taken as a path
// below /proc/sys; without one its dots separate. Only settings below net
// belong to the namespace (sysctl under /proc/sys/net follows the thread that
// opens it).
func (n *NS) Sysctl(name string) (string, error) {
	var value string
	err := n.Do(func() error {
		b, err := os.ReadFile(sysctlPath(name))
		if err != nil {
			return fmt.Errorf("netns: reading sysctl: %w", err)
		}
		value = strings.TrimSpace(string(b))
		return nil
	})
	return value, err
}

// SetSysctl writes a setting of the namespace; name is as in Sysctl.
func (n *NS) SetSysctl(name, value string) error {
	return n.Do(func() error {
		file, err := os.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
		if err == nil {
			_, err = file.WriteString(value)
			file.Close()
		}
		if err != nil {
			return fmt.Errorf("netns: setting sysctl to %q: %w", value, err)
		}
		return nil
	})
}

func sysctlPath(name string) string {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	return "/proc/sys/" + strings.TrimPrefix(name, "/")
}
