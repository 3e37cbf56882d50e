package apiserver

import (
	"fmt"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/tools/cache"
)

// table is what a reflector fills: it says what became of each object of one
// resource. A list that replaces everything arrives as the changes it makes, in
// one step, so that coming back after an outage shows no state in between.
type table struct {
	state *state
	// strip makes an object small; it takes its own results unchanged.
	strip func(any) any
	// set and remove are called with the state locked.
	set    func(key string, obj any)
	remove func(key string)

	versions map[string]string
	synced   bool
}

// Transformer implements cache.TransformingStore, so that a first list never
// holds objects in full.
func (t *table) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) { return t.strip(obj), nil }
}

// Add implements cache.ReflectorStore.
func (t *table) Add(obj any) error { return t.Update(obj) }

// Update implements cache.ReflectorStore.
func (t *table) Update(obj any) error {
	obj = t.strip(obj)
	t.state.mu.Lock()
	defer t.state.mu.Unlock()
	_, err := t.put(obj)
	return err
}

// Delete implements cache.ReflectorStore.
func (t *table) Delete(obj any) error {
	key, _, err := identify(obj)
	if err != nil {
		return err
	}
	t.state.mu.Lock()
	defer t.state.mu.Unlock()
	t.drop(key)
	return nil
}

// Replace implements cache.ReflectorStore.
func (t *table) Replace(list []any, _ string) error {
	for i := range list {
		list[i] = t.strip(list[i])
	}
	t.state.mu.Lock()
	defer t.state.mu.Unlock()
	seen := make(map[string]bool, len(list))
	for _, obj := range list {
		key, err := t.put(obj)
		if err != nil {
			return err
		}
		seen[key] = true
	}
	for key := range t.versions {
		if !seen[key] {
			t.drop(key)
		}
	}
	if !t.synced {
		t.synced = true
		t.state.wake()
	}
	return nil
}

// Resync implements cache.ReflectorStore.
func (t *table) Resync() error { return nil }

// put hands on an object that is new or different.
func (t *table) put(obj any) (string, error) {
	key, version, err := identify(obj)
	if err != nil {
		return "", err
	}
	if old, ok := t.versions[key]; !ok || old != version || version == "" {
		t.versions[key] = version
		t.set(key, obj)
	}
	return key, nil
}

func (t *table) drop(key string) {
	if _, ok := t.versions[key]; ok {
		delete(t.versions, key)
		t.remove(key)
	}
}

// identify returns the key of an object and what changes with it, empty if that
// is unknown.
func identify(obj any) (key, version string, err error) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return "", "", fmt.Errorf("apiserver: an object without metadata: %w", err)
	}
	if v := m.GetResourceVersion(); v != "" {
		version = string(m.GetUID()) + "@" + v
	}
	return m.GetNamespace() + "/" + m.GetName(), version, nil
}
