#!/usr/bin/env bash
# The mHC paper's 27B mixture of experts on 16 nodes of 8 GPUs: run it on every node.
#
#   DATA=/data/corpus_text_document TOKENIZER=/models/tokenizer NODE_RANK=0 MASTER_ADDR=node0 \
#       examples/moe/cluster.sh
#   CHECK=1 examples/moe/cluster.sh       no GPU needed: checks the flags; parameters, memory a GPU
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=moe-27b GPUS=${GPUS:-8} NODES=${NODES:-16}
source examples/launch.sh
iterations 50000
on_gpus

MODEL_ARGS=(
    --num-layers 30
    --hidden-size 2560
    --ffn-hidden-size 12288
    --num-attention-heads 32
    --seq-length 4096
    --max-position-embeddings 4096
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.006
)

MLA_ARGS=(
    --multi-latent-attention
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm
    --rope-type rope
    --no-rope-fusion  # Megatron fuses YaRN alone for latent attention
)

MOE_ARGS=(
    --num-experts 72
    --moe-layer-freq "([0]*1+[1]*29)"
    --moe-ffn-hidden-size 1536
    --moe-router-topk 6
    --moe-router-score-function sigmoid
    --moe-router-dtype fp32
    # Balanced by a bias on the router's scores; the loss only keeps single sequences in check.
    --moe-router-enable-expert-bias
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-4
    # Two shared experts of 1536 are one of twice the width.
    --moe-shared-expert-intermediate-size 3072
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-token-dispatcher-type alltoall
)

PARALLEL_ARGS=(
    # 30 layers, with the embedding and the loss counted as one each.
    --pipeline-model-parallel-size 4
    --account-for-embedding-in-pipeline-split
    --account-for-loss-in-pipeline-split
    --expert-model-parallel-size 8
)

TRAIN_ARGS=(
    --micro-batch-size 1
    --global-batch-size 1280
    --train-iters "$ITERATIONS"
    --lr 4e-4
    --min-lr 4e-5
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --log-interval 10
    --eval-interval 1000
    --eval-iters 16
    --save-interval 1000
    --async-save
    # the other strategy, the default, wants nvidia-resiliency-ext
    --async-strategy mcore
    --use-persistent-ckpt-worker
)

DATA_ARGS=(
    --data-path "${DATA:-/data/corpus_text_document}"
    --split 99,1,0
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "${TOKENIZER:-/models/tokenizer}"
    --vocab-size 129280
    --no-create-attention-mask-in-dataloader
)

if [ "$MHC" = 1 ]; then
    MHC_ARGS+=(
        --mhc-num-streams 4
        --mhc-recompute auto
        --mhc-log-interval 100
        --mhc-guard warn
    )
fi

launch "${MODEL_ARGS[@]}" "${MLA_ARGS[@]}" "${MOE_ARGS[@]}" "${PARALLEL_ARGS[@]}" \
    "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" "${SAVE_ARGS[@]}" "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" "$@"
