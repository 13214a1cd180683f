#!/bin/sh
# prometheus.sh FOLDER: put `prometheus` and `promtool` into FOLDER: links to those on PATH, else Debian's package, unpacked
# without root. The pinned version is checked by its hash. Once Debian has replaced it, the one in the index is taken, which apt
# verifies by the archive's signature.
set -eu
VERSION=2.42.0+ds-5+deb12u1
SHA256=81d59a24fce84f7fbe97a45a4f2914b6a5881b5cd1db2a6a0e129e515e1a5f55

folder=$(mkdir -p "$1" && cd "$1" && pwd)
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    ln -sf "$(command -v prometheus)" "$(command -v promtool)" "$folder"
    exit
fi
if ! command -v apt-get >/dev/null; then
    echo "no prometheus and promtool on PATH, and no apt-get to take them from: install Prometheus 2.42 or newer" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-cache show prometheus >/dev/null 2>&1 || apt-get -qq update
if apt-get -qq download "prometheus=$VERSION" 2>/dev/null && [ "$(dpkg --print-architecture)" = amd64 ]; then
    echo "$SHA256  $(ls ./*.deb)" | sha256sum --check --quiet
else
    rm -f ./*.deb
    apt-get -qq download prometheus 2>/dev/null || { apt-get -qq update && apt-get -qq download prometheus; }
    echo "Debian has another Prometheus than $VERSION: $(ls ./*.deb)" >&2
fi
dpkg -x ./*.deb unpacked
cp unpacked/usr/bin/prometheus unpacked/usr/bin/promtool "$folder"
