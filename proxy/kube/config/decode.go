package config

import (
	"encoding/json"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/kube-proxy/config/v1alpha1"
	"sigs.k8s.io/yaml"
)

// Config is kube-proxy's configuration.
type Config = v1alpha1.KubeProxyConfiguration

// Decode reads a configuration in YAML or JSON and fills in the defaults. A
// field that is unknown or given twice is no error but a warning, as long as
// the rest can be read.
func Decode(data []byte) (cfg *Config, warning string, err error) {
	cfg, err = decode(data, serializer.EnableStrict)
	if runtime.IsStrictDecodingError(err) {
		warning = fmt.Sprintf("lenient decoding, as strict decoding failed: %v", err)
		cfg, err = decode(data, serializer.DisableStrict)
	}
	if err != nil {
		return nil, "", fmt.Errorf("proxy/kube/config: decoding: %w", err)
	}
	SetDefaults(cfg)
	return cfg, warning, nil
}

func decode(data []byte, strictness serializer.CodecFactoryOptionsMutator) (*Config, error) {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	codecs := serializer.NewCodecFactory(scheme, strictness)
	obj, kind, err := codecs.UniversalDeserializer().Decode(data, nil, nil)
	wanted := v1alpha1.SchemeGroupVersion.WithKind("KubeProxyConfiguration")
	switch {
	case runtime.IsMissingKind(err), runtime.IsMissingVersion(err):
		return nil, fmt.Errorf("apiVersion or kind is missing: they are %s and %s", wanted.GroupVersion(), wanted.Kind)
	case runtime.IsNotRegisteredError(err):
		var is metav1.TypeMeta
		if yaml.Unmarshal(data, &is) != nil {
			return nil, err
		}
		return nil, fmt.Errorf("it is a %s of %s, not a %s of %s", is.Kind, is.APIVersion, wanted.Kind, wanted.GroupVersion())
	case err != nil:
		return nil, err
	}
	cfg, ok := obj.(*Config)
	if !ok {
		return nil, fmt.Errorf("it is a %s, not a %s", kind, wanted.Kind)
	}
	return cfg, nil
}

// Effective returns a configuration as kube-proxy uses it and shows it: the modes
// that are meant by an empty value stand there, and the periods of modes that
// are not used do not.
func Effective(cfg *Config) *Config {
	out := cfg.DeepCopy()
	if out.Mode == "" {
		out.Mode = ModeIPTables
	}
	if out.DetectLocalMode == "" {
		out.DetectLocalMode = LocalClusterCIDR
	}
	used := out.Mode
	if used == ModeUserspace { // the file has no section of its own for it
		used = ModeIPTables
	}
	for mode, periods := range map[v1alpha1.ProxyMode][]*metav1.Duration{
		ModeIPTables: {&out.IPTables.SyncPeriod, &out.IPTables.MinSyncPeriod},
		ModeIPVS:     {&out.IPVS.SyncPeriod, &out.IPVS.MinSyncPeriod},
		ModeNFTables: {&out.NFTables.SyncPeriod, &out.NFTables.MinSyncPeriod},
	} {
		for _, p := range periods {
			if mode != used {
				p.Duration = 0
			}
		}
	}
	return out
}

// Encode writes a configuration as YAML, with its kind.
func Encode(cfg *Config) ([]byte, error) {
	b, err := yaml.Marshal(named(cfg))
	if err != nil {
		return nil, fmt.Errorf("proxy/kube/config: encoding: %w", err)
	}
	return b, nil
}

// Configz is the body that kube-proxy serves at /configz.
func Configz(cfg *Config) ([]byte, error) {
	b, err := json.Marshal(map[string]any{v1alpha1.GroupName: named(Effective(cfg))})
	if err != nil {
		return nil, fmt.Errorf("proxy/kube/config: encoding: %w", err)
	}
	return b, nil
}

func named(cfg *Config) *Config {
	out := cfg.DeepCopy()
	out.SetGroupVersionKind(v1alpha1.SchemeGroupVersion.WithKind("KubeProxyConfiguration"))
	return out
}
