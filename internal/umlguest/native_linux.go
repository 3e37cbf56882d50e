package umlguest

import "github.com/vishvananda/netlink"

// Native reports whether this kernel itself has IPVS. Asking loads the module
// where that is possible.
func Native() bool {
	_, err := netlink.GenlFamilyGet("IPVS")
	return err == nil
}
