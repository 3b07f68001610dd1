#!/usr/bin/env bash
# A byte-level HybridModel on the CPU, in two minutes: attention, MLPs and a mixture of experts, each
# a layer of its own, in the order of a pattern.
#
#   examples/hybrid/tiny.sh --hybrid-layer-pattern '*-*-*-*-'    the layers of examples/gpt/tiny.sh
#   examples/hybrid/tiny.sh --lr 1e-3    further flags go to Megatron and win
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=hybrid-tiny
SCRIPT=${SCRIPT:-examples/pretrain_hybrid.py}
source examples/launch.sh
iterations 200
on_cpu
byte_data stdlib

# * attention, - MLP, E experts (M Mamba, G gated delta net, + latent attention)
PATTERN='*-*E*-*E'
previous=
for word in "$@"; do
    [[ $previous != --hybrid-layer-pattern ]] || PATTERN=$word
    [[ $word != --hybrid-layer-pattern=* ]] || PATTERN=${word#*=}
    previous=$word
done

MODEL_ARGS=(
    --hybrid-layer-pattern "$PATTERN"
    --spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec
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

MOE_ARGS=(
    --num-experts 4
    --moe-ffn-hidden-size 128
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-shared-expert-intermediate-size 128
    --moe-token-dispatcher-type alltoall
)
# Megatron's main stops over these where no layer has experts.
[[ $PATTERN = *E* ]] || MOE_ARGS=()

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

launch "${MODEL_ARGS[@]}" "${MOE_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" "${SAVE_ARGS[@]}" \
    "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" "$@"
