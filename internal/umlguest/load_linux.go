package umlguest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// kernelModules are the modules of the running kernel.
type kernelModules struct {
	*moduleIndex
	dir    string
	loaded map[string]bool // paths
}

// moduleFolders is where the modules of a kernel may be, by its path. Unpacked
// without root they lie beside it.
func moduleFolders(kernel string) []string {
	return []string{filepath.Join(filepath.Dir(kernel), "../lib/uml/modules"), modulesDir}
}

func openModules() (*kernelModules, error) {
	dir, err := os.Readlink(indexLink)
	if err != nil {
		for _, d := range moduleFolders(os.Getenv(kernelEnv)) {
			if d = filepath.Join(d, release()); unix.Access(d, unix.R_OK) == nil {
				dir = d
				break
			}
		}
		if dir == "" {
			return nil, fmt.Errorf("no modules of kernel %s in %s", release(), modulesDir)
		}
		if err := os.Symlink(dir, indexLink); err != nil {
			return nil, err
		}
	}
	dep, err := os.Open(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	defer dep.Close()
	alias, err := os.Open(filepath.Join(dir, "modules.alias"))
	if err != nil {
		return nil, err
	}
	defer alias.Close()
	index, err := readModules(dep, alias)
	return &kernelModules{index, dir, map[string]bool{}}, err
}

// load loads a module, or all that an alias stands for, and what they need.
func (m *kernelModules) load(name string) error {
	names := m.resolve(name)
	if len(names) == 0 {
		return errors.New("the kernel has no such module")
	}
	for _, n := range names {
		for _, file := range m.order(n) {
			if m.loaded[file] {
				continue
			}
			if err := insert(filepath.Join(m.dir, file)); err != nil {
				return fmt.Errorf("%s: %w", moduleName(file), err)
			}
			m.loaded[file] = true
		}
	}
	return nil
}

func insert(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// modprobe is what the kernel, iptables and others call for a module.
func modprobe(args []string) int {
	m, err := openModules()
	if err != nil {
		fmt.Fprintln(os.Stderr, "modprobe:", err)
		return 1
	}
	code := 0
	for _, a := range args {
		if strings.HasPrefix(a, "-") {
			continue
		}
		if err := m.load(a); err != nil {
			fmt.Fprintf(os.Stderr, "modprobe: %s: %v\n", a, err)
			code = 1
		}
	}
	return code
}

// loopbackUp brings lo up.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bringing lo up: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("bringing lo up: %w", err)
	}
	return nil
}
