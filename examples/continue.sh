# The steps that the scripts in examples/continue/ share: a checkpoint at Hugging Face, in and out.
#
# Environment: as in examples/launch.sh, without MHC, MINUTES and CHECK. The model is that of
# examples/moe/tiny.sh. Every run replaces the folder of the one before.
source examples/launch.sh
iterations 120

[ "$MHC" = 1 ] && [ -z "${MINUTES:-}" ] && [ "${CHECK:-0}" = 0 ] ||
    fail "MHC=0, MINUTES and CHECK are of no use here; examples/moe/tiny.sh takes them"
export PYTHON RUNS RUN ITERATIONS

# Without Megatron's warnings of the packages that a CPU does not need.
ours() { PYTHONWARNINGS=ignore "$PYTHON" "$@"; }

# continue_from MODEL FLAGS: MODEL is one of make_checkpoint.py's, FLAGS go to Megatron.
continue_from() {
    local hf=$RUN/hf model=$1 flags
    shift
    rm -rf "$RUN"

    echo "== $hf: a tiny $model as Hugging Face has it"
    ours examples/continue/make_checkpoint.py "$model" --output "$hf"

    # A mapping of your own writes this from $hf: here an ordinary model, briefly trained.
    echo "== $RUN/rest: all other weights, in a checkpoint of Megatron's without mHC"
    MHC=0 RUN=$RUN/rest examples/moe/tiny.sh --exit-interval "$(every 10)" "$@"

    echo "== $RUN/start: these weights with the hyper-connections of $hf"
    ours -m megatron_mhc convert --from hf "$RUN/rest/checkpoints" "$RUN/start" --hf "$hf" |
        tee "$RUN/convert.txt"
    read -ra flags < <(sed -nE 's/^convert: wrote .*; train with (.*) --load .*/\1/p' "$RUN/convert.txt") ||
        fail "convert printed no flags to train with"

    echo "== training from $RUN/start with ${flags[*]}, to iteration $(every 20) of $ITERATIONS"
    examples/moe/tiny.sh "${flags[@]}" --load "$RUN/start" --exit-interval "$(every 20)" "$@"
    echo "== resuming from its own checkpoint"
    examples/moe/tiny.sh "${flags[@]}" "$@"

    echo "== $RUN/trained: a copy of $hf with the trained hyper-connections in it"
    ours -m megatron_mhc convert --to hf "$RUN/checkpoints" "$RUN/trained" --hf "$hf"
    echo "== how far the hyper-connections went"
    ours examples/continue/compare.py "$hf" "$RUN/start" "$RUN/checkpoints" "$RUN/trained"
}
