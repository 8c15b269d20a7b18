#!/usr/bin/env bash
# usage: install.sh VENV [PYTHON] -- makes the virtual environment VENV with SGLang for a CPU.
# It is apart from the project's own: their versions of transformers differ, and SGLang pins many more.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1
"${2:-python3}" -m venv "$venv"
pip=("$venv/bin/pip" install -q --disable-pip-version-check)
"${pip[@]}" "$(grep -E '^torch==' "$here/../../../constraints.txt")"
"${pip[@]}" --no-deps -r "$here/requirements.txt"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/sgl_kernel.py" "$here/torchvision_operators.py" "$here/forked_children.py" "$packages/"
printf 'import %s\n' torchvision_operators forked_children > "$packages/sglang_cpu.pth"
