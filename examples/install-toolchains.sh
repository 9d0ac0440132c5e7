#!/usr/bin/env bash
# Installs what generates and builds the examples on Debian 12, as root: Go, Java, C++, C#'s generator; the browser that the
# tests of gRPC-Web drive; and the proxies that are put in front of Envoy, whose services are not started.
# TypeScript's comes with `npm ci` in examples/typescript, Python's with `make client-stubs`.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  protobuf-compiler
  golang-go protoc-gen-go protoc-gen-go-grpc golang-github-golang-protobuf-1-5-dev golang-google-grpc-dev
  default-jdk-headless protobuf-compiler-grpc-java-plugin libgrpc-java libprotobuf-java
  libnetty-java libperfmark-java libgeronimo-annotation-1.3-spec-java
  g++ cmake pkg-config protobuf-compiler-grpc libgrpc++-dev libprotobuf-dev libprotoc-dev
  chromium
  nginx-light haproxy apache2-utils
)

if ! dpkg-query --show "${packages[@]}" > /dev/null 2>&1; then
  apt-get update --quiet
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${packages[@]}"
fi

mkdir -p build/bin
g++ -O1 examples/csharp/grpc_csharp_plugin.cpp -o build/bin/grpc_csharp_plugin -lgrpc_plugin_support -lprotoc -lprotobuf
