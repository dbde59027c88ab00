#!/bin/sh
# Unpack the headers of ONNX Runtime from Debian 13 into DIR, on any Debian that apt knows a
# mirror of, without installing anything: sh fetch_headers.sh DIR. Then ORT_INCLUDE_DIR=DIR/usr/include/onnxruntime.
set -eu
mkdir -p "$1/apt/lists/partial" "$1/apt/cache/archives/partial"
cd "$1"
here=$(pwd)
key=/usr/share/keyrings/debian-archive-keyring.gpg
site=$(apt-get indextargets --format '$(SITE)' 'Origin: Debian' | grep -v security | head -n 1)
[ -n "$site" ] || { echo "apt knows no mirror of Debian: add one to its sources" >&2; exit 2; }
echo "deb [signed-by=$key] $site trixie main" > apt/sources.list
options="-q -o Dir::Etc::SourceList=$here/apt/sources.list -o Dir::Etc::SourceParts=/dev/null
  -o Dir::State::Lists=$here/apt/lists -o Dir::Cache=$here/apt/cache"
apt-get $options update
apt-get $options download libonnxruntime-dev
dpkg-deb -x libonnxruntime-dev_*.deb .
rm -r apt libonnxruntime-dev_*.deb
