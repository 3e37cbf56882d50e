// Package config reads, checks and writes kube-proxy's configuration file,
// KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1, as kube-proxy
// 1.36 does: strictly first, then leniently with a warning; defaults filled in;
// errors that name the field.
//
// Everything here is pure but for Watch, which ends when the file changes.
package config
