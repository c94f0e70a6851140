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
#   DATA             folder of training/prepare_data.py (data/longhealth; written when absent)
#   SOURCE, PATIENTS, ROWS   what is written there     (longhealth, patient_01, 4096 prompts);
#                    SOURCE may be a folder of documents, PATIENTS some of them (docs/data.md)
#   TOKENS, LR, BATCH, TEMPERATURE                     (2048, 0.02, 32, 0.7)
#   OUT              checkpoints and metrics           (runs/<name of DATA>)
#   PLATFORM         cuda or cpu                       (cuda)
#   WAIT             seconds to wait for the server, a cold start included (60)
#   PYTHON           interpreter                       (.venv/bin/python, else python3)
#   DRY_RUN=1        check everything, print veRL's command, do not run it
#
# Everything else is in training/config/cartridge_distill.yaml and may be overridden:
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

refuse() { printf '%s\n' "refused: $1" "${@:2}" >&2; exit 2; }
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }

MODEL=${MODEL:-meta-llama/Llama-3.2-3B-Instruct}
if [[ -d $MODEL ]]; then MODEL=$(absolute "$MODEL"); fi
DATA=$(absolute "${DATA:-$ROOT/data/longhealth}")
NAME=$(basename "$DATA" | sed 's/[^[:alnum:]]\{1,\}/-/g; s/^-//; s/-$//') # begins the version ids
OUT=$(absolute "${OUT:-$ROOT/runs/$NAME}")
PLATFORM=${PLATFORM:-cuda}
PYTHON=${PYTHON:-$([[ -x $ROOT/.venv/bin/python ]] && echo "$ROOT/.venv/bin/python" || echo python3)}

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export VERL_USE_EXTERNAL_MODULES=verl_patches.plugin
export VERL_FILE_LOGGER_PATH=$OUT/metrics.jsonl
if [[ $PLATFORM == cpu ]]; then export VERL_PLATFORM=cpu; fi

# ---- checks: nothing starts on a machine where it cannot end well

checked=$("$PYTHON" -m verl_patches check 2>&1) ||
  refuse "veRL is not ready for cartridges. $PYTHON -m verl_patches check says:" "$checked" "(make setup does it, too)"

read -r -d '' get_a_server <<EOT || true
how to get a server (docs/serving.md has more):
  on Modal, Tokasaurus behind the gateway:
    modal deploy modal/modal_tokasaurus.py      # prints the URL
  on a GPU machine, the same:
    export TOKASAURUS_API_KEY=...               # the same here and there
    $PYTHON -m cartridge_distill.gateway --backend tokasaurus --model $MODEL --host 0.0.0.0
  or the embedded server in Tokasaurus' place:
    $PYTHON -m cartridge_distill.gateway --model $MODEL --host 0.0.0.0 \\
      -- --device cuda --dtype bfloat16
  then: TOKASAURUS_URL=http://that-machine:10210 bash $0
EOT

[[ -n ${TOKASAURUS_URL:-} ]] || refuse "TOKASAURUS_URL is not set: no server to write the rollouts." "$get_a_server"
if [[ -n ${SYNC_DIR:-} ]]; then
  SYNC_DIR=$(absolute "$SYNC_DIR")
  [[ -d $SYNC_DIR && -w $SYNC_DIR ]] || refuse "SYNC_DIR=$SYNC_DIR is no directory that can be written to: mount the server's cartridge directory there, or leave it out and upload to a gateway."
  sync=(actor_rollout_ref.actor.cartridge.transport=shared_dir actor_rollout_ref.actor.cartridge.sync_dir="$SYNC_DIR")
else
  sync=(actor_rollout_ref.actor.cartridge.transport=http)
fi
"$PYTHON" - "$TOKASAURUS_URL" "${WAIT:-60}" "$MODEL" "${sync[0]##*=}" <<'EOT' || refuse "no server to write the rollouts, see above." "$get_a_server"
import asyncio, logging, sys
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.util.errors import RolloutError
from cartridge_distill.rollout.http import ClientSettings

async def look(url: str, wait: float, model: str, transport: str) -> None:
    async with TokasaurusClient(url, ClientSettings(startup_timeout_s=wait)) as client:
        await client.wait_until_ready()
        print(f"server {url} serves {', '.join(await client.models())}; to be trained: {model}")
        if transport == "http":
            await client.check_takes_uploads()

logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("httpx").setLevel(logging.WARNING)
try:
    asyncio.run(look(sys.argv[1], float(sys.argv[2]), *sys.argv[3:]))
except RolloutError as error:
    sys.exit(f"{type(error).__name__}: {error}")
EOT

# ---- data

if [[ ! -f $DATA/train.parquet ]]; then
  SOURCE=${SOURCE:-longhealth}
  if [[ $SOURCE == longhealth ]]; then PATIENTS=${PATIENTS:-patient_01}; fi
  read -r -a patients <<<"${PATIENTS:-}"
  prepare=("$PYTHON" "$ROOT/training/prepare_data.py" --data "$SOURCE" ${patients:+--patients "${patients[@]}"})
  prepare+=(--recipe mixed --rows "${ROWS:-4096}" --tokenizer "$MODEL" --out "$DATA")
  echo "no data in $DATA; writing it: ${prepare[*]}"
  [[ -n ${DRY_RUN:-} ]] || "${prepare[@]}" || refuse "the data could not be written, see above."
fi

# ---- the run

run=(
  "$PYTHON" -m verl.trainer.main_ppo
  --config-path "$ROOT/training/config" --config-name cartridge_distill
  platform="$PLATFORM"
  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/val.parquet"
  data.train_batch_size="${BATCH:-32}"
  actor_rollout_ref.model.path="$MODEL"
  actor_rollout_ref.actor.cartridge.num_tokens="${TOKENS:-2048}"
  actor_rollout_ref.actor.cartridge.lr="${LR:-0.02}"
  actor_rollout_ref.actor.cartridge.documents="$DATA/documents.jsonl"
  "${sync[@]}"
  actor_rollout_ref.actor.cartridge.sync_base_model="${SERVED_MODEL:-null}"
  actor_rollout_ref.rollout.temperature="${TEMPERATURE:-0.7}"
  actor_rollout_ref.rollout.custom.tokasaurus_url="$TOKASAURUS_URL"
  trainer.experiment_name="$NAME"
  trainer.default_local_dir="$OUT/checkpoints"
  "trainer.logger=[console,file]"
  "$@"
)
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${run[@]}"
  echo
  exit 0
fi
mkdir -p "$OUT"
recipe=("$PYTHON" -m cartridge_distill.report.recipe "$OUT" --name "$NAME" --model "$MODEL")
recipe+=(--environment TOKASAURUS_URL,SYNC_DIR,SERVED_MODEL,MODEL,DATA,SOURCE,PATIENTS,ROWS,TOKENS,LR,BATCH,TEMPERATURE,OUT,PLATFORM)
"${recipe[@]}" --overrides "${run[@]:7}" -- bash training/run_cartridge_distill.sh "$@"
"${run[@]}" || {
  status=$?
  saved=$(cat "$OUT/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0)
  echo "the run ended with status $status, see above; the last step that was saved is $saved." \
    "Start the same command again: it goes on from there ($OUT/checkpoints)." >&2
  exit $status
}
echo "cartridges: $OUT/checkpoints/global_step_*/actor/cartridge, metrics: $OUT/metrics.jsonl"
echo "what is it worth:  $PYTHON -m cartridge_distill.cli.main eval --model $MODEL --data $DATA --cartridge $OUT/checkpoints/global_step_N/actor/cartridge --out $OUT/evaluation"
