#!/usr/bin/env bash
# A byte-level GPT of four layers on the CPU, in two minutes; examples/launch.sh lists the settings.
#
#   examples/gpt/tiny.sh --lr 1e-3    further flags go to Megatron and win
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=gpt-tiny
source examples/launch.sh
iterations 200
on_cpu
byte_data stdlib

MODEL_ARGS=(
    --num-layers 4
    --hidden-size 128
    --ffn-hidden-size 344
    --num-attention-heads 4
    --seq-length 256
    --max-position-embeddings 256
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.06
)

TRAIN_ARGS=(
    --micro-batch-size 4
    --global-batch-size 4
    --train-iters "$ITERATIONS"
    --lr 3e-3
    --min-lr 1e-4
    --lr-decay-style cosine
    --lr-warmup-iters "$(every 20)"
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed 1234
    --log-interval "$(every 40)"
    --eval-interval "$(every 8)"
    --eval-iters 16
    --tensorboard-log-interval 1
    --log-validation-ppl-to-tensorboard
    --save-interval "$(every 2)"
)

launch "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" "${SAVE_ARGS[@]}" \
    "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" "$@"
