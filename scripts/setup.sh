#!/usr/bin/env bash
# Makes .venv with the workspace, editable, and its exact pins. Arguments: extras, for example "tpu".
#
# torch comes first, on its own: PyPI's Linux wheel of it brings gigabytes of CUDA that a tracer never uses. In order:
# the CPU wheel that pip's own configuration offers (uv doesn't read that configuration), PyTorch's CPU builds (uv knows
# where those are), and only where neither can be had, the default one.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
command -v uv >/dev/null || "$python" -m pip install --quiet uv
uv=$(command -v uv || "$python" -c 'import sysconfig; print(sysconfig.get_path("scripts") + "/uv")')

[ -x .venv/bin/python ] || "$uv" venv --quiet --seed --python "$python" .venv
export VIRTUAL_ENV=$PWD/.venv

torch=$(sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml)
installed() { .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null; }
offered_by_pip() { # the address of a CPU wheel among what pip would choose, without fetching it
    .venv/bin/python -m pip install --dry-run --quiet --no-deps --ignore-installed --only-binary :all: --report - "$torch" 2>/dev/null |
        .venv/bin/python -c "import json, sys
item = json.load(sys.stdin)['install'][0]
print(item['download_info']['url']) if item['metadata']['version'].endswith('+cpu') else sys.exit(1)"
}
if ! installed; then
    if wheel=$(offered_by_pip); then
        "$uv" pip install --quiet "torch @ $wheel"
    elif ! "$uv" pip install --quiet --torch-backend=cpu "$torch"; then
        echo "setup: no CPU build of torch can be had here; installing the default one" >&2
        "$uv" pip install --quiet "$torch"
    fi
fi

extras=${1:+[$1]}
"$uv" pip install --quiet --group dev -e "packages/core$extras" -e packages/wan -e packages/cogvideox -e packages/hunyuan -e packages/tiny
