package controlplane

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// writeKeys writes an authority (ca.crt), a server certificate for loopback
// (server.crt, server.key) and a key for service account tokens (sa.key). It
// returns the authority's certificate in PEM.
func writeKeys(dir string) ([]byte, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kptrace test authority"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	server := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "kube-apiserver"},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		DNSNames:    []string{"localhost", "kubernetes.default.svc"},
	}
	serverDER, err := x509.CreateCertificate(rand.Reader, server, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	saKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	caPEM := encode("CERTIFICATE", caDER)
	for name, text := range map[string][]byte{
		"ca.crt":     caPEM,
		"server.crt": encode("CERTIFICATE", serverDER),
		"server.key": encodeKey(key),
		"sa.key":     encodeKey(saKey),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return nil, err
		}
	}
	return caPEM, nil
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func encodeKey(key *ecdsa.PrivateKey) []byte {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		panic("controlplane: a key on P-256 does not marshal: " + err.Error()) // never, by its documentation
	}
	return encode("EC PRIVATE KEY", der)
}

// writeUsers makes a token for each user and writes the file by which the
// server knows them, and one kubeconfig each.
func (c *Cluster) writeUsers(caFile string) error {
	groups := map[User]string{Admin: "system:masters", KubeProxy: ""}
	list := ""
	for user, group := range groups {
		token := rand.Text()
		list += fmt.Sprintf("%s,%s,%s,%q\n", token, user, user, group)
		if err := os.WriteFile(c.Kubeconfig(user), []byte(kubeconfig(c.URL(), caFile, string(user), token)), 0o600); err != nil {
			return err
		}
		if user == Admin {
			c.token = token
		}
	}
	return os.WriteFile(c.path("tokens.csv"), []byte(list), 0o600)
}

func kubeconfig(url, ca, user, token string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: test
  cluster: {server: %q, certificate-authority: %q}
users:
- name: %q
  user: {token: %q}
contexts:
- name: test
  context: {cluster: test, user: %[3]q}
current-context: test
`, url, ca, user, token)
}
