#!/usr/bin/env bash
# Makes an environment with packages of the workspace, editable, and what their tests need.
#
#   scripts/setup.sh [-e FOLDER] [-p "core wan"] [-v pinned|oldest|newest] [EXTRA]
#
# -e FOLDER    where: .venv if not said
# -p PACKAGES  which: all if not said, with the workspace's tools (the site, wheels, ruff)
# -v VERSIONS  of what they depend on: the root's exact pins, or the oldest or newest that their own ranges allow
# EXTRA        of tpuvid-core, for example "tpu"
#
# torch comes first, on its own: PyPI's Linux wheel of it brings gigabytes of CUDA that a tracer never uses. In order:
# the CPU wheel that pip's own configuration offers (uv doesn't read that configuration), PyTorch's CPU builds (uv knows
# where those are), and only where neither can be had, the default one.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv packages= versions=pinned
while getopts e:p:v: option; do
    case $option in
        e) venv=$OPTARG ;;
        p) packages=$OPTARG ;;
        v) versions=$OPTARG ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
extras=${1:+[$1]}

python=${PYTHON:-python3}
command -v uv >/dev/null || "$python" -m pip install --quiet uv
uv=$(command -v uv || "$python" -c 'import sysconfig; print(sysconfig.get_path("scripts") + "/uv")')

export VIRTUAL_ENV=$PWD/$venv
[ -x "$venv/bin/python" ] || { "$uv" venv --quiet --python "$python" "$venv" && "$uv" pip install --quiet pip; }

wanted=$(sed -n 's/^ *"\(torch>=[^"]*\)",/\1/p' packages/core/pyproject.toml)
case $versions in
    pinned) wanted=$(sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml) resolve=() ;;
    oldest) resolve=(--no-config --resolution lowest-direct) ;;
    newest) resolve=(--no-config --upgrade) ;;
    *) echo "setup: -v $versions: give pinned, oldest or newest" >&2 && exit 2 ;;
esac

installed() { # whether a torch that fits is there
    "$venv/bin/python" -c "import sys; from importlib.metadata import version; from pip._vendor.packaging.requirements import Requirement
sys.exit(version('torch') not in Requirement('$wanted').specifier)" 2>/dev/null
}
offered_by_pip() { # the address of the CPU wheel among what pip knows that fits: the newest, or the oldest
    local build
    build=$("$venv/bin/python" -m pip index versions torch 2>/dev/null | "$venv/bin/python" -c "import re, sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version
builds = {Version(text) for text in re.findall(r'[0-9][^ ,)]*[+]cpu', sys.stdin.read())}
print({'oldest': min}.get('$versions', max)(build for build in builds if build in Requirement('$wanted').specifier))" 2>/dev/null) &&
        "$venv/bin/python" -m pip install --dry-run --quiet --no-deps --ignore-installed --only-binary :all: --report - "torch==$build" 2>/dev/null |
        "$venv/bin/python" -c "import json, sys; print(json.load(sys.stdin)['install'][0]['download_info']['url'])"
}
if ! installed; then
    if wheel=$(offered_by_pip); then
        "$uv" pip install --quiet "torch @ $wheel"
    elif ! "$uv" pip install --quiet "${resolve[@]}" --torch-backend=cpu "$wanted"; then
        echo "setup: no CPU build of torch can be had here; installing the default one" >&2
        "$uv" pip install --quiet "${resolve[@]}" "$wanted"
    fi
fi
torch=$("$venv/bin/python" -c "from importlib.metadata import version; print(version('torch'))")
hold=$(mktemp) && trap 'rm "$hold"' EXIT && echo "torch==$torch" >"$hold"

members= groups=
for package in ${packages:-core wan cogvideox hunyuan tiny}; do
    members+=" -e packages/$package"
    groups+=" --group packages/$package/pyproject.toml:test"
done
[ -n "$packages" ] || groups+=" --group dev"
# shellcheck disable=SC2086  # lists of words
"$uv" pip install --quiet "${resolve[@]}" --constraint "$hold" $members ${extras:+-e "packages/core$extras"}
# Tests' own tools may not move what they are to test.
"$uv" pip freeze --quiet --exclude-editable | grep -v '@' >>"$hold"
# shellcheck disable=SC2086
"$uv" pip install --quiet ${resolve:+--no-config} --constraint "$hold" $groups
