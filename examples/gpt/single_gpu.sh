#!/usr/bin/env bash
# A byte-level GPT of 87 million parameters on one GPU, ten minutes on an H100.
#
#   MINUTES=8 examples/gpt/single_gpu.sh               a piece of 8 minutes; again for the next one
#   examples/gpt/single_gpu.sh --fp8-format hybrid     further flags go to Megatron and win
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=gpt
source examples/launch.sh
iterations 2500
on_gpus
byte_data python --with-packages

MODEL_ARGS=(
    --num-layers 12
    --hidden-size 768
    --ffn-hidden-size 2048
    --num-attention-heads 12
    --seq-length 2048
    --max-position-embeddings 2048
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)

TRAIN_ARGS=(
    --micro-batch-size 16
    --global-batch-size $((32 * GPUS))
    --train-iters "$ITERATIONS"
    --lr 1e-3
    --min-lr 1e-4
    --lr-decay-style cosine
    --lr-warmup-iters "$(every 20)"
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed 1234
    --log-interval "$(every 100)"
    --eval-interval "$(every 10)"
    --eval-iters 8
    --tensorboard-log-interval 1
    --log-validation-ppl-to-tensorboard
    --save-interval "$(every 2)"
)

[ "$MHC" = 0 ] || MHC_ARGS+=(--mhc-backend triton)

launch "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" "${SAVE_ARGS[@]}" \
    "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" "$@"
