#!/usr/bin/env bash
# Off-policy, on-policy and a mix of both, at equal tokens, on a CPU.
#
#   bash training/compare_policies.sh        # nine runs of five minutes each on two cores
#
# 48 answers of at most 4 tokens a step, a constant rate of 0.02: not the recipe of `make demo`.
# The same model, document, prompts, initialisation and number of tokens for each; three seeds. Ends in
# a table with the spread over seeds, and in a report. Finished runs are not repeated: stopped, the same
# command goes on. The teacher's answers are kept and shared by the runs of a seed.
#
# May be set
#   OUT        everything goes here           (runs/compare)
#   SEEDS      of data, sampling and order    (0 1 2)
#   STEPS      optimizer steps of each run    (16)
#   POLICIES   some of: off-policy on-policy mixed schedule  (the first three)
#   MIXED      part of each batch that the student writes    (0.25)
#   SCHEDULE   the same by step                              ([[1,0.0],[16,0.5]])
#   THREADS    CPU threads of each run        (all)
#   PYTHON     interpreter                    (.venv/bin/python)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0
fi
[[ $# == 0 ]] || { echo "refused: $1; settings are variables, see --help" >&2; exit 2; }

OUT=${OUT:-$ROOT/runs/compare}
STEPS=${STEPS:-16}
THREADS=${THREADS:-$(nproc)}
MIXED=${MIXED:-0.25}
SCHEDULE=${SCHEDULE:-[[1,0.0],[16,0.5]]}
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
read -r -a seeds <<<"${SEEDS:-0 1 2}"
read -r -a policies <<<"${POLICIES:-off-policy on-policy mixed}"
declare -A fraction=([off-policy]=0.0 [on-policy]=1.0 [mixed]=$MIXED [schedule]=$SCHEDULE)
for policy in "${policies[@]}"; do
  [[ -n ${fraction[$policy]:-} ]] || { echo "refused: POLICIES names $policy; known: ${!fraction[*]}" >&2; exit 2; }
done

actor=actor_rollout_ref.actor
# A constant rate, so that a run of other STEPS differs by its length alone.
# The last step of each, so that no run is chosen by what the table asks.
recipe=(--prompts 48 --response 4 --lr 0.02 --test-every 8 --choose last)
schedule=("$actor.optim.lr_scheduler_type=constant")
runs=()
for seed in "${seeds[@]}"; do
  for policy in "${policies[@]}"; do
    run=$OUT/$policy/seed$seed
    runs+=("$run")
    if [[ -f $run/evaluation/evaluation.json ]]; then
      echo "==== $policy, seed $seed: finished before ($run)"
      continue
    fi
    echo "==== $policy, seed $seed: run ${#runs[@]} of $((${#seeds[@]} * ${#policies[@]}))"
    "$PYTHON" "$ROOT/training/demo.py" --name "$policy" --seed "$seed" --steps "$STEPS" \
      --threads "$THREADS" --out "$run" "${recipe[@]}" "${schedule[@]}" \
      "$actor.cartridge.on_policy_fraction=${fraction[$policy]}" \
      "$actor.cartridge.teacher_cache=$OUT/teacher_answers"
  done
done

"$PYTHON" "$ROOT/training/compare_table.py" "${runs[@]}"
echo "report: $("$PYTHON" -m cartridge_distill.cli.main report "${runs[@]}" --out "$OUT/report.html")"
