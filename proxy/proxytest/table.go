package proxytest

import (
	"net/netip"

	"github.com/kptrace/kptrace/proxy"
)

// Cases is the table.
func Cases() []Case {
	table := Services(`
		shop/web:http     tcp 10.96.0.10:80  nodeport=30080 a:8080 b:8080 c:8080
		shop/one          tcp 10.96.0.11:80  c:8080
		shop/none:http    tcp 10.96.0.12:80  nodeport=30081
		shop/none:udp     udp 10.96.0.12:80
		shop/dns:dns      udp 10.96.0.13:53  nodeport=30053 a:5353 b:5353
		shop/dns:dns-tcp  tcp 10.96.0.13:53  nodeport=30053 c:8080
		shop/sticky:http  tcp 10.96.0.14:80  nodeport=30082 affinity=3h a:8080 b:8080
		shop/stickyudp    udp 10.96.0.14:80  affinity=10s a:5353 b:5353
		shop/unready      tcp 10.96.0.15:80  a:8080,notready b:8080,dead
		shop/mixed        tcp 10.96.0.16:80  a:8080 b:8080,notready c:8080,terminating
		shop/drain        tcp 10.96.0.17:80  a:8080,terminating b:8080,dead c:8080,terminating
		shop/zoned        tcp 10.96.0.18:80  a:8080,zone=zone1 b:8080,zone=zone2 c:8080,zone=zone1
		shop/two:http     tcp 10.96.0.19:80  a:8080
		shop/two:https    tcp 10.96.0.19:443 b:8443
	`)
	plain := parse(`
		pod     tcp 10.96.0.10:80    = forward shop/web:http ClusterIP a:8080 b:8080 c:8080
		c       tcp 10.96.0.10:80    = forward shop/web:http ClusterIP a:8080 b:8080 c:8080
		a       tcp 10.96.0.10:80    = forward shop/web:http ClusterIP a:8080 b:8080 c:8080
		outside tcp 10.96.0.10:80    = forward shop/web:http ClusterIP a:8080 b:8080 c:8080 masq=not-local
		node    tcp 10.96.0.10:80    = forward shop/web:http ClusterIP a:8080 b:8080 c:8080 masq=not-local
		outside tcp 192.0.2.1:30080  = forward shop/web:http NodePort a:8080 b:8080 c:8080 masq=external
		pod     tcp 192.0.2.1:30080  = forward shop/web:http NodePort a:8080 b:8080 c:8080 masq=external
		b       tcp 192.0.2.1:30080  = forward shop/web:http NodePort a:8080 b:8080 c:8080 masq=external
		node    tcp 192.0.2.1:30080  = forward shop/web:http NodePort a:8080 b:8080 c:8080 masq=external
		node    tcp 127.0.0.1:30080  = forward shop/web:http NodePort a:8080 b:8080 c:8080 masq=external
		pod     udp 10.96.0.10:80    = pass
		pod     tcp 10.96.0.10:81    = pass
		pod     tcp 10.96.0.200:80   = pass
		pod     tcp 10.244.1.2:8080  = pass
		pod     udp 192.0.2.1:30080  = pass
		pod     tcp 10.96.0.10:30080 = pass

		pod     tcp 10.96.0.11:80    = forward shop/one ClusterIP c:8080
		c       tcp 10.96.0.11:80    = forward shop/one ClusterIP c:8080
		node    tcp 10.96.0.11:80    = forward shop/one ClusterIP c:8080 masq=not-local

		pod     tcp 10.96.0.12:80    = reject shop/none:http ClusterIP reason=no-endpoints
		outside tcp 10.96.0.12:80    = reject shop/none:http ClusterIP reason=no-endpoints
		node    tcp 10.96.0.12:80    = reject shop/none:http ClusterIP reason=no-endpoints
		pod     udp 10.96.0.12:80    = reject shop/none:udp ClusterIP reason=no-endpoints
		outside tcp 192.0.2.1:30081  = reject shop/none:http NodePort reason=no-endpoints
		pod     tcp 192.0.2.1:30081  = reject shop/none:http NodePort reason=no-endpoints
		node    tcp 192.0.2.1:30081  = reject shop/none:http NodePort reason=no-endpoints

		pod     udp 10.96.0.13:53    = forward shop/dns:dns ClusterIP a:5353 b:5353
		a       udp 10.96.0.13:53    = forward shop/dns:dns ClusterIP a:5353 b:5353
		pod     tcp 10.96.0.13:53    = forward shop/dns:dns-tcp ClusterIP c:8080
		outside udp 192.0.2.1:30053  = forward shop/dns:dns NodePort a:5353 b:5353 masq=external
		outside tcp 192.0.2.1:30053  = forward shop/dns:dns-tcp NodePort c:8080 masq=external

		pod     tcp 10.96.0.14:80    = forward shop/sticky:http ClusterIP a:8080 b:8080 affinity=3h
		outside tcp 192.0.2.1:30082  = forward shop/sticky:http NodePort a:8080 b:8080 affinity=3h masq=external
		pod     udp 10.96.0.14:80    = forward shop/stickyudp ClusterIP a:5353 b:5353 affinity=10s

		pod     tcp 10.96.0.15:80    = reject shop/unready ClusterIP reason=no-endpoints notready=1 terminating=1
		pod     tcp 10.96.0.16:80    = forward shop/mixed ClusterIP a:8080 notready=1 terminating=1
		pod     tcp 10.96.0.17:80    = forward shop/drain ClusterIP a:8080 c:8080 policy=terminating terminating=1
		pod     tcp 10.96.0.18:80    = forward shop/zoned ClusterIP a:8080 c:8080 otherzone=1
		pod     tcp 10.96.0.19:80    = forward shop/two:http ClusterIP a:8080
		pod     tcp 10.96.0.19:443   = forward shop/two:https ClusterIP b:8443
	`)
	return []Case{
		{"plain", Setup{Snapshot: table, ClusterCIDR: ClusterCIDR}, plain},
		{"no detector", Setup{Snapshot: table}, parse(`
			outside tcp 10.96.0.10:80   = forward shop/web:http ClusterIP a:8080 b:8080 c:8080
			node    tcp 10.96.0.11:80   = forward shop/one ClusterIP c:8080
			a       tcp 10.96.0.10:80   = forward shop/web:http ClusterIP a:8080 b:8080 c:8080
			outside tcp 192.0.2.1:30080 = forward shop/web:http NodePort a:8080 b:8080 c:8080 masq=external
		`)},
		{"masquerade all", Setup{Snapshot: table, ClusterCIDR: ClusterCIDR, MasqueradeAll: true}, parse(`
			pod     tcp 10.96.0.10:80   = forward shop/web:http ClusterIP a:8080 b:8080 c:8080 masq=all
			a       tcp 10.96.0.10:80   = forward shop/web:http ClusterIP a:8080 b:8080 c:8080 masq=all
			outside tcp 10.96.0.10:80   = forward shop/web:http ClusterIP a:8080 b:8080 c:8080 masq=all
			outside tcp 192.0.2.1:30080 = forward shop/web:http NodePort a:8080 b:8080 c:8080 masq=external
		`)},
		{"overlay", Setup{Snapshot: table, ClusterCIDR: ClusterCIDR, Overlay: proxy.Overlay{
			Out: map[netip.AddrPort]proxy.Outage{at("c:8080"): {Reason: "test"}}}}, parse(`
			pod     tcp 10.96.0.10:80   = forward shop/web:http ClusterIP a:8080 b:8080 overlay=1
			outside tcp 192.0.2.1:30080 = forward shop/web:http NodePort a:8080 b:8080 masq=external overlay=1
			pod     tcp 10.96.0.11:80   = forward shop/one ClusterIP c:8080
		`)},
		{"outside addresses", Setup{Snapshot: Services(`
			shop/ext    tcp 10.96.1.10:80 external=198.51.100.5 a:8080 c:8080
			shop/extno  tcp 10.96.1.11:80 external=198.51.100.6
			shop/lb     tcp 10.96.1.12:80 nodeport=30090 lb=198.51.100.7 range=203.0.113.0/24 a:8080
			shop/lbopen tcp 10.96.1.13:80 nodeport=30091 lb=198.51.100.8 range=0.0.0.0/0 a:8080
		`), ClusterCIDR: ClusterCIDR}, parse(`
			outside   tcp 198.51.100.5:80 = forward shop/ext ExternalIP a:8080 c:8080 masq=external
			pod       tcp 198.51.100.5:80 = forward shop/ext ExternalIP a:8080 c:8080 masq=external
			outside   tcp 198.51.100.6:80 = reject shop/extno ExternalIP reason=no-endpoints
			outside   tcp 198.51.100.7:80 = forward shop/lb LoadBalancer a:8080 masq=external
			elsewhere tcp 198.51.100.7:80 = drop shop/lb LoadBalancer reason=source-range
			elsewhere tcp 192.0.2.1:30090 = forward shop/lb NodePort a:8080 masq=external
			elsewhere tcp 198.51.100.8:80 = forward shop/lbopen LoadBalancer a:8080 masq=external
		`)},
		{"local policies", Setup{Snapshot: Services(`
			shop/here  tcp 10.96.2.10:80 policy=external nodeport=30070 a:8080 c:8080
			shop/there tcp 10.96.2.11:80 policy=external nodeport=30071 c:8080
			shop/near  tcp 10.96.2.12:80 policy=internal a:8080 c:8080
			shop/far   tcp 10.96.2.13:80 policy=internal c:8080
			shop/void  tcp 10.96.2.14:80 policy=internal nodeport=30072
		`), ClusterCIDR: ClusterCIDR}, parse(`
			outside tcp 192.0.2.1:30070 = forward shop/here NodePort a:8080 policy=Local notlocal=1
			pod     tcp 192.0.2.1:30070 = forward shop/here NodePort a:8080 c:8080
			node    tcp 192.0.2.1:30070 = forward shop/here NodePort a:8080 c:8080 masq=node
			pod     tcp 10.96.2.10:80   = forward shop/here ClusterIP a:8080 c:8080
			outside tcp 192.0.2.1:30071 = drop shop/there NodePort reason=no-local-endpoints policy=Local notlocal=1
			pod     tcp 192.0.2.1:30071 = forward shop/there NodePort c:8080
			pod     tcp 10.96.2.12:80   = forward shop/near ClusterIP a:8080 policy=Local notlocal=1
			outside tcp 10.96.2.12:80   = forward shop/near ClusterIP a:8080 policy=Local notlocal=1 masq=not-local
			pod     tcp 10.96.2.13:80   = drop shop/far ClusterIP reason=no-local-endpoints policy=Local notlocal=1
			pod     tcp 10.96.2.14:80   = reject shop/void ClusterIP reason=no-endpoints policy=Local
			outside tcp 192.0.2.1:30072 = reject shop/void NodePort reason=no-endpoints
		`)},
	}
}
