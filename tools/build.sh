#!/usr/bin/env bash
# build.sh nomad|consul|compose|csi-sanity|buildx|buildkitd|versitygw|tfplugindocs: print the path of that program; moby|testcontainers|compose-e2e: of a
# folder that has programs beside it.
#
# The one on PATH where it has the version that tools/NAME/go.mod names (or newer, with the same major version), else one
# built from the Go module proxy, cached under ${XDG_CACHE_HOME:-~/.cache}/cradlestack/tools/NAME-KEY, where KEY hashes the
# module files, how it is compiled and the compiler. Nomad and Consul take 3 to 4 minutes each on two idle cores.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
die() { echo "build.sh: $*" >&2; exit 1; }
name=${1:-}
binary=$name folder=$name cgo=0 flags=(-trimpath) tests=()
case $name in
  # cgo is what Nomad's exec driver needs; without the tag "release" mock_driver stays in.
  nomad) package=github.com/hashicorp/nomad module=$package cgo=1 flags+=(-tags 'codegen_generated hashicorpmetrics' -ldflags '-s -w') ;;
  consul) package=github.com/hashicorp/consul module=$package flags+=(-ldflags '-s -w') ;;
  compose)
    module=github.com/docker/compose/v5 package=$module/cmd binary=docker-compose
    flags+=(-ldflags "-s -w -X $module/internal.Version=$(awk -v m="$module" '$1 == m { print $2 } $2 == m { print $3 }' "$here/compose/go.mod" | grep -m1 ^v)")
    ;;
  buildx) module=github.com/docker/buildx package=$module/cmd/buildx flags+=(-ldflags "-s -w") ;;
  # rootful, with the runc on PATH
  buildkitd) module=github.com/moby/buildkit package=$module/cmd/buildkitd flags+=(-ldflags "-s -w") ;;
  csi-sanity) module=github.com/kubernetes-csi/csi-test/v5 package=$module/cmd/csi-sanity ;;
  versitygw) module=github.com/versity/versitygw package=$module/cmd/versitygw flags+=(-ldflags "-s -w") ;;
  tfplugindocs) module=github.com/hashicorp/terraform-plugin-docs package=$module/cmd/tfplugindocs flags+=(-ldflags "-s -w") ;;
  # Tests of docker's makers: PACKAGE.test for each of those packages, and source, the folder with what they read.
  moby)
    module=github.com/docker/docker source=integration tests=(container network system volume)
    # The module has no go.mod, for which the compiler would take the language of go1.16.
    flags+=(-ldflags '-s -w' -gcflags "$module/...=-lang=go1.24")
    ;;
  testcontainers) module=github.com/testcontainers/testcontainers-go source=. tests=(.) flags+=(-ldflags '-s -w') ;;
  compose-e2e) module=github.com/docker/compose/v5 folder=compose source=pkg tests=(e2e) flags+=(-tags e2e -ldflags '-s -w') ;;
  *) die "usage: build.sh nomad|consul|compose|csi-sanity|buildx|buildkitd|versitygw|tfplugindocs|moby|testcontainers|compose-e2e" ;;
esac
want=$(awk -v m="$module" '$1 == m { print $2 } $2 == m { print $3 }' "$here/$folder/go.mod" | grep -m1 '^v')

# version_of PROGRAM: what it says of itself, as v1.2.3.
version_of() {
  case $name in
    compose) "$1" version --short 2>/dev/null ;;
    *) "$1" version 2>/dev/null ;;
  esac | grep -oEm1 '[0-9]+\.[0-9]+\.[0-9]+' | sed 's/^/v/'
}
if found=$(command -v "$binary") && have=$(version_of "$found") && [ "${have%%.*}" = "${want%%.*}" ] &&
  [ "$(printf '%s\n' "$want" "$have" | sort -V | head -n 1)" = "$want" ]; then
  echo "$found"
  exit 0
fi

if [ "${#tests[@]}" -gt 0 ]; then binary=source package="$source ${tests[*]}"; fi
key=$( (cat "$here/$folder/go.mod" "$here/$folder/go.sum"; echo "$package $cgo ${flags[*]}"; go version) | sha256sum | cut -c1-16)
out=${XDG_CACHE_HOME:-$HOME/.cache}/cradlestack/tools/$name-$key
if [ -x "$out/$binary" ]; then echo "$out/$binary"; exit 0; fi
mkdir -p "$out"
exec 9>"$out.lock"
flock 9
if [ -x "$out/$binary" ]; then echo "$out/$binary"; exit 0; fi
echo "build.sh: compiling $name $want" >&2
# -mod=readonly: the module files are exact; go mod tidy would take other versions.
cd "$here/$folder"
export CGO_ENABLED=$cgo GOFLAGS='-mod=readonly -buildvcs=false'
if [ "${#tests[@]}" = 0 ]; then
  go build "${flags[@]}" -o "$out/$binary.part" "$package" >&2
else
  for test in "${tests[@]}"; do go test -c -vet=off "${flags[@]}" -o "$out/${test//\//-}.test" "$(realpath -ms "/$module/$source/$test" | cut -c2-)" >&2; done
  ln -sfn "$(go list -m -f '{{.Dir}}' "$module")/$source" "$out/$binary.part"
fi
mv -T "$out/$binary.part" "$out/$binary"
echo "$out/$binary"
