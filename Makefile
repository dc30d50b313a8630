# Every target does its own set-up. Comments behind ## are the help that plain `make` prints.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The working copy may belong to another user than the one who builds: no version-control stamps.
export GOFLAGS := $(strip $(filter-out -buildvcs=%,$(GOFLAGS)) -buildvcs=false)
export PATH := $(CURDIR)/bin:$(PATH)
FUZZTIME ?= 20s
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cradlestack
TOOL := go tool -modfile=tools/go.mod

MODULE := github.com/cradlestack/cradlestack
# The programs' folders. A program appears here with its first working version.
COMMANDS := ./driver-cradle/kcradle ./bali
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo development)

.PHONY: help
help: ## list the targets (this)
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## compile the programs into bin/ (needs no root)
	@mkdir -p bin/boot
	@CGO_ENABLED=0 go build -trimpath -ldflags='-X main.version=$(VERSION)' -o bin/ $(COMMANDS)
	@CGO_ENABLED=0 go build -trimpath -ldflags='-X main.version=$(VERSION)' -o bin/cradle-csi ./csi-plugin
	@CGO_ENABLED=0 go build -trimpath -ldflags='-X main.version=$(VERSION)' -o bin/cradle-filer ./csi-plugin/filer
	@cd tools/versitygw && GOFLAGS='-mod=readonly -buildvcs=false' CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o $(CURDIR)/bin/cradle-s3 ./cradle-s3
	@CGO_ENABLED=0 go build -trimpath -ldflags='-X main.version=$(VERSION)' -o bin/cradle-dockerapi ./dockerapi
	@CGO_ENABLED=0 go build -trimpath -ldflags='-s -w -X main.version=$(VERSION)' -o bin/terraform-provider-cradle ./terraform-provider
	@CGO_ENABLED=0 go build -trimpath -ldflags='-s -w -X $(MODULE)/driver-cradle/driver.Version=$(VERSION)' -o bin/nomad-driver-cradle ./driver-cradle
	@CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o bin/boot/cradle-init ./driver-cradle/guest/cradle-init

# Where Terraform looks for providers by itself (Terraform's documentation, "Implied Local Mirror Directories").
PROVIDERS ?= $(HOME)/.terraform.d/plugins
PROVIDER_VERSION := $(shell git describe --tags --abbrev=0 2>/dev/null | sed -n 's/^v\([0-9].*\)/\1/p' | grep . || echo 0.0.1)

.PHONY: install-provider
install-provider: build ## put the Terraform provider where terraform init finds it (docs/terraform.md; needs no root)
	@at="$(PROVIDERS)/registry.terraform.io/cradlestack/cradle/$(PROVIDER_VERSION)/$$(go env GOOS)_$$(go env GOARCH)/terraform-provider-cradle_v$(PROVIDER_VERSION)"; \
	  other=; if [ -e "$$at" ] && ! cmp -s bin/terraform-provider-cradle "$$at"; then other=1; fi; \
	  install -D bin/terraform-provider-cradle "$$at"; \
	  echo "installed $$at"; \
	  if [ -n "$$other" ]; then echo "another build of version $(PROVIDER_VERSION) was there: where terraform init has been run with that, rm .terraform.lock.hcl and run it again"; fi

.PHONY: setup
setup: ## install what the distribution's packages provide (root; nothing to do the second time)
	@tools/setup.sh

.PHONY: kernel
kernel: setup ## build the guest kernel of boot package default (5 minutes the first time, then cached)
	@tools/kernel/build.sh >/dev/null

.PHONY: boot boot-default boot-stock
boot: boot-default boot-stock ## assemble the boot packages bin/boot/default (own kernel) and bin/boot/stock (distribution's)
boot-default: kernel build
	@bin/kcradle boot build --variant default --kernel "$$(tools/kernel/build.sh)" --agent bin/boot/cradle-init bin/boot/default
boot-stock: build
	@tools/setup.sh --demo
	@stock=$$(tools/kernel/stock.sh); bin/kcradle boot build --variant stock --kernel "$$stock/vmlinuz" --modules "$$stock/modules" --agent bin/boot/cradle-init bin/boot/stock

.PHONY: images
images: setup ## make the example images from the distribution's packages (examples/images)
	@examples/images/build.sh all

.PHONY: bootstrap-images
bootstrap-images: boot-default ## make the signed images of a host's services in bin/bootstrap (examples/bootstrap)
	@examples/bootstrap/images.sh bin/bootstrap

.PHONY: check
check: ## quick tests: no root, no VM
	go test ./...

.PHONY: test
test: boot images ## all tests, with real VMs, dockerd and clients (root)
	go test -tags vm -count 1 -p 2 -timeout 45m ./...

.PHONY: soak
soak: boot images ## the long drills (root, hours)
	go test -tags 'vm soak' -p 1 -count 1 -timeout 6h -run Soak -v ./...

.PHONY: lint
lint: ## go vet, golangci-lint, gofumpt, shell syntax
	@find .ci/run . -name .git -prune -o \( -name '*.sh' -o -path .ci/run \) -type f -print0 | xargs -0 -n 1 bash -n
	$(TOOL) golangci-lint run ./...
	$(TOOL) golangci-lint fmt --diff ./...

.PHONY: fmt
fmt: ## format the Go sources
	$(TOOL) golangci-lint fmt ./...

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME (20s)
	@tools/fuzz.sh $(FUZZTIME)

.PHONY: bench
bench: boot images ## measure what the README promises and print the table (docs/performance.md)
	@go run ./test/bench -write docs/performance.md

# The boot package that can be had without building a kernel first.
.PHONY: boot-quick
boot-quick: build
	@tools/setup.sh --demo
	@if tools/kernel/build.sh --cached >/dev/null 2>&1; then \
	  $(MAKE) --no-print-directory boot-default; \
	else \
	  echo "the own guest kernel is not built yet (make kernel takes 5 minutes): using the distribution's"; \
	  $(MAKE) --no-print-directory boot-stock; \
	fi

.PHONY: demo
demo: boot-quick ## mariadb, nginx and redis in microVMs, used by real clients; then jobs and docker on a stack of its own (root)
	@examples/images/build.sh busybox mariadb nginx redis
	@go run ./test/demo

.PHONY: up
up: boot-quick ## start one node of the stack in the background: Consul, Nomad with pods and volumes, docker's API (root); print how to use it
	@examples/images/build.sh busybox mariadb nginx redis
	@go run ./examples/stack up

.PHONY: down
down: ## end it, with every pod; its data stays until make clean
	@go run ./examples/stack down

.PHONY: env
env: ## print what makes nomad, consul and docker use it: eval "$(make env)"
	@go run ./examples/stack env

.PHONY: clean
clean: ## end the stack and remove its data, bin/, and what is cached outside the tree, but for the built kernel
	@if [ -d "$${CRADLESTACK_DIR:-/var/lib/cradlestack}" ]; then go run ./examples/stack clean; fi
	rm -rf bin
	@if [ -d "$(CACHE)" ]; then find "$(CACHE)" -mindepth 1 -maxdepth 1 ! -name kernel -exec rm -rf {} +; fi
