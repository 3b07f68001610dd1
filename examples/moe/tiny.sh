#!/usr/bin/env bash
# A byte-level mixture of experts with latent attention on the CPU, in two minutes.
#
#   examples/moe/tiny.sh --lr 1e-3    further flags go to Megatron and win
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=moe-tiny
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

MLA_ARGS=(
    --multi-latent-attention
    --kv-lora-rank 32
    --qk-head-dim 24
    --qk-pos-emb-head-dim 8
    --v-head-dim 32
    --rope-type rope
)

MOE_ARGS=(
    --num-experts 4
    --moe-layer-freq "([0]*1+[1]*3)"
    --moe-ffn-hidden-size 128
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-shared-expert-intermediate-size 128
    --moe-token-dispatcher-type alltoall
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
    --log-interval "$(every 20)"
    --eval-interval "$(every 4)"
    --eval-iters 8
    --tensorboard-log-interval 1
    --save-interval "$(every 2)"
)

launch "${MODEL_ARGS[@]}" "${MLA_ARGS[@]}" "${MOE_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${SAVE_ARGS[@]}" "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" "$@"
