#!/usr/bin/env bash
# On-policy cartridge distillation with veRL, on a GPU.
#
#   TOKASAURUS_URL=https://... bash training/run_cartridge_distill.sh [hydra overrides]
#
# Needs
#   TOKASAURUS_URL   the rollout server, e.g. http://gpu-box:10210
# May be set
#   TOKASAURUS_API_KEY, MODAL_PROXY_KEY, MODAL_PROXY_SECRET   its credentials (environment only)
#   SYNC_DIR         the server's cartridge directory as this machine sees it; without it new
#                    versions are uploaded, which takes a gateway at TOKASAURUS_URL
#   SERVED_MODEL     what the gateway calls the model  (MODEL)
#   MODEL            base model, folder or hub id      (meta-llama/Llama-3.2-3B-Instruct)
#   DATA             folder of training/prepare_data.py (data/longhealth, written when absent)
#   SOURCE, PATIENTS, ROWS   what is written there     (longhealth, patient_01, 4096 prompts);
#                    SOURCE may be a folder of documents, PATIENTS some of them (docs/data.md).
#                    A DATA of your own that is not there is written when one of the two is set
#   TOKENS, LR, BATCH, TEMPERATURE                     (2048, 0.02, 32, 0.7)
#   OUT              checkpoints and metrics           (runs/<name of DATA>)
#   PLATFORM         cuda or cpu                       (cuda)
#   WAIT             seconds to wait for the server, a cold start included (60)
#   PYTHON           interpreter                       (.venv/bin/python, else python3)
#   DRY_RUN=1        check everything, print veRL's command, do not run it
#
# It is `cartridge-distill train` with variables in place of options, and writes the data when they
# are absent. Everything else is in verl_patches/config/cartridge_distill.yaml and may be overridden:
#   ... run_cartridge_distill.sh actor_rollout_ref.actor.cartridge.topk=50 trainer.nnodes=2
# Small, on a CPU:
#   PLATFORM=cpu MODEL=path/to/small/model DATA=runs/demo/data TOKENS=128 BATCH=8 \
#     TOKASAURUS_URL=http://127.0.0.1:10210 \
#     bash training/run_cartridge_distill.sh data.max_prompt_length=192 data.max_response_length=4
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
  exit 0
fi

PYTHON=${PYTHON:-$([[ -x $ROOT/.venv/bin/python ]] && echo "$ROOT/.venv/bin/python" || echo python3)}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
GIVEN_DATA=${DATA:-}
MODEL=${MODEL:-meta-llama/Llama-3.2-3B-Instruct}
DATA=${DATA:-$ROOT/data/longhealth}
NAME=$(basename "$DATA" | sed 's/[^[:alnum:]]\{1,\}/-/g; s/^-//; s/-$//') # begins the version ids

if [[ ${TOKASAURUS_URL:-} == *@* ]]; then # never shown, not even to the list of processes
  echo "error: TOKASAURUS_URL holds a user or a password; the gateway's token goes into TOKASAURUS_API_KEY" >&2
  exit 2
fi

train=("$PYTHON" -m verl_patches.launch --model "$MODEL" --data "$DATA" --name "$NAME")
train+=(--out "${OUT:-$ROOT/runs/$NAME}" --device "${PLATFORM:-cuda}" --wait "${WAIT:-60}")
if [[ -n ${TOKASAURUS_URL:-} ]]; then
  train+=(--server "$TOKASAURUS_URL")
else
  echo "TOKASAURUS_URL is not set" >&2 # refused below, with how to get a server
fi
[[ -z ${SYNC_DIR:-} ]] || train+=(--sync-dir "$SYNC_DIR")
[[ -z ${SERVED_MODEL:-} ]] || train+=(--served-model "$SERVED_MODEL")
[[ -z ${TOKENS:-} ]] || train+=(--tokens "$TOKENS")
[[ -z ${LR:-} ]] || train+=(--lr "$LR")
[[ -z ${BATCH:-} ]] || train+=(--batch "$BATCH")
[[ -z ${TEMPERATURE:-} ]] || train+=(--temperature "$TEMPERATURE")

if [[ ! -f $DATA/train.parquet ]]; then
  if [[ -n $GIVEN_DATA && -z ${SOURCE:-}${PATIENTS:-} ]]; then # a typo must not train on other documents
    echo "error: DATA=$DATA: no prepared data there; fix: name the folder that has them, or say with SOURCE what to write" >&2
    exit 2
  fi
  "${train[@]}" --only-check "$@" || exit # before minutes of work on the data
  SOURCE=${SOURCE:-longhealth}
  if [[ $SOURCE == longhealth ]]; then PATIENTS=${PATIENTS:-patient_01}; fi
  read -r -a patients <<<"${PATIENTS:-}"
  prepare=("$PYTHON" "$ROOT/training/prepare_data.py" --data "$SOURCE" ${patients:+--patients "${patients[@]}"})
  prepare+=(--recipe mixed --rows "${ROWS:-4096}" --tokenizer "$MODEL" --out "$DATA")
  echo "no data in $DATA; writing it: ${prepare[*]}"
  if [[ -z ${DRY_RUN:-} ]]; then
    "${prepare[@]}" || { echo "error: the data could not be written, see above." >&2; exit 2; }
  fi
fi
exec "${train[@]}" ${DRY_RUN:+--dry-run} "$@"
