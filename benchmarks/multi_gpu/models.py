"""The models that are launched, as Megatron's flags, and the weights that runs start from."""

import shutil

from benchmarks.multi_gpu.launches import Bench

SMALL = """
    --disable-jit-fuser --num-layers 4 --hidden-size 1024 --ffn-hidden-size 2816
    --num-attention-heads 16
    --seq-length 1024 --max-position-embeddings 1024 --vocab-size 8191
    --micro-batch-size 1 --global-batch-size 8
"""
TINY = """
    --num-layers 8 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --vocab-size 127
    --micro-batch-size 1 --global-batch-size 16 --make-vocab-size-divisible-by 64
"""
LARGE = """
    --num-layers 8 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096
    --vocab-size 8191 --micro-batch-size 1 --global-batch-size 16
"""
PAPER = """
    --num-layers 8 --hidden-size 2560 --ffn-hidden-size 12288 --num-attention-heads 32
    --seq-length 4096 --max-position-embeddings 4096 --vocab-size 8191 --init-method-std 0.006
    --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
    --v-head-dim 128 --qk-layernorm --rope-type rope --no-rope-fusion
    --num-experts 12 --moe-layer-freq ([0]*1+[1]*7) --moe-ffn-hidden-size 1536 --moe-router-topk 6
    --moe-router-score-function sigmoid --moe-router-dtype fp32 --moe-router-enable-expert-bias
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
    --moe-shared-expert-intermediate-size 3072 --moe-grouped-gemm --moe-permute-fusion
    --moe-token-dispatcher-type alltoall
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 1 --global-batch-size 8
"""
"""`examples/moe/cluster.sh`'s layers, fewer, and fewer experts."""
PAPER_EXPERTS = "--num-experts 72 --global-batch-size 16 --moe-router-force-load-balancing"
"""All experts, each with its share of tokens: an untrained router gives a rank many times as many
as another, and that is what one would time."""
TINY_PAPER = """
    --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32 --kv-lora-rank 32
    --max-position-embeddings 32 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
    --moe-ffn-hidden-size 96 --moe-shared-expert-intermediate-size 96 --vocab-size 127
    --make-vocab-size-divisible-by 64 --num-experts 4 --moe-router-topk 2 --bf16
"""
MOE = "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
OVERLAP = "--mhc --mhc-overlap-p2p"
ATTENTION_GRAPHS = "--cuda-graph-impl transformer_engine --cuda-graph-modules attn"
ROUTER_GRAPHS = f"{ATTENTION_GRAPHS} moe_router moe_preprocess"
CUT = "benchmarks/multi_gpu/cut_layers.py"
"""The script of a run whose sites are fused as under graphs of the router or EP overlap."""


def paper_size(bench: Bench) -> str:
    """Flags of the paper's layers; on a CPU small, and without what Transformer Engine fuses."""
    if not bench.cpu:
        return PAPER
    fused = ("--moe-permute-fusion", "--moe-grouped-gemm", "--qk-layernorm")
    return " ".join(flag for flag in PAPER.split() if flag not in fused) + TINY_PAPER


def small_size(bench: Bench, gpus: int) -> str:
    """Flags of the model whose losses are compared; two virtual stages for each of up to 4 GPUs."""
    small = TINY if bench.cpu else SMALL
    return (
        small.replace("--num-layers 4", f"--num-layers {2 * min(gpus, 4)}") if gpus > 2 else small
    )


def save_start(bench: Bench, name: str, flags: str) -> None:
    """Save the weights that `starting` gives to runs of these flags."""
    folder = bench.out / f"weights-{name}"
    # of another call these would be another model's
    shutil.rmtree(folder, ignore_errors=True)
    bench.train(f"weights-{name}", 1, f"{flags} --save {folder} --save-interval 1", 1)


def starting(bench: Bench, name: str, flags: str) -> str:
    """Flags that start a run from weights which one GPU saved, whatever the run is split into.

    Megatron draws a stage's weights by the stage's own seed: without this no losses would agree.
    """
    return (
        f"{flags} --load {bench.out / f'weights-{name}'} --finetune --no-load-optim --no-load-rng"
    )
