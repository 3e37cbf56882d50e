# One line per target; what needs more is a script in scripts/.
#
#   MODE=iptables         the mode of the demo's proxy, and of the stack's
#   CHECK=1               check the stack, and exit
#   OUTAGE=1m             with it, also without a collector for so long, under load
#   TESTFLAGS=-count=1    what go test gets; the kernel and the user are no input
#                         its cache knows of, so results are not cached
#   PKGS=./trace/...      the packages to test
#   RUN=SideBySide        the tests to run, of the end-to-end ones too
#   FUZZTIME=10s          how long each fuzz target runs
#   BENCH_SHORT=1         benchmarks run once, to see that they work
#   PREFIX, DESTDIR       where install puts the binary

.DEFAULT_GOAL := help
.PHONY: help deps build demo test e2e stack lint bench bench-sync bench-ipvs bench-sets bench-trace bench-userspace fuzz generate install clean

# Every command sees the tools that deps set up; cgo is never used. -trimpath
# makes the build cache independent of where the clone and the modules lie.
ENV     := . scripts/env.sh &&
VERSION ?= $(shell git -c safe.directory='*' describe --tags --always --dirty 2>/dev/null || echo dev)
PREFIX  ?= /usr/local
FUZZTIME ?= 10s
TESTFLAGS ?= -count=1
PKGS ?= ./...
export CGO_ENABLED := 0
export GOFLAGS := -trimpath -buildvcs=false $(GOFLAGS)
export BENCH_SHORT FUZZTIME

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

deps: ## set up what is missing outside Go (iptables, ipset, nftables, user-mode-linux, Prometheus, conntrackd, ulogd); silent when nothing is
	@scripts/deps.sh

build: ## bin/kptrace
	@$(ENV) go build -ldflags '-s -w -X main.version=$(VERSION)' -o bin/kptrace ./cmd/kptrace

demo: deps build ## a cluster in namespaces on this machine with live traffic, about 20 s
	@$(ENV) bin/kptrace lab run --for 15s $(if $(MODE),--mode $(MODE)) $(if $(filter ipvs,$(MODE)),--server-health)

test: deps ## vet, every test (a missing kernel feature fails), and the build for other systems
	@$(ENV) go vet ./... && scripts/test.sh -p 1 -timeout 20m $(TESTFLAGS) $(if $(RUN),-run '$(RUN)') $(PKGS) && GOOS=darwin GOARCH=arm64 go build -o /dev/null ./cmd/kptrace

e2e: deps build ## against a real API server and upstream kube-proxy, built once (some minutes) and kept
	@$(ENV) KPTRACE_CONTROLPLANE=$$(scripts/controlplane.sh) && export KPTRACE_CONTROLPLANE && go test -tags e2e -v -timeout 9m $(TESTFLAGS) $(if $(RUN),-run '$(RUN)') ./test/e2e/...

stack: deps build ## a lab with Prometheus, OpenTelemetry Collector and Jaeger (built once, some minutes); CHECK=1 checks what they show, and exits
	@$(ENV) KPTRACE_TRACING=$$(scripts/tracing.sh) && export KPTRACE_TRACING && bin/kptrace lab stack $(if $(MODE),--mode $(MODE)) $(if $(CHECK),--check $(if $(OUTAGE),--outage '$(OUTAGE)'))

lint: ## golangci-lint, pinned; the first run builds it
	@scripts/lint.sh

bench: deps ## every benchmark, one package after the other
	@$(ENV) go test -run '^$$' -bench . -benchmem $(if $(BENCH_SHORT),-benchtime 1x) -timeout 20m -p 1 ./...

bench-sync: deps build ## syncs at 1,000 and 5,000 Services beside their floor and upstream, as root, about 10 min on an idle machine; QUICK=1 sees that it works
	@$(ENV) KPTRACE_CONTROLPLANE=$$(scripts/controlplane.sh) && export KPTRACE_CONTROLPLANE && go run ./test/benchsync $(if $(QUICK),-quick) $(if $(LOCK),-lock '$(LOCK)')

bench-ipvs: deps build ## mode ipvs beside upstream's at 50, 200 and 1,000 Services, in a guest (user-mode Linux), about 11 min on an idle machine; QUICK=1 sees that it works
	@$(ENV) KPTRACE_CONTROLPLANE=$$(scripts/controlplane.sh) && export KPTRACE_CONTROLPLANE && go run ./test/benchsync -ipvs -limit 10m $(if $(QUICK),-quick)

bench-userspace: deps build ## 5,000 relayed connections, throughput beside direct, connections per second beside iptables mode, about 2 min
	@$(ENV) go test -tags benchuserspace -count=1 -v -run 'TestFiveThousandConnections|TestHoldHelper' -bench Throughput -benchtime 7x ./proxy/userspace | awk '/^(===|--- PASS|PASS)/ {next} /^FAIL/ {bad = 1} {print} END {exit bad}'
	@$(ENV) bin/kptrace lab compare --modes userspace,iptables

bench-trace: deps ## 4,000 connections traced rule by rule, beside what Debian has for that, about 1 min
	@scripts/deps.sh tracers && $(ENV) go test -tags benchtrace -count=1 -run 'TestBenchTrace$$' -v ./node | sed -n 's/^ *benchtrace[^ ]*: //p; /^---* FAIL/p'

bench-sets: deps ## many source ranges as plain rules and as an ipset, many endpoints as rules and as a map, as root, about 2 min; QUICK=1 sees that it works
	@$(ENV) go run ./test/benchsets $(if $(QUICK),-quick)

fuzz: ## every fuzz target for FUZZTIME
	@scripts/fuzz.sh

generate: ## the code made from .proto files, the dashboards, docs/metrics.md
	@scripts/generate.sh

install: build ## bin/kptrace and kubectl-kptrace into PREFIX/bin
	@install -D -m 755 bin/kptrace $(DESTDIR)$(PREFIX)/bin/kptrace && ln -sf kptrace $(DESTDIR)$(PREFIX)/bin/kubectl-kptrace

clean: ## remove what build made
	@rm -rf bin
