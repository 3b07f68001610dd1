"""Step time and memory of a Megatron-Core GPT with mHC beside the ordinary one, on one GPU.

    python benchmarks/model/layers.py --json layers.json

Forward and backward of whole models with Transformer Engine's layer spec in bf16: ordinary, mHC
with Triton kernels, and (with --reference) mHC with the PyTorch reference. CUDA events, the median
of --steps steps after three that warm up; peak memory by PyTorch's allocator. `--train N` instead
trains N steps from the same start with both backends and prints both curves.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_mhc import MHCConfig, with_mhc
from megatron_mhc.metrics import strict_json

VOCABULARY = 1024


def build(options: argparse.Namespace, mhc: MHCConfig | None, **settings: Any) -> torch.nn.Module:
    """The model of these options in bf16, from the same seed every time.

    Args:
        settings: of TransformerConfig, beyond the options'.
    """
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=options.ffn,
        num_attention_heads=options.heads,
        num_query_groups=options.groups,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        **settings,
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    spec = get_gpt_layer_with_transformer_engine_spec()
    model = GPTModel(
        config,
        spec if mhc is None else with_mhc(spec, mhc),
        vocab_size=VOCABULARY,
        max_sequence_length=options.sequence,
        position_embedding_type="rope",
    )
    return Float16Module(config, model.cuda())


def loss_of(model: torch.nn.Module, options: argparse.Namespace, tokens: torch.Tensor) -> Any:
    """Mean loss of [b, sequence + 1] tokens."""
    positions = torch.arange(options.sequence, device="cuda").expand(len(tokens), -1)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean()


def measure(options: argparse.Namespace, mhc: MHCConfig | None) -> dict[str, float]:
    """Median milliseconds of forward, and of forward and backward; memory in GiB."""
    model = build(options, mhc)
    tokens = torch.randint(0, VOCABULARY, (options.batch, options.sequence + 1), device="cuda")
    forward, whole = [], []
    held = 0.0
    for step in range(options.steps + 3):
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        before = torch.cuda.memory_allocated()
        begin.record()
        loss = loss_of(model, options, tokens)
        middle.record()
        held = (torch.cuda.memory_allocated() - before) / 2**30
        loss.backward()
        end.record()
        torch.cuda.synchronize()
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        if step > 2:
            forward.append(begin.elapsed_time(middle))
            whole.append(begin.elapsed_time(end))
    result = {
        "forward_ms": statistics.median(forward),
        "step_ms": statistics.median(whole),
        "spread_ms": max(whole) - min(whole),
        "activations_gib": held,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "parameters_gib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30,
    }
    del model, loss
    torch.cuda.empty_cache()
    return result


def train(options: argparse.Namespace, mhc: MHCConfig) -> list[float]:
    """Losses of `--train` Adam steps on random bytes with a pattern to learn."""
    model = build(options, mhc)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    generator = torch.Generator(device="cuda").manual_seed(5)
    losses = []
    for _ in range(options.train):
        shape = (options.batch, 1)
        start, stride = (
            torch.randint(0, VOCABULARY, shape, device="cuda", generator=generator) for _ in "12"
        )
        steps = torch.arange(options.sequence + 1, device="cuda")
        tokens = (start + (stride % 7 + 1) * steps) % VOCABULARY
        loss = loss_of(model, options, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The losses of both backends, and how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 6))
    for backend, losses in curves.items():
        above.plot(losses, "-" if backend == "torch" else "--", label=backend)
    above.set_ylabel("training loss, nats")
    above.legend()
    apart = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    below.semilogy(apart, color="black", linewidth=0.8)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"layers": 8, "hidden": 4096, "ffn": 14336, "heads": 32, "groups": 8}
    for name, default in {**sizes, "sequence": 4096, "batch": 2, "steps": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="compare N steps instead")
    parser.add_argument("--reference", action="store_true", help="time the PyTorch reference too")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--png", type=Path, help="with --train: draw the curves here")
    return parser.parse_args()


def main() -> None:
    """Measure or train, print, and write JSON if asked to."""
    options = parse()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    results: dict[str, Any] = {}
    if options.train:
        for backend in ("torch", "triton"):
            results[backend] = train(options, MHCConfig(backend=backend))
        pairs = list(zip(results["torch"], results["triton"], strict=True))
        for step in sorted(
            {*range(0, options.train, max(1, options.train // 20)), options.train - 1}
        ):
            print(f"step {step:4}  torch {pairs[step][0]:.5f}  triton {pairs[step][1]:.5f}")
        worst = max(abs(a - b) for a, b in pairs)
        print(f"largest difference {worst:.2e}")
        if options.png:
            draw(results, options.png)
    else:
        cases: dict[str, MHCConfig | None] = {"ordinary": None, "mHC": MHCConfig(backend="triton")}
        if options.reference:
            cases["mHC, reference"] = MHCConfig(backend="torch")
        cases["ordinary again"] = None
        columns = ("forward_ms", "step_ms", "spread_ms", "activations_gib", "peak_gib")
        print(f"{'':16}" + "".join(f"{name:>17}" for name in columns) + "   step over ordinary")
        for name, mhc in cases.items():
            results[name] = measure(options, mhc)
            ratio = results[name]["step_ms"] / results["ordinary"]["step_ms"]
            values = "".join(f"{results[name][column]:17.3f}" for column in columns)
            print(f"{name:16}{values}   {ratio:.4f}", flush=True)
    if options.json:
        asked = vars(options) | {"json": "", "png": ""}
        options.json.write_text(strict_json.written({"options": asked, **results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
