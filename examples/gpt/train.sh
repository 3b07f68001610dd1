#!/usr/bin/env bash
# Trains a byte-level GPT on the Python standard library, stops halfway, resumes, samples, plots.
#
#   examples/gpt/train.sh              with mHC, into runs/gpt-mhc
#   MHC=0 examples/gpt/train.sh        the ordinary residual model, into runs/gpt-ordinary
#   examples/gpt/train.sh --lr 1e-3    further flags go to Megatron and win
#
# Environment: MHC (1 or 0), PYTHON (the interpreter), RUNS (runs), ITERATIONS, GPUS (1).
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
MHC=${MHC:-1}
RUNS=${RUNS:-runs}
GPUS=${GPUS:-1}
DATA=$RUNS/data/stdlib

case $MHC in
    1) RUN=$RUNS/gpt-mhc MHC_ARGS=(--mhc) ;;
    0) RUN=$RUNS/gpt-ordinary MHC_ARGS=() ;;
    *) echo "train.sh: MHC is '$MHC'; it must be 1 or 0" >&2 && exit 2 ;;
esac

has_gpu() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
has_te() { "$PYTHON" -c 'import transformer_engine.pytorch' 2>/dev/null; }

MODEL_ARGS=(
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)

if has_gpu; then
    RUNNER=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m megatron_mhc.run)
    SAMPLER=("$PYTHON" -m megatron_mhc.run)
    ITERATIONS=${ITERATIONS:-1000}
    MODEL_ARGS+=(--num-layers 12 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 8)
    MODEL_ARGS+=(--seq-length 1024 --max-position-embeddings 1024)
    BATCH_ARGS=(--micro-batch-size 16 --global-batch-size $((16 * GPUS)) --lr 1e-3 --eval-iters 4)
    # Gradient accumulation is fused by Apex, in the output layer with Transformer Engine as well.
    DEVICE_ARGS=(--bf16 --no-gradient-accumulation-fusion)
    if has_te; then
        DEVICE_ARGS+=(--transformer-impl transformer_engine)
    else
        DEVICE_ARGS+=(--transformer-impl local --no-persist-layer-norm)
        DEVICE_ARGS+=(--no-masked-softmax-fusion --no-rope-fusion)
    fi
else
    RUNNER=("$PYTHON" -m megatron_mhc.run --cpu)
    SAMPLER=("${RUNNER[@]}")
    ITERATIONS=${ITERATIONS:-400}
    MODEL_ARGS+=(--num-layers 4 --hidden-size 128 --ffn-hidden-size 344 --num-attention-heads 4)
    MODEL_ARGS+=(--seq-length 256 --max-position-embeddings 256 --init-method-std 0.06)
    BATCH_ARGS=(--micro-batch-size 4 --global-batch-size 4 --lr 3e-3 --eval-iters 16)
    # Every fusion is a CUDA kernel or a compiled function.
    DEVICE_ARGS=(
        --transformer-impl local
        --distributed-backend gloo
        --disable-jit-fuser
        --no-gradient-accumulation-fusion
        --no-masked-softmax-fusion
        --no-persist-layer-norm
        --no-bias-swiglu-fusion
        --no-bias-dropout-fusion
        --no-rope-fusion
    )
    # Threads that wait must sleep: spinning ones starve each other where cores are shared.
    export TORCHDYNAMO_DISABLE=1 OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
fi

if ! [[ $ITERATIONS =~ ^[0-9]+$ ]] || ((ITERATIONS < 2)); then
    echo "train.sh: ITERATIONS is '$ITERATIONS'; it must be a number, 2 or more" >&2 && exit 2
fi

DATA_ARGS=(
    --data-path "$DATA"
    --data-cache-path "$RUNS/data/cache"
    --split 95,5,0
    # Bytes and the end-of-document token; "null" because it needs no vocabulary file.
    --tokenizer-type NullTokenizer
    --vocab-size 257
    --make-vocab-size-divisible-by 8
    --no-create-attention-mask-in-dataloader
    --num-workers 0
)

# One part in so many of the run, at least an iteration.
every() { echo $((ITERATIONS < $1 ? 1 : ITERATIONS / $1)); }

TRAIN_ARGS=(
    "${BATCH_ARGS[@]}"
    --train-iters "$ITERATIONS"
    --min-lr 1e-4
    --lr-decay-style cosine
    --lr-warmup-iters "$(every 20)"
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed 1234
    --log-interval "$(every 40)"
    --eval-interval "$(every 8)"
    --tensorboard-dir "$RUN/tensorboard"
    --tensorboard-log-interval 1
    --log-validation-ppl-to-tensorboard
    --save "$RUN/checkpoints"
    --save-interval "$(every 2)"
    --ckpt-format torch_dist
    # Warnings only; Megatron's iteration log is printed, not logged.
    --logging-level 30
)

# What a reader wants to see of all that Megatron prints; the log file keeps the rest.
show() {
    tee -a "$RUN/train.log" | awk '
        /mHC is|number of parameters on| iteration +[0-9]+\/|validation loss|Error|^sample: / ||
        /successfully (saved|loaded)|exiting program/ { print; fflush() }'
}

COMMAND=("${RUNNER[@]}" examples/gpt/pretrain_gpt.py "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}"
    "${DATA_ARGS[@]}" "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" "$@")

"$PYTHON" examples/gpt/prepare_data.py --output "$DATA"

rm -rf "$RUN"
mkdir -p "$RUN"
trap 'tail -n 20 "$RUN/train.log"; echo "train.sh: failed; all that was printed: $RUN/train.log" >&2' ERR
printf '%q ' "${COMMAND[@]}" >"$RUN/command"
echo "== training to iteration $(every 2) of $ITERATIONS; $RUN/command has the command"
"${COMMAND[@]}" --exit-interval "$(every 2)" 2>&1 | show
echo "== resuming from the checkpoint"
"${COMMAND[@]}" --load "$RUN/checkpoints" 2>&1 | show

echo "== sampling"
"${SAMPLER[@]}" examples/gpt/sample.py "${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${DEVICE_ARGS[@]}" "${MHC_ARGS[@]}" --load "$RUN/checkpoints" "$@" 2>&1 |
    tee -a "$RUN/train.log" | sed -n '/^--- sample 1 /,$p' | tee "$RUN/sample.txt"

curves=()
[ -d "$RUNS/gpt-mhc/tensorboard" ] && curves+=("mHC=$RUNS/gpt-mhc")
[ -d "$RUNS/gpt-ordinary/tensorboard" ] && curves+=("ordinary=$RUNS/gpt-ordinary")
for folder in "${curves[@]#*=}"; do
    "$PYTHON" examples/gpt/plot_loss.py "${curves[@]}" --entropy-from "$DATA.json" \
        --output "$folder/loss.png"
done
