package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/exporters/relay"
)

// owner holds the lock that makes us the only one to write kernel state in
// this network namespace, and the file that remembers what the sysctls were.
type owner struct {
	lock *os.File
	path string

	mu    sync.Mutex // guards what follows
	saved map[string]setting
	// unsaved is why the file does not say what saved does, nil if it does.
	unsaved error
}

// setting is one sysctl we changed: what it was, and what we made it.
type setting struct {
	Was  string `json:"was"`
	Ours string `json:"ours"`
}

// errOwned says that another kptrace owns this network namespace.
var errOwned = errors.New("another kptrace owns this network namespace")

// own takes the lock. The state of an owner that died is taken over, so that
// what it changed can still be undone.
func own(dir string) (*owner, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("node: making the state folder: %w", err)
	}
	name, err := netnsName()
	if err != nil {
		return nil, err
	}
	base := filepath.Join(dir, "netns-"+name)
	lock, err := takeLock(base + ".lock")
	if err != nil {
		return nil, err
	}
	o := &owner{lock: lock, path: base + ".json", saved: map[string]setting{}}
	if err := o.load(); err != nil {
		_ = lock.Close()
		return nil, err
	}
	return o, nil
}

// beside notes whether we only watch another proxy here, so that a cleanup after
// kill -9 does not take the other one's rules for ours.
func (o *owner) beside(yes bool) error {
	name := besideMark(o.path)
	if !yes {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("node: %w", err)
		}
		return nil
	}
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	return nil
}

func besideMark(path string) string { return strings.TrimSuffix(path, ".json") + ".beside" }

// Beside reports whether the last kptrace that ran in this network namespace
// only watched another proxy, so that KUBE-* rules are not ours.
func Beside(stateDir string) (bool, error) {
	name, err := netnsName()
	if err != nil {
		return false, err
	}
	_, err = os.Stat(besideMark(filepath.Join(stateDir, "netns-"+name+".json")))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// load writes who we are into the lock and reads what an earlier owner left.
func (o *owner) load() error {
	if err := o.lock.Truncate(0); err != nil {
		return fmt.Errorf("node: writing the lock: %w", err)
	}
	// Who holds it is for people to read; a full disk does not matter.
	if _, err := o.lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil && !diskTrouble(err) {
		return fmt.Errorf("node: writing the lock: %w", err)
	}
	raw, err := os.ReadFile(o.path)
	if err == nil {
		err = json.Unmarshal(raw, &o.saved)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("node: reading %s: %w: delete it if the sysctls in it need not be set back", o.path, err)
	}
	return nil
}

// takeLock opens and locks a file without waiting. A holder removes the file as
// it goes, so what was locked must still be what the name stands for.
func takeLock(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("node: opening the lock: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			holder, _ := os.ReadFile(path)
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("node: %w (process %s): stop it first, or ask it with kptrace follow", errOwned, strings.TrimSpace(string(holder)))
			}
			return nil, fmt.Errorf("node: locking %s: %w", path, err)
		}
		held, err := f.Stat()
		named, err2 := os.Stat(path)
		if err == nil && err2 == nil && os.SameFile(held, named) {
			return f, nil
		}
		f.Close()
	}
}

// netnsName names this network namespace uniquely for this boot: its cookie
// (SO_NETNS_COOKIE, Linux 5.14) is never given twice, its inode number may be.
func netnsName() (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("node: opening a socket: %w", err)
	}
	defer unix.Close(fd)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("node: %w", err)
	}
	prefix := strings.TrimSpace(string(boot))[:8] + "-"
	if cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err == nil {
		return prefix + strconv.FormatUint(cookie, 10), nil
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return "", fmt.Errorf("node: %w", err)
	}
	return prefix + "i" + strconv.FormatUint(st.Ino, 10), nil
}

// set changes a sysctl below /proc/sys and remembers what it was, unless it is
// so already.
func (o *owner) set(name, value string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	was, err := readSysctl(name)
	if err != nil {
		return err
	}
	if was == value {
		return nil
	}
	old, ok := o.saved[name]
	if ok {
		was = old.Was
	}
	o.saved[name] = setting{Was: was, Ours: value}
	// The file first: what is changed must be known even if we die in between.
	// A disk that takes nothing is no reason to leave Services without it.
	if err := o.save(); err != nil && !diskTrouble(err) {
		return err
	}
	err = writeSysctl(name, value)
	if err != nil && ok {
		o.saved[name] = old
	} else if err != nil {
		delete(o.saved, name)
	}
	if err != nil {
		if trouble := o.save(); !diskTrouble(trouble) {
			err = errors.Join(err, trouble)
		}
		return err
	}
	return nil
}

// diskTrouble reports whether err is of a disk that is full or takes no writes.
func diskTrouble(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EIO)
}

// kept tries once more to write down what could not be, and returns why that
// fails, nil if all is written.
func (o *owner) kept() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.unsaved == nil {
		return nil
	}
	return o.save()
}

// reset sets one sysctl back if it is still as we made it, and forgets it.
func (o *owner) reset(name string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	s, ok := o.saved[name]
	if !ok {
		return nil
	}
	now, err := readSysctl(name)
	if err == nil && now == s.Ours {
		err = writeSysctl(name, s.Was)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	delete(o.saved, name)
	return o.save()
}

// restore sets back what is still as we made it, and forgets the rest.
func (o *owner) restore() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var errs []error
	for name, s := range o.saved {
		now, err := readSysctl(name)
		if err == nil && now == s.Ours {
			err = writeSysctl(name, s.Was)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
			continue
		}
		delete(o.saved, name)
	}
	return errors.Join(append(errs, o.save())...)
}

// save writes saved into the file. The caller holds mu.
func (o *owner) save() error {
	o.unsaved = o.write()
	return o.unsaved
}

func (o *owner) write() error {
	if len(o.saved) == 0 {
		if err := os.Remove(o.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("node: %w", err)
		}
		return nil
	}
	raw, err := json.MarshalIndent(o.saved, "", "  ")
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	tmp := o.path + ".new"
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		_ = os.Remove(tmp) // what there is of it
		return fmt.Errorf("node: remembering sysctls: %w", err)
	}
	if err := os.Rename(tmp, o.path); err != nil {
		return fmt.Errorf("node: remembering sysctls: %w", err)
	}
	return nil
}

// changed lists the sysctls in our hands, by name.
func (o *owner) changed() []relay.Sysctl {
	o.mu.Lock()
	defer o.mu.Unlock()
	var list []relay.Sysctl
	for _, name := range slices.Sorted(maps.Keys(o.saved)) {
		s := o.saved[name]
		list = append(list, relay.Sysctl{Name: strings.ReplaceAll(name, "/", "."), Before: s.Was, Now: s.Ours})
	}
	return list
}

// release gives up the lock. The lock file goes too where nothing is left to
// remember, so that a namespace of a test leaves no litter.
func (o *owner) release() {
	if len(o.saved) == 0 {
		_ = os.Remove(o.lock.Name())
	}
	_ = o.lock.Close()
}

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return "", fmt.Errorf("node: reading sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func writeSysctl(name, value string) error {
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
		return fmt.Errorf("node: writing sysctl: %w", err)
	}
	return nil
}
