#!/usr/bin/env bash
# A LLaMA-8B-like GPT on 8 nodes of 8 GPUs: run it on every node.
#
#   DATA=/data/corpus_text_document TOKENIZER=/models/tokenizer NODE_RANK=0 MASTER_ADDR=node0 \
#       examples/gpt/cluster.sh
#   CHECK=1 examples/gpt/cluster.sh       no GPU needed: checks the flags; parameters, memory a GPU
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=gpt-8b GPUS=${GPUS:-8} NODES=${NODES:-8}
source examples/launch.sh
iterations 250000
on_gpus

MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --seq-length 8192
    --max-position-embeddings 8192
    --position-embedding-type rope
    --rotary-base 500000
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.01
)

PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --sequence-parallel
    --pipeline-model-parallel-size 4
)

TRAIN_ARGS=(
    --micro-batch-size 1
    --global-batch-size 512
    --train-iters "$ITERATIONS"
    --lr 3e-4
    --min-lr 3e-5
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
    --vocab-size 128256
    --no-create-attention-mask-in-dataloader
)

if [ "$MHC" = 1 ]; then
    MHC_ARGS+=(
        --mhc-recompute auto
        --mhc-log-interval 100
        --mhc-guard warn
    )
fi

# Sequence parallelism overlaps its communication by the order of launches.
export CUDA_DEVICE_MAX_CONNECTIONS=1
launch "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${SAVE_ARGS[@]}" "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" "$@"
