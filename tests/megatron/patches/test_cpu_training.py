"""Megatron's own training in the stand-in for CUDA: as it should be, with no change of ours."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.common.launch import ROOT, torchrun
from tests.megatron.patches.cpu_stand_in_model import LAYERS, MLA_WIDTHS
from tests.megatron.patches.cpu_stand_in_worker import SPREAD

# every training test of the suite runs inside the stand-in; what it is by itself changes with it
pytestmark = pytest.mark.thorough

WORKER = ("-m", "tests.megatron.patches.cpu_stand_in_worker")

# fp32 sums of some thousand terms in another order, three steps long; the least of the parameters
# moves 2e-4 in these steps and the most 5e-2
ROUNDING = 1e-6


Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One process, then two that start from its weights."""
    folder = tmp_path_factory.mktemp("stand-in")
    torchrun(1, *WORKER, "alone", str(folder))
    torchrun(2, *WORKER, "pair", str(folder))
    return {who: torch.load(folder / f"{who}.pt") for who in ("alone", "pair")}


@pytest.mark.parametrize("name", SPREAD)
def test_two_processes_train_as_one(runs: Runs, name: str) -> None:
    one, two = runs["alone"][name], runs["pair"][name]
    assert two["losses"] == pytest.approx(one["losses"], abs=ROUNDING)
    assert one["after"].keys() == two["after"].keys()
    for key, want in one["after"].items():
        assert (want - one["before"][key]).abs().max() > 100 * ROUNDING, key
        torch.testing.assert_close(two["after"][key], want, rtol=0, atol=ROUNDING, msg=key)


@pytest.mark.parametrize("who", ["alone", "pair"])
def test_full_recompute_drops_out_the_same(runs: Runs, who: str) -> None:
    kept, again, without = runs[who]["recompute"].values()
    assert len(kept) > 10 * LAYERS
    for key, want in kept.items():
        assert torch.equal(again[key], want), key
    # and dropout was there to be repeated
    assert max((kept[key] - without[key]).abs().max() for key in kept) > 1e-2


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of [tokens, batch, heads, width] by the formula."""
    width = MLA_WIDTHS["qk_head_dim"] + MLA_WIDTHS["qk_pos_emb_head_dim"]
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / width**0.5
    later = torch.ones_like(scores[0, 0]).triu(1).bool()
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def test_mla_attention_is_the_formula(runs: Runs) -> None:
    mla = runs["alone"]["mla"]
    inputs = [tensor.double().requires_grad_() for tensor in mla["inputs"]]
    assert [tensor.shape[-1] for tensor in inputs] == [24, 24, 12]
    want = attention(*inputs)
    want.square().sum().backward()
    # fp32 against float64: some 1e-6 of the largest entry
    pairs = [(mla["output"], want)]
    pairs += [(got, tensor.grad) for got, tensor in zip(mla["gradients"], inputs, strict=True)]
    for got, expected in pairs:
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )
    assert mla["default scale"] == pytest.approx(25**-0.5)


def test_mla_trains(runs: Runs) -> None:
    losses = runs["alone"]["mla"]["losses"]
    assert losses[-1] < losses[0] - 0.2


FLAGS = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 6
    --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --split 90,5,5
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --eval-iters 1 --eval-interval 100 --log-interval 1 --log-memory-interval 1 --nvtx-ranges
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 2
"""


def logged(output: str, iteration: int, what: str) -> float:
    """A number of Megatron's own log line."""
    line = re.search(rf"iteration +{iteration}/.*", output)
    assert line, output[-4000:]
    number = re.search(rf"{what}: +(\S+)", line[0])
    assert number, line[0]
    return float(number[1])


def test_megatrons_training_loop_in_bf16_resumes(tmp_path: Path) -> None:
    script = str(ROOT / "examples/pretrain_gpt.py")
    command = (*WORKER, "train", script, *FLAGS.split())
    whole = torchrun(2, *command, "--save", str(tmp_path), "--save-interval", "4")
    rest = torchrun(2, *command, "--load", str(tmp_path), "--ckpt-step", "4")
    assert logged(whole, 6, "lm loss") < logged(whole, 1, "lm loss") - 0.2
    assert not re.search(r"iteration +4/", rest)
    # printed with seven digits and four; Megatron's first two losses after a start are averaged
    assert logged(rest, 5, "lm loss") == logged(whole, 5, "lm loss")
    assert logged(rest, 6, "grad norm") == logged(whole, 6, "grad norm")
    losses = [re.findall(r"validation loss .*value: (\S+)", output) for output in (whole, rest)]
    assert losses[0] == losses[1] and losses[0]
    assert "CPU RNG state changed" not in whole
