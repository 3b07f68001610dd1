# What the launch scripts share. They source it, choose a device, set flags and call `launch`.
#
# Environment:
#   MHC=0         the ordinary residual model instead of mHC
#   ITERATIONS    how long to train
#   MINUTES       save and stop after so many; the same command again goes on from there
#   RUNS, RUN     where data and runs are kept (runs); this run's folder (runs/NAME-mhc)
#   GPUS, NODES, NODE_RANK, MASTER_ADDR     for torchrun
#   CHECK=1       no training: what Megatron makes of the flags, parameters and memory a GPU
#   PYTHON        the interpreter: else an active environment's, else .venv's, else `python`
#   SCRIPT        the script to launch

[ -n "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
PYTHON=${PYTHON:-python}
SCRIPT=${SCRIPT:-examples/pretrain_gpt.py}
MHC=${MHC:-1}
RUNS=${RUNS:-runs}
GPUS=${GPUS:-1}
NODES=${NODES:-1}
# Threads that wait must sleep: spinning ones starve each other where cores are shared.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

fail() { echo "$(basename "$0"): $*" >&2 && exit 2; }

case $MHC in
    1) RUN=${RUN:-$RUNS/$NAME-mhc} MHC_ARGS=(--mhc) ;;
    0) RUN=${RUN:-$RUNS/$NAME-ordinary} MHC_ARGS=() ;;
    *) fail "MHC is '$MHC'; it must be 1 or 0" ;;
esac

# How long to train where ITERATIONS does not say.
iterations() {
    ITERATIONS=${ITERATIONS:-$1}
    [[ $ITERATIONS =~ ^[0-9]+$ ]] && ((ITERATIONS >= 2)) ||
        fail "ITERATIONS is '$ITERATIONS'; it must be a number, 2 or more"
}

# One part in so many of the run, at least an iteration.
every() { echo $((ITERATIONS < $1 ? 1 : ITERATIONS / $1)); }

on_cpu() {
    RUNNER=("$PYTHON" -m megatron_mhc.run --cpu)
    export TORCHDYNAMO_DISABLE=1
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
}

on_gpus() {
    RUNNER=("$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS")
    if ((NODES > 1)); then
        RUNNER+=(--nnodes "$NODES" --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}")
    else
        RUNNER+=(--standalone)
    fi
    RUNNER+=(-m megatron_mhc.run)
    [ "${CHECK:-0}" = 1 ] || "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
        fail "no CUDA device here that the torch of $PYTHON sees: examples/gpt/tiny.sh and examples/moe/tiny.sh train on the CPU," \
            "CHECK=1 looks at the flags"
    [ "${CHECK:-0}" = 1 ] || "$PYTHON" -c 'import transformer_engine' 2>/dev/null ||
        fail "no Transformer Engine, which these flags want: $PYTHON -m pip install wheel pybind11 ninja &&" \
            "$PYTHON -m pip install --no-build-isolation -e '.[te]'"
    DEVICE_ARGS=(
        --transformer-impl transformer_engine
        --bf16
        --use-distributed-optimizer
        --overlap-grad-reduce
        --overlap-param-gather
        # Apex has the fused kernel that Megatron asks for.
        --no-gradient-accumulation-fusion
    )
}

# The sources of Python's standard library, a token a byte; further words go to prepare_data.py.
byte_data() {
    DATA=$RUNS/data/${1:-stdlib}
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
    [ "${CHECK:-0}" = 1 ] || "$PYTHON" examples/prepare_data.py --output "$DATA" "${@:2}"
}

SAVE_ARGS=(
    --save "$RUN/checkpoints"
    --load "$RUN/checkpoints"
    --ckpt-format torch_dist
    --tensorboard-dir "$RUN/tensorboard"
    --log-throughput
    # Warnings only; Megatron's iteration log is printed, not logged.
    --logging-level 30
)

# What a reader wants to see of all that Megatron prints; the log file keeps the rest.
show() {
    # grep, as some awks hold back what they read until there is much of it
    tee -a "$RUN/train.log" | {
        grep -a --line-buffered -E 'mHC is|number of parameters on| iteration +[0-9]+/|validation loss|Error|^sample: |successfully (saved|loaded)|exiting program' ||
            [ $? = 1 ]
    }
}

launch() {
    local flags=("$@")
    if [ "${CHECK:-0}" = 1 ]; then
        WORLD_SIZE=$((GPUS * NODES)) exec "$PYTHON" -m megatron_mhc doctor --args "${flags[@]}"
    fi
    [ -z "${MINUTES:-}" ] || flags+=(--exit-duration-in-mins "$MINUTES")
    mkdir -p "$RUN"
    printf '%q ' "${RUNNER[@]}" "$SCRIPT" "${flags[@]}" >"$RUN/$([[ $SCRIPT = */sample.py ]] && echo sample-)command"
    trap 'tail -n 20 "$RUN/train.log"; echo "failed; all that was printed: $RUN/train.log" >&2' ERR
    "${RUNNER[@]}" "$SCRIPT" "${flags[@]}" 2>&1 | show
}
