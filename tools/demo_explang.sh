#!/usr/bin/env bash
# ExpLang on spelled arithmetic, from a bare machine (Python 3.11, a C++ compiler, the package registries): a base model
# that thinks aloud learns to choose its thinking language. Arguments are Hydra overrides of conf/demo_sft.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = "--help" ] || [ "${1:-}" = "-h" ]; then
  sed -n '2,3s/^# //p' "$0"
  printf 'Keys and their defaults: conf/demo_sft.yaml over conf/train_sft.yaml. Results go to results/demo_explang.\n'
  exit 0
fi

bash tools/setup.sh
python=.venv/bin/python
export TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE PYTHONPATH=$PWD
data=build/arithmetic
results=results/demo_explang
seen=ar,de,en,es,fr,it,ja,ko,pt,ru,vi,zh
all=$seen,id,nl,pl
started=$SECONDS

step() { printf '\n== %s (%ss)\n' "$*" $((SECONDS - started)); }

measure() { # model, how it is asked, how many questions, result
  $python tools/make_traces.py --questions $data/validation.parquet --nemo "$1" --ask "$2" --thinking "$all" \
    --seen "$seen" --limit "$3" --per-language "$3" --balance none --config demo_evaluate --out "$4" \
    rollout.max_new_tokens=96 prompt.max_tokens=96
  sed -n '/^## Rates/,$p' "$4/card.md"
}

rm -rf "$results"
mkdir -p "$results"
step "data, base model and a teacher's replies"
$python tools/build_arithmetic.py --out $data
step "traces: of the replies those that are right"
$python tools/make_traces.py --questions $data/train.parquet --thinking "$seen" --replies $data/replies.jsonl \
  --per-language 600 --balance none --out $data/traces
step "the base model, left to choose"
measure $data/base.nemo choose 120 $results/before
step "cold start"
$python -m nemo_lrpo.train_sft --config-name demo_sft "$@"
step "after it, left to choose"
measure $results/cold_start/model.nemo choose 360 $results/chosen
step "after it, told what to think in"
measure $results/cold_start/model.nemo tag 60 $results/told
step "reward server"
$python -m nemo_lrpo.serve_rewards thinking.tagged=true '~verifiers.similarity' '+verifiers.math={kind: numeric}' \
  endpoint_file=$results/reward.json triton_log=$results/triton.log >"$results/rewards.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
step "exploration and exploitation"
$python -m nemo_lrpo.train --config-name demo_explang
for name in cold_start run; do
  step "the test questions, by $name"
  $python -m nemo_lrpo.evaluate --config-name demo_explang_evaluate evaluation.out=$results/$name.json \
    pretrained_checkpoint.restore_from_path=$results/$name/model.nemo
done
step "report"
$python tools/report.py $results/run --before $results/cold_start.json --after $results/run.json \
  --out $results/report.html
printf '\nDone in %ss. The report: %s\n' $((SECONDS - started)) "$PWD/$results/report.html"
