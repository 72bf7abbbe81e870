#!/usr/bin/env bash
# run.sh [--minutes 8] [--only PHASE...] [--out DIR]: see run.sh --help. PYTHON: the interpreter that has PyTorch (python3).
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
python=${PYTHON:-python3}
if ! command -v "$python" > /dev/null; then
  echo "run.sh: there is no $python here: set PYTHON to a Python that has PyTorch" >&2
  exit 1
fi
if ! "$python" -c 'import torch' 2> /dev/null; then
  echo "run.sh: $python has no PyTorch: set PYTHON to a Python that has it" >&2
  exit 1
fi
export PYTHONPATH="$here"
export PYTHONDONTWRITEBYTECODE=1
# Not -m, which would take the packages of the current folder, where there are some, before those that lie here.
start='import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module("benchmarks.kit", run_name="__main__")'
exec "$python" -c "$start" "$here" "$@"
