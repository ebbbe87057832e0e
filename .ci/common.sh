# What setup and install have in common; to be sourced.

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# How to become root: nothing, "sudo", or failure. A sudo that would ask where nobody can answer counts as none.
root_command() {
    [[ $EUID -eq 0 ]] && return
    command -v sudo >/dev/null && { [[ -t 0 ]] || sudo -n true 2>/dev/null; } && echo sudo
}

# Runs a command silently; its words are shown only if it fails.
quietly() {
    local words
    words=$("$@" 2>&1 </dev/null) || { local code=$?; printf '%s\n' "$words" >&2; return "$code"; }
}

# missing_packages PACKAGE…
missing_packages() {
    local installed
    installed=" $(dpkg-query -W -f '${db:Status-Status}:${Package} ' "$@" 2>/dev/null || true)"
    local package
    for package; do
        [[ $installed == *" installed:$package "* ]] || printf '%s ' "$package"
    done
}

# install_packages PACKAGE…
install_packages() {
    local missing
    if ! command -v dpkg-query >/dev/null; then
        say "not a Debian: the equivalents of these packages have to be there: $*"
        return
    fi
    read -ra missing <<<"$(missing_packages "$@")"
    [[ ${#missing[@]} -gt 0 ]] || return 0

    local sudo
    sudo=$(root_command) || die "Debian packages are missing and neither root nor sudo is there to install them;" \
        "as root: apt-get install --no-install-recommends ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    local install=($sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300
        -o Dpkg::Use-Pty=0 --no-install-recommends install "${missing[@]}")
    # Package lists are fetched only where the present ones do not serve: absent, or older than the mirror.
    if ! quietly "${install[@]}" 2>/dev/null; then
        say "fetching the package lists"
        quietly $sudo apt-get -qq -o DPkg::Lock::Timeout=300 update || die "apt-get update failed"
        quietly "${install[@]}" || die "apt-get install failed"
    fi
}

# require_python PROGRAM HINT
require_python() {
    command -v "$1" >/dev/null || die "$1 is not there; hvmgr needs Python 3.11 or later: $2"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "hvmgr needs Python 3.11 or later, $1 is $("$1" --version 2>&1 || true); name one: $2"
}
