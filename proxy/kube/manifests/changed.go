package manifests

// changed reports whether reading the folder again would give other contents.
func (w *Watcher) changed() bool {
	before := w.loader.files
	probe := loader{files: before}
	if _, _, err := probe.load(w.cfg.Dir); err != nil || len(probe.files) != len(before) {
		return err == nil
	}
	for name, f := range probe.files {
		if before[name] != f {
			return true
		}
	}
	return false
}
