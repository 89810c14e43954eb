#!/usr/bin/env bash
# The proof that a clone is enough: `make reproduce` and `make test` in an empty environment, or whatever command it is called with
# (`tests/fresh.sh .ci/run`). Takes an hour and more.
#
# What is committed at HEAD is cloned into an empty folder; home, caches and configuration are empty; PATH holds a folder with
# python3.11 and the system's own commands, and no variable of the caller's survives but those that say where packages come from.
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d "${TMPDIR:-/tmp}/vlsafe-fresh.XXXXXX")
trap 'test -n "${KEEP:-}" || rm -rf "$place"' EXIT
python=$(command -v python3.11) || { echo "fresh.sh needs python3.11 on the PATH" >&2; exit 2; }
mkdir -p "$place"/{home,bin,tmp}
ln -s "$("$python" -c 'import sys; print(sys.executable)')" "$place/bin/python3.11"
git clone --quiet --no-hardlinks "$project" "$place/clone"
allowed=(HOME="$place/home" XDG_CACHE_HOME="$place/home/.cache" TMPDIR="$place/tmp" PATH="$place/bin:/usr/bin:/bin" LANG=C.UTF-8)
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST PIP_CONFIG_FILE SSL_CERT_FILE https_proxy http_proxy no_proxy; do
    test -z "${!name:-}" || allowed+=("$name=${!name}")
done
cd "$place/clone"
fresh() {
    local started=$SECONDS
    env -i "${allowed[@]}" "$@"
    echo "fresh: $* took $((SECONDS - started)) s"
}
fresh python3.11 -c 'import sys; assert sys.version_info[:2] == (3, 11); sys.exit("torch" in sys.modules)'
test -z "$(git status --porcelain)" -a ! -e runs -a ! -e .venv
if test $# -gt 0; then
    fresh "$@"
else
    for target in ${TARGETS:-setup reproduce test reproduce}; do # reproduced again: nothing is left to do
        fresh make "$target"
    done
fi
test -z "$(git status --porcelain)" || { git status --short; echo "fresh.sh: the run changed what is committed" >&2; exit 1; }
