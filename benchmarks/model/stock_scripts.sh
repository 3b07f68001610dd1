#!/usr/bin/env bash
# Trains mHC through an unmodified pretrain_gpt.py of Megatron-LM, each way of turning it on, and
# through pretrain_hybrid.py with the same layers, by flags alone: tiny, on the CPU, on mock data.
# Prints the losses and compares them.
#
#   PYTHON=.venv/bin/python benchmarks/model/stock_scripts.sh MEGATRON_LM TAG
#
# MEGATRON_LM is a clone of NVIDIA/Megatron-LM, TAG core_v0.19.0, say; the scripts are read from it,
# Megatron itself is what PYTHON imports: the installed package, or a checkout on PYTHONPATH.
set -euo pipefail
[[ ${1:-} != -h && ${1:-} != --help ]] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/../.."
MEGATRON_LM=${1:?the folder of a clone of Megatron-LM} TAG=${2:?a tag, such as core_v0.19.0}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 PYTHONWARNINGS=ignore

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
files=(pretrain_gpt.py gpt_builders.py model_provider.py)
hybrid_files=(pretrain_hybrid.py hybrid_builders.py)
git -C "$MEGATRON_LM" cat-file -e "$TAG:pretrain_hybrid.py" 2>/dev/null || hybrid_files=()
for file in "${files[@]}" "${hybrid_files[@]}"; do
    git -C "$MEGATRON_LM" show "$TAG:$file" >"$work/$file"
done
# The runner has --cpu; for the other two ways, a line makes the CPU stand in for CUDA.
run_stock='import runpy, sys; runpy.run_path(sys.path[0] + "/pretrain_gpt.py", run_name="__main__")'
on_cpu='from megatron_mhc.patches import cpu; cpu.enter()'
printf '%s\n' "$on_cpu" 'import megatron_mhc.auto' "$run_stock" >"$work/by_auto.py"
printf '%s\n' "$on_cpu" "$run_stock" >"$work/by_spec.py"
printf '%s\n' "$on_cpu" "${run_stock/gpt/hybrid}" >"$work/hybrid_by_spec.py"

MODEL_ARGS=(
    --num-layers 4 --hidden-size 64 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
)
TRAINING_ARGS=(
    --micro-batch-size 2 --global-batch-size 8 --train-iters 5 --lr 1e-2 --log-interval 1
    --eval-iters 0 --eval-interval 10 --num-workers 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127
)
# What a CPU needs: no fused kernel, no compiler, gloo.
CPU_ARGS=(
    --transformer-impl local --distributed-backend gloo --disable-jit-fuser
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm
    --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
)
PIPELINE_ARGS=(--pipeline-model-parallel-size 2)
RUNNER=(-m megatron_mhc.run --cpu "$work/pretrain_gpt.py")
# the GPT's layers, two by two; Megatron's random weights come in the same order
HYBRID=(-m megatron_mhc.run --cpu "$work/pretrain_hybrid.py" --mhc)
STACK=(--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec)

train() { # train NAME PROCESSES PROGRAM... : the flags of all runs are added
    local name=$1 processes=$2 program=("${@:3}")
    printf '\n== %s, %s process(es)\n   %s FLAGS\n' "$name" "$processes" "${program[*]//$work\//}"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        "${program[@]}" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${CPU_ARGS[@]}" \
        >"$work/$name.log" 2>&1 || { tail -n 30 "$work/$name.log"; exit 1; }
    grep 'mHC is on' "$work/$name.log" || echo '   (no mHC)'
    grep -oE 'lm loss: [^ ]+' "$work/$name.log" | cut -d' ' -f3 >"$work/$name.losses"
    printf '   losses: %s\n' "$(paste -sd' ' "$work/$name.losses")"
}
same() { # same NAME OTHER : fails where their losses differ in a digit
    cmp "$work/$1.losses" "$work/$2.losses"
    echo "   the losses of $2, digit for digit"
}

"$PYTHON" -c 'from importlib.metadata import version as v; import platform
from megatron_mhc.patches.supported_versions import megatron_core_version
print(f"Megatron-Core {megatron_core_version()}, PyTorch {v("torch")}, Python {platform.python_version()}")'
echo "pretrain_gpt.py of $TAG; FLAGS: ${MODEL_ARGS[*]} ${TRAINING_ARGS[*]} ${CPU_ARGS[*]}"
train ordinary 1 "${RUNNER[@]}"
train runner 1 "${RUNNER[@]}" --mhc
train auto 1 "$work/by_auto.py" --mhc && same auto runner
train spec 1 "$work/by_spec.py" --spec megatron_mhc.spec gpt_layer_spec && same spec runner
train recompute 1 "${RUNNER[@]}" --mhc --mhc-recompute 1 && same recompute runner
train pipeline 2 "${RUNNER[@]}" "${PIPELINE_ARGS[@]}" --mhc
train overlap 2 "${RUNNER[@]}" "${PIPELINE_ARGS[@]}" --mhc --mhc-overlap-p2p && same overlap pipeline
train overlap-recompute 2 "${RUNNER[@]}" "${PIPELINE_ARGS[@]}" --mhc --mhc-overlap-p2p \
    --mhc-recompute 1 && same overlap-recompute pipeline
((${#hybrid_files[@]})) || { echo "$TAG has no pretrain_hybrid.py"; exit 0; }
train hybrid 1 "${HYBRID[@]}" "${STACK[@]}" --hybrid-layer-pattern '*-*-*-*-' && same hybrid runner
train hybrid-spec 1 "$work/hybrid_by_spec.py" --hybrid-layer-pattern '*-*-*-*-' \
    --spec megatron_mhc.spec hybrid_stack_spec && same hybrid-spec hybrid
train hybrid-pipeline 2 "${HYBRID[@]}" "${STACK[@]}" "${PIPELINE_ARGS[@]}" \
    --hybrid-layer-pattern '*-*-|*-*-' && same hybrid-pipeline pipeline
