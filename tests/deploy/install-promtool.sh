#!/usr/bin/env bash
# Puts promtool into a folder unless it is there or on PATH: tests/deploy/install-promtool.sh FOLDER
#
# It comes out of Debian's package prometheus, of which nothing is installed. Without it the tests of the alerts are skipped.
set -euo pipefail

target=$(realpath "$1")/promtool
if command -v promtool > /dev/null || [ -x "$target" ]; then
  exit
fi

folder=$(mktemp -d)
trap 'rm -r "$folder"; [ -x "$target" ] || echo "promtool not found: the tests of the alerts are skipped"; exit 0' EXIT
cd "$folder"
if [ "$(id -u)" = 0 ]; then apt-get update -qq; fi
apt-get download -qq prometheus
dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xO ./usr/bin/promtool > promtool
chmod +x promtool
mv promtool "$target"
