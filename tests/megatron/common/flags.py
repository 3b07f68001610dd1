"""Flags of Megatron's training scripts that several tests share, and what their logs say."""

import re

from tests.megatron.common.launch import ROOT, RUNNER

SCRIPT = "examples/pretrain_gpt.py"
SOURCE = (ROOT / SCRIPT).read_text()
STAND_IN = "from megatron_mhc.patches import cpu\ncpu.enter()\n"
"""In front of a script that runs without the runner."""

_TINY_MODEL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--micro-batch-size", "2"),
]
_ON_CPU = [
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "63"),
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--disable-jit-fuser"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-persist-layer-norm"),
    *("--no-bias-gelu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion"),
    *("--num-workers", "0"),
]
TINY = [
    *_TINY_MODEL,
    *("--train-iters", "3", "--lr", "1e-2", "--log-interval", "1"),
    *("--eval-iters", "0", "--eval-interval", "10"),
    *_ON_CPU,
]
"""Three steps of a tiny model."""

RUN = [*RUNNER, SCRIPT, *TINY]
RESUMED = [
    *_TINY_MODEL,
    *("--global-batch-size", "4", "--train-iters", "7", "--lr", "2e-2", "--weight-decay", "0.1"),
    *("--eval-iters", "0", "--eval-interval", "10", "--log-interval", "1"),
    *_ON_CPU,
    *("--bf16", "--ckpt-format", "torch_dist", "--mhc"),
]
"""Seven steps, to be stopped after three, in bf16 with mHC."""

DISTRIBUTED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
MOE = [
    *("--micro-batch-size", "1", "--num-experts", "4", "--moe-router-topk", "2"),
    *("--moe-router-load-balancing-type", "none"),
]
ROPE = ["--position-embedding-type", "rope"]
HYBRID_SCRIPT = "examples/pretrain_hybrid.py"
HYBRID_SPEC = ["--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
HYBRID = [*HYBRID_SPEC, "--hybrid-layer-pattern", "*-*-"]
"""A HybridModel of the layers of `TINY`'s GPT; beside `ROPE`."""
SPEC = ["--spec", "megatron_mhc.spec", "gpt_layer_spec"]
BANNER = (
    "> mHC is on: 4 streams, variant mhc, convention paper, 20 Sinkhorn iterations, init residual,"
    " backend torch, because Triton needs a CUDA device and the tensors are on 'cpu'; 4 sites,"
    " 12,396 extra parameters (settings from flags)"
)
"""Of `TINY`."""


def losses(printed: str) -> list[str]:
    """The training losses in Megatron's iteration log, digit for digit."""
    return re.findall(r"iteration +\d+/.*?lm loss: (\S+)", printed)


def numbered_losses(printed: str) -> list[tuple[int, str]]:
    """The iterations of Megatron's log with their training loss, as it was printed."""
    found = re.findall(r" iteration +(\d+)/ .*? lm loss: (\S+)", printed)
    return [(int(iteration), loss) for iteration, loss in found]


def training_log(printed: str) -> list[str]:
    """Megatron's lines of every iteration (losses, norms, rates), without what a clock says."""
    # another rank may go on in the line
    lines = re.findall(r"iteration +\d+/.*?nan iterations: +\d+", printed)
    return [re.sub(r"elapsed time[^|]*\|", "", line) for line in lines]
