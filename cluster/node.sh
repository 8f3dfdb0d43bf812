#!/usr/bin/env bash
# Makes a node ready for studies. Ray's launcher runs it on every node, once the files have come:
#
#   bash cluster/node.sh            # all of it: shells, secrets, the program, its Python
#   bash cluster/node.sh secrets    # only put secrets where the libraries look for them
#   bash cluster/node.sh worker     # a worker's rest: it need not know how to open database and tracker
#
# It may be run again at any time, and by several nodes that share a home folder.
set -euo pipefail
umask 077
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
secrets=~/.hdml_secrets
[ -d "$secrets" ] || secrets=$root/cluster/secrets
exec 9> ~/.hdml_setup.lock
flock 9

# Every shell reads the environment; last, so that nothing else puts another Python before ours.
shells() {
    local line='. ~/.hdml_environment'
    for file in ~/.profile ~/.bashrc; do
        grep -qxF "$line" "$file" 2>/dev/null || printf '\n%s\n' "$line" >> "$file"
    done
    # shellcheck disable=SC1090
    . ~/.hdml_environment
}

# A secret in a file of its own that no one else may read; in containers it may first lie there as someone else's.
secret() {
    [ -e "$secrets/$1" ] || return 0
    mkdir -p "$(dirname "$2")"
    if [ -r "$secrets/$1" ]; then cat "$secrets/$1" > "$2.part"; else sudo cat "$secrets/$1" > "$2.part"; fi
    chmod 600 "$2.part"
    mv "$2.part" "$2"
}

place_secrets() {
    secret ray_auth_token ~/.ray/auth_token
    secret pgpass ~/.pgpass
    secret mlflow_credentials ~/.mlflow/credentials
}

# A worker whose home folder is the head's as well must leave them to it.
forget_secrets() {
    # One that was a head before is none now.
    [ "$(cat ~/.hdml_head 2>/dev/null)" != "$(hostname)" ] || rm -f ~/.hdml_head
    [ -e ~/.hdml_head ] || rm -f ~/.pgpass ~/.mlflow/credentials
    [ -e ~/.hdml_head ] || sudo -n rm -f "$secrets/pgpass" "$secrets/mlflow_credentials" 2>/dev/null ||
        rm -f "$secrets/pgpass" "$secrets/mlflow_credentials"
}

# What of the program did not come as files comes from .git: so its commit is known, and whether files differ from it.
program() {
    command -v git > /dev/null || { echo "git not found on $(hostname): install it, or use an image that has it" >&2; exit 1; }
    git config --global --get-all safe.directory | grep -qxF "$root" || git config --global --add safe.directory "$root"
    git -C "$root" ls-files --deleted -z | xargs -0 --no-run-if-empty git -C "$root" checkout --quiet --
}

# The Python that comes first on PATH, or one made at ~/hdml-venv where the environment names that; what studies need
# is installed where the versions that constraints.txt names are not there.
packages() {
    case $PATH in
    ~/hdml-venv/bin:*) [ -x ~/hdml-venv/bin/python ] || python3 -m venv ~/hdml-venv ;;
    esac
    python "$root/cluster/requirements.py" && return
    local wanted
    wanted=$(mktemp)
    python "$root/cluster/requirements.py" --list > "$wanted"
    python -m pip install --quiet uv || echo "no uv to be had: pip installs instead, slower"
    if python -m uv --version > /dev/null 2>&1; then
        python -m uv pip install --quiet --python "$(command -v python)" --compile-bytecode \
            --constraint "$root/constraints.txt" --requirement "$wanted"
    else
        python -m pip install --quiet --compile --constraint "$root/constraints.txt" --requirement "$wanted"
    fi
    python "$root/cluster/requirements.py"
}

case ${1:-all} in
all)
    shells
    place_secrets
    program
    packages
    mkdir -p "$HDML_DATA" "$HDML_OUT"
    ;;
secrets) place_secrets ;;
worker) forget_secrets ;;
*)
    echo "usage: bash cluster/node.sh [secrets|worker]" >&2
    exit 2
    ;;
esac
