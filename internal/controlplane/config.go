package controlplane

// Config says what control plane to run. Bin and Dir are required.
type Config struct {
	// Bin is the folder with the programs etcd and kube-apiserver.
	Bin string
	// Dir is an empty folder for data, keys, kubeconfigs and logs. It is the
	// caller's to remove.
	Dir string
	// ServiceRange is where cluster IPs come from, one CIDR or two of
	// different families separated by a comma, the primary one first. Empty
	// means 10.96.0.0/16.
	ServiceRange string
	// RBAC has requests authorized by the roles that Kubernetes brings along;
	// otherwise everybody may do everything. It costs half a second.
	RBAC bool
}

// User is somebody whom the API server knows.
type User string

// The users, who are in the groups that give them these roles.
const (
	// Admin may do everything.
	Admin User = "admin"
	// KubeProxy may do what the ClusterRole system:node-proxier lets a
	// kube-proxy do, if Config.RBAC is set.
	KubeProxy User = "system:kube-proxy"
)
