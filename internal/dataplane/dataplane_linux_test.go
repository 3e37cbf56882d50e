package dataplane

import (
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/umlguest"
	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
)

func TestMain(m *testing.M) {
	umlguest.Init()
	netns.Main(m)
}

func TestProgram(t *testing.T) {
	for name, want := range map[string]string{
		"cil_from_netdev": "Cilium", "cil_sock4_conne": "Cilium, sockets", "bpf_lxc.o:[from-container]": "Cilium",
		"cali_tc_preambl": "Calico's eBPF data plane", "calico_connect4": "Calico's eBPF data plane, sockets",
		"sd_devices": "", "kptrace_drop": "",
	} {
		who, sockets := Program(name)
		if sockets {
			who += ", sockets"
		}
		if who != want {
			t.Errorf("%s: %q, want %q", name, who, want)
		}
	}
}

// TestDevice wants a device known by its name, and nothing else in a namespace of
// our own.
func TestDevice(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		if known := Look(); slices.ContainsFunc(known, func(s Sign) bool { return strings.HasPrefix(s.What, "device") }) {
			t.Errorf("an empty namespace has %v", known)
		}
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "bpfin.cali"}, PeerName: "bpfout.cali"}); err != nil {
			return err
		}
		if got := Look(); !slices.ContainsFunc(got, func(s Sign) bool { return s.String() == "Calico's eBPF data plane (device bpfin.cali)" }) {
			t.Errorf("got %v", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestFlowtables asks the kernel, which has none, and reads an answer of one that
// has. The kernels that tests run in make no flowtables.
func TestFlowtables(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		got, err := Flowtables()
		if len(got) != 0 {
			t.Errorf("an empty namespace has %v", got)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	attrs := nfnl.AppendAttr(nil, 1, []byte("fw\x00")...)
	attrs = nfnl.AppendAttr(attrs, 2, []byte("ft\x00")...)
	attrs = nfnl.AppendAttr(attrs, 4, 0, 0, 0, 1)
	data := nfnl.AppendMessage(nil, nfnl.Type(nfnl.SubsysNFTables, 22), 0, 0, 1, 0, attrs)
	data = nfnl.AppendMessage(data, nfnl.Type(nfnl.SubsysNFTables, 15), 0, 0, 1, 0, nil) // a generation
	if got := readFlowtables(data); !slices.Equal(got, []string{"inet fw/ft"}) {
		t.Errorf("read %v", got)
	}
}

// TestPrograms loads eBPF programs, in a guest, where any user may.
func TestPrograms(t *testing.T) {
	guesttest.Group(t, func(t *testing.T) { t.Run("are known by name", programs) })
}

// programs loads one at a device, and one at no device, known by name.
func programs(t *testing.T) {
	load := func(name string, kind ebpf.ProgramType, at ebpf.AttachType) *ebpf.Program {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: name, Type: kind, AttachType: at, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	p := load("cil_from_netdev", ebpf.SchedCLS, ebpf.AttachNone)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	err = netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: lo.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}})
	if err != nil {
		t.Fatal(err)
	}
	err = netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: lo.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1,
		},
		Fd: p.FD(), Name: "cil_from_netdev-lo", DirectAction: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "[Cilium (eBPF program cil_from_netdev-lo at lo)]"
	if got := names(Look()); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	load("calico_connect4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect)
	if got := names(Look()); !strings.Contains(got, "Calico's eBPF data plane (eBPF program calico_connect4)") {
		t.Errorf("got %s", got)
	}
}

func names(signs []Sign) string {
	var all []string
	for _, s := range signs {
		all = append(all, s.String())
	}
	return "[" + strings.Join(all, ", ") + "]"
}
