"""Launches of `examples/pretrain_gpt.py`: where it is, the flags of all, what a log says."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples/pretrain_gpt.py"
"""Below ROOT, where launches start."""
FLAGS = """
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --num-workers 0 --eval-iters 0 --eval-interval 1000
    --log-interval 1 --seed 7 --no-gradient-accumulation-fusion
"""
"""A dense model on mock data; a line of the log a step."""


def losses(log: str) -> list[str]:
    """The loss of each step, as printed."""
    return re.findall(r"iteration +\d+/.*?lm loss: (\S+)", log)


def norms(log: str) -> list[str]:
    """The gradient norm of each step, as printed."""
    return re.findall(r"grad norm: (\S+)", log)


def steps(log: str) -> list[tuple[str, str]]:
    """Loss and gradient norm of each step that has printed both."""
    return re.findall(r"iteration +\d+/.*?lm loss: (\S+).*?grad norm: (\S+)", log)


def step_times(log: str) -> list[float]:
    """Milliseconds of each step."""
    return [float(t) for t in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log)]


def peak_gib(log: str) -> float:
    """The most memory that a rank reports, in GiB; 0 where none does."""
    found = re.findall(r"mem-max-allocated-gigabytes: ([\d.]+)|max allocated: ([\d.]+)", log)
    return max((float(a or float(b) / 1024) for a, b in found), default=0.0)


def errors(log: str) -> list[str]:
    """The lines of the exceptions that ended a launch."""
    return re.findall(r"\w*(?:Error|Exception): .+", log)
