package umlguest

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"strings"
)

// moduleIndex is modules.dep and modules.alias of one kernel.
type moduleIndex struct {
	file    map[string]string   // name -> path below the folder
	needs   map[string][]string // name -> paths of what it needs, direct needs first
	aliases []moduleAlias
}

type moduleAlias struct{ pattern, name string }

// moduleName returns the name of a module's file as the kernel knows it.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return canonical(name)
}

// canonical makes dashes and underscores alike, as the kernel does.
func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// readModules reads modules.dep and modules.alias (modules.dep(5)).
func readModules(dep, alias io.Reader) (*moduleIndex, error) {
	m := &moduleIndex{file: map[string]string{}, needs: map[string][]string{}}
	lines := bufio.NewScanner(dep)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		file, needs, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			continue
		}
		name := moduleName(file)
		m.file[name] = file
		m.needs[name] = strings.Fields(needs)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("umlguest: reading modules.dep: %w", err)
	}
	lines = bufio.NewScanner(alias)
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) == 3 && f[0] == "alias" {
			m.aliases = append(m.aliases, moduleAlias{f[1], canonical(f[2])})
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("umlguest: reading modules.alias: %w", err)
	}
	return m, nil
}

// resolve returns the modules that a name, or an alias such as rtnl-link-dummy,
// stands for.
func (m *moduleIndex) resolve(name string) []string {
	if c := canonical(name); m.file[c] != "" {
		return []string{c}
	}
	var found []string
	for _, a := range m.aliases {
		if ok, err := path.Match(a.pattern, name); ok && err == nil {
			found = append(found, a.name)
		}
	}
	return found
}

// order returns the files to load for a module, what it needs first. The
// lists of modules.dep are closed already and end with the deepest need.
func (m *moduleIndex) order(name string) []string {
	var files []string
	for i := len(m.needs[name]) - 1; i >= 0; i-- {
		files = append(files, m.needs[name][i])
	}
	return append(files, m.file[name])
}
