package features

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func userNamespace(ctx context.Context, _ *netns.NS) (found, error) {
	err := runIn(ctx, unix.CLONE_NEWUSER)
	return found{UserNamespace: "made by uid " + fmt.Sprint(os.Getuid())}.unless(err), err
}

func netNamespace(_ context.Context, ns *netns.NS) (found, error) {
	return found{NetNamespace: "made, lo is up"}, nil // ns exists
}

func pidNamespace(ctx context.Context, _ *netns.NS) (found, error) {
	err := runIn(ctx, unix.CLONE_NEWPID)
	return found{PIDNamespace: "made"}.unless(err), err
}

func mountNamespace(ctx context.Context, _ *netns.NS) (found, error) {
	err := runIn(ctx, unix.CLONE_NEWNS)
	return found{MountNamespace: "made"}.unless(err), err
}

// runIn runs a command that does nothing in a new namespace.
func runIn(ctx context.Context, flags exec.Flags) error {
	spec := exec.Spec{Path: "true", NewNamespaces: flags, Grace: -1}
	if flags&unix.CLONE_NEWUSER != 0 {
		spec.UIDMap = []exec.IDMap{{Inside: 0, Outside: os.Geteuid(), Size: 1}}
		spec.GIDMap = []exec.IDMap{{Inside: 0, Outside: os.Getegid(), Size: 1}}
	}
	_, err := exec.Run(ctx, spec)
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return netns.Explain("making namespaces", errno, flags&unix.CLONE_NEWUSER != 0)
	}
	return err
}

func (f found) unless(err error) found {
	if err != nil {
		return nil
	}
	return f
}

func veth(_ context.Context, ns *netns.NS) (found, error) {
	peer, err := netns.New()
	if err != nil {
		return nil, err
	}
	defer peer.Close()
	err = ns.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "kp0"}, PeerName: "kp1",
			PeerNamespace: netlink.NsFd(peer.Fd())})
	})
	if err == nil {
		err = peer.Do(func() error { _, err := netlink.LinkByName("kp1"); return err })
	}
	if err != nil {
		return nil, fmt.Errorf("features: making a veth pair: %w", err)
	}
	return found{Veth: "a pair across two namespaces"}, nil
}

func bridge(_ context.Context, ns *netns.NS) (found, error) {
	err := ns.Do(func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "kpbr"}}
		if err := netlink.LinkAdd(br); err != nil {
			return err
		}
		port := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "kp0"}, PeerName: "kp1"}
		if err := netlink.LinkAdd(port); err != nil {
			return err
		}
		if err := netlink.LinkSetMaster(port, br); err != nil {
			return err
		}
		return netlink.LinkSetHairpin(port, true)
	})
	if err != nil {
		return nil, fmt.Errorf("features: making a bridge: %w", err)
	}
	seen := "with a hairpin port"
	if v, err := ns.Sysctl("net.bridge.bridge-nf-call-iptables"); err == nil {
		seen += ", bridge-nf-call-iptables=" + v
	}
	return found{Bridge: seen}, nil
}

// ipvs asks for the generic netlink family; asking loads the module where
// that is possible.
func ipvs(_ context.Context, ns *netns.NS) (found, error) {
	err := ns.Do(func() error {
		_, err := netlink.GenlFamilyGet("IPVS")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("features: looking for IPVS: %w", err)
	}
	return found{IPVS: "generic netlink family IPVS"}, nil
}

func btf(context.Context, *netns.NS) (found, error) {
	const path = "/sys/kernel/btf/vmlinux"
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("features: looking for BTF: %w", err)
	}
	return found{BTF: fmt.Sprintf("%s, %d bytes", path, info.Size())}, nil
}
