#!/usr/bin/env bash
# Trains on a GPU what a newcomer trains: 50 iterations, save, resume, 50 more; prints both logs.
#
#   benchmarks/model/train_gpu.sh [FOLDER]
#
# First examples/train.sh; then, where FOLDER holds a stock pretrain_gpt.py of Megatron-LM, that
# one through the runner with the same flags, and says whether the two print the same losses.
set -euo pipefail
[[ ${1:-} != -h && ${1:-} != --help ]] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/../.."
STOCK=${1:-}
# Transformer Engine's attention has a faster backward that adds in any order.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=0
export PYTHON=${PYTHON:-python} RUNS=${RUNS:-runs} ITERATIONS=100

examples/train.sh
read -r -a command <<<"$(cat "$RUNS/gpt-mhc/command")"
log=$RUNS/gpt-mhc/train.log
losses() { grep -oE 'iteration +[0-9]+/.*lm loss: [^ ]+' "$1" | sed -E 's/ +consumed.*lm loss:/ loss/'; }
losses "$log" >"$RUNS/ours.txt"
if [ -n "$STOCK" ]; then
    stock=("${command[@]/#examples\/pretrain_gpt.py/$STOCK/pretrain_gpt.py}")
    stock=("${stock[@]/#"$RUNS/gpt-mhc/"/"$RUNS/stock/"}")
    mkdir -p "$RUNS/stock"
    echo "== stock script: ${stock[*]}"
    "${stock[@]}" --exit-interval 50 >"$RUNS/stock/train.log" 2>&1
    "${stock[@]}" --load "$RUNS/stock/checkpoints" >>"$RUNS/stock/train.log" 2>&1
    grep -E 'mHC is|successfully' "$RUNS/stock/train.log"
    losses "$RUNS/stock/train.log" | tee "$RUNS/stock.txt"
    if cmp "$RUNS/ours.txt" "$RUNS/stock.txt"; then
        echo "== the stock script's losses are ours, digit for digit"
    fi
fi
