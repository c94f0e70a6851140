#!/usr/bin/env bash
# One call on a GPU node without network: unpacks the parts beside this script and runs stages of the
# GPU check. The figures so far are in $OUT after every stage: table.md and check.tgz.
#
#   OUT=folder bash on_node.sh [options of the GPU check, such as --only kernels --budget 240]
#
#   KIT       where everything is unpacked, kept between calls on one node (/tmp/cartridge-kit)
#   PYTHON    with the packages that are not carried: torch, transformers, numpy, ... (python3)
#   OVERLAY=1 takes the carried transformers and tokenizers in place of the node's
#
# Without --only it runs the stages that this delivery is planned for; a call that brings only parts
# runs none.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${OUT:?OUT is not set: name a folder for the figures}" "${KIT:=/tmp/cartridge-kit}" "${PYTHON:=python3}"
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
"$PYTHON" "$here/install.py" --parts "$here" --to "$KIT"
# Else every process of a first start would compile the same modules, side by side.
"$PYTHON" -m compileall -qq -j 0 "$KIT/site" "$KIT/project" >/dev/null 2>&1 &
read -r -a planned <"$here/stages.txt" || true
options=("$@")
if [[ " $* " != *" --only "* ]]; then
  ((${#planned[@]})) || { wait; exit 0; }
  options+=(--only "${planned[@]}")
fi

export PYTHONPATH=$KIT/project${OVERLAY:+:$KIT/overlay}:$KIT/site PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Kernels that one call has compiled, the next one need not compile.
export TORCHINDUCTOR_CACHE_DIR=$KIT/inductor TRITON_CACHE_DIR=$KIT/triton
cd "$KIT/project"
{ nvidia-smi || true; "$PYTHON" -VV; nproc; free -g; df -h /tmp /dev/shm; ulimit -n; } >"$OUT/machine.txt" 2>&1
if [[ -e $KIT/complete && ! -e $KIT/model/model.safetensors ]]; then
  "$PYTHON" -m benchmarks.gpu_bundle.decode_model "$KIT/files" "$KIT/model"
fi
exec "$PYTHON" -m benchmarks.gpu_check --model "$KIT/model" --out "$KIT/check-$(basename "$here")" \
  --deliver "$OUT" "${options[@]}"
