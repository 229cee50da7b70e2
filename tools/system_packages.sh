#!/usr/bin/env bash
# Debian packages that some tests want: etcd, RDMA's library for Mooncake, a fake clock, emulated processors,
# objdump, a compiler with sanitisers. Best effort: where one is missing, its tests are skipped and say so.
set -uo pipefail

packages=(etcd-server libibverbs1 faketime qemu-user binutils g++)

# Nothing may leave this script as a failure: a machine without these packages runs all the other tests.
without() {
    echo "== system packages: $1; tests that want ${missing[*]:-them} are skipped"
    exit 0
}

installed() {
    [[ $(dpkg-query -W -f='${db:Status-Abbrev}' "$1" 2>/dev/null) == ii* ]]
}

install() {
    DEBIAN_FRONTEND=noninteractive timeout 300 "$@" install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

missing=()
command -v dpkg-query >/dev/null && command -v apt-get >/dev/null || without "this system has no apt"
for package in "${packages[@]}"; do
    installed "$package" || missing+=("$package")
done
((${#missing[@]})) || { echo "== system packages: all there"; exit 0; }

as_root=()
if ((EUID != 0)); then
    command -v sudo >/dev/null && sudo -n true 2>/dev/null || without "not root, and no sudo without a password"
    as_root=(sudo -n)
fi
echo "== system packages: installing ${missing[*]}"
# The lists of a fresh image may be old or empty; where they are not, an update is a waste of time.
install "${as_root[@]}" apt-get ||
    { timeout 120 "${as_root[@]}" apt-get update -qq >/dev/null && install "${as_root[@]}" apt-get; } ||
    without "apt-get failed"
