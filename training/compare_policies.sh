#!/usr/bin/env bash
# Off-policy, on-policy and a mix of both, at equal tokens, on a CPU: the study of one grid.
#
#   bash training/compare_policies.sh        # nine runs on the demo's record, three seeds
#
# A thin caller of `python -m training.study`, which says what it does and what a grid is. Stopped,
# the same command goes on. Further arguments are passed on, --threads 1 or --gate-only.
#
# May be set
#   OUT        everything goes here           (runs/compare)
#   GRID       arms, seeds and documents      (training/study/grids/demo_record.yaml)
#   PYTHON     interpreter                    (.venv/bin/python)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0
fi
for name in SEEDS STEPS POLICIES MIXED SCHEDULE THREADS; do
  [[ -z ${!name:-} ]] || { echo "refused: $name=${!name}; the grid says it now: copy" \
    "training/study/grids/demo_record.yaml, change it, commit it, and set GRID" >&2; exit 2; }
done

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-$ROOT/.venv/bin/python}" -m training.study \
  "${GRID:-$ROOT/training/study/grids/demo_record.yaml}" --out "${OUT:-$ROOT/runs/compare}" "$@"
