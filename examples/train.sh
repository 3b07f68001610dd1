#!/usr/bin/env bash
# Trains a byte-level GPT, stops halfway, resumes, samples, plots: what `make train` runs.
#
#   examples/train.sh              with mHC, into runs/gpt-mhc
#   MHC=0 examples/train.sh        the ordinary residual model, into runs/gpt-ordinary
#   examples/train.sh --lr 1e-3    further flags go to Megatron and win
#
# Environment: as in examples/launch.sh. On a GPU it is examples/gpt/single_gpu.sh, shorter, on a CPU
# examples/gpt/tiny.sh, longer. Every run replaces the folder of the one before.
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=gpt
source examples/launch.sh

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    train=examples/gpt/single_gpu.sh DATA=$RUNS/data/python
    iterations 600
else
    train=examples/gpt/tiny.sh DATA=$RUNS/data/stdlib
    iterations 400
fi
export PYTHON MHC RUNS RUN ITERATIONS GPUS
# what `python -m megatron_mhc plot` draws beside the loss
[ "$MHC" = 0 ] || set -- --mhc-log-interval 50 "$@"
rm -rf "$RUN"

echo "== training to iteration $(every 2) of $ITERATIONS; $RUN/command has the command"
"$train" --exit-interval "$(every 2)" "$@"
echo "== resuming from the checkpoint"
"$train" "$@"

echo "== sampling"
GPUS=1 SCRIPT=examples/sample.py "$train" "$@" >/dev/null
sed -n '/^--- sample 1 /,$p' "$RUN/train.log" | tee "$RUN/sample.txt"

curves=()
[ -d "$RUNS/gpt-mhc/tensorboard" ] && curves+=("mHC=$RUNS/gpt-mhc")
[ -d "$RUNS/gpt-ordinary/tensorboard" ] && curves+=("ordinary=$RUNS/gpt-ordinary")
for folder in "${curves[@]#*=}"; do
    "$PYTHON" examples/plot_loss.py "${curves[@]}" --entropy-from "$DATA.json" \
        --output "$folder/loss.png"
done
