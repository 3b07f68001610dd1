#!/usr/bin/env bash
# A small DeepSeek-like mixture of experts on one GPU, meant for 20 minutes.
#
#   MINUTES=8 examples/moe/single_gpu.sh               a piece of 8 minutes; again for the next one
#   examples/moe/single_gpu.sh --fp8-format hybrid --moe-router-padding-for-quantization
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=moe
source examples/launch.sh
iterations 1200
on_gpus
byte_data python --with-packages

MODEL_ARGS=(
    --num-layers 12
    --hidden-size 512
    --ffn-hidden-size 1536
    --num-attention-heads 8
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

MLA_ARGS=(
    --multi-latent-attention
    --kv-lora-rank 128
    --qk-head-dim 64
    --qk-pos-emb-head-dim 32
    --v-head-dim 64
    --qk-layernorm
    --rope-type rope
    --no-rope-fusion  # Megatron fuses YaRN alone for latent attention
)

MOE_ARGS=(
    --num-experts 32
    --moe-layer-freq "([0]*1+[1]*11)"
    --moe-ffn-hidden-size 384
    --moe-router-topk 4
    --moe-router-score-function sigmoid
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-shared-expert-intermediate-size 384
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
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
    --save-interval "$(every 2)"
)

[ "$MHC" = 0 ] || MHC_ARGS+=(--mhc-backend triton)

launch "${MODEL_ARGS[@]}" "${MLA_ARGS[@]}" "${MOE_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${SAVE_ARGS[@]}" "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" "$@"
