"""Trains models of several sets of flags in one launch, one after the other, round after round.

    torchrun --nproc-per-node 4 -m megatron_mhc.run benchmarks/multi_gpu/rounds.py \\
        --rounds 3 --variants variants.json COMMON FLAGS

`variants.json` is an object of names and the flags that each adds. Steps of several GPUs differ by
20 % from launch to launch; in one launch only what the flags change differs. Every variant has the
same parallel layout: the process groups are made once. Megatron prints the steps, each variant
behind a line `== round NUMBER NAME`. `--trace FOLDER` adds a round in which PyTorch's profiler
watches a step on every rank; its traces lie in FOLDER/NAME/torch_profile, and
`benchmarks/pipeline/timeline.py` draws them.
"""

import argparse
import gc
import json
import os
import runpy
import sys
from pathlib import Path
from types import FunctionType

import torch
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.training.global_vars import destroy_global_vars

# the search path stays the training script's own: nothing of benchmarks/ is imported here
PRETRAIN = Path(__file__).resolve().parents[2] / "examples" / "pretrain_gpt.py"
TRACED_STEP = 5
LARGE = 1 << 28
"""Bytes: more than the workspaces that libraries keep for the process."""
HOOK = "DistributedDataParallel._make_backward_post_hook"


def empty_hooks() -> None:
    """Let go of the models that hooks on autograd's nodes hold.

    Megatron's data parallelism makes those hooks. Python's collector does not see through nodes,
    and every model would stay.
    """
    for thing in gc.get_objects():
        # no isinstance: it asks a weak proxy's target, which may be gone
        if type(thing) is FunctionType and thing.__qualname__.startswith(HOOK):
            for cell in thing.__closure__ or ():
                cell.cell_contents = None


def free_tensors(device: str = "cuda") -> None:
    """Free what something still holds of a run on devices of this type: nothing will read it again.

    Parameters, what optimizers keep, and any large tensor. A model with mHC on a last stage is
    still whole in the process when its training has ended, optimizer and all; Python's collector
    does not see by what it is held. (After expert-parallel overlap ordinary ones seem to be too.)
    """
    for thing in gc.get_objects():
        kind, tensors = type(thing), []
        if issubclass(kind, torch.Tensor):
            is_large = thing.device.type == device and thing.untyped_storage().nbytes() > LARGE
            tensors = [thing] if is_large or issubclass(kind, torch.nn.Parameter) else []
        elif issubclass(kind, torch.optim.Optimizer):
            tensors = [p for group in thing.param_groups for p in group["params"]]
            tensors += [one for state in thing.state.values() for one in state.values()]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == device:
                tensor.untyped_storage().resize_(0)


def forget() -> None:
    """Give up what Megatron keeps of a run in its process, but for the process groups."""
    empty_hooks()
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    gc.collect()
    free_tensors()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def train(number: int | str, name: str, flags: list[str]) -> None:
    """Train with these flags, as the command line of the script would."""
    last = int(os.environ["WORLD_SIZE"]) - 1  # the rank that prints the steps
    if int(os.environ["RANK"]) == last:
        print(f"== round {number} {name}", flush=True)
    sys.argv = [str(PRETRAIN), *flags]
    runpy.run_path(str(PRETRAIN), run_name="__main__")
    forget()


def main() -> None:
    """Every variant, `--rounds` times, and once more under the profiler if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what it does not know is Megatron's
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all variants (default: 3)")
    parser.add_argument("--variants", type=Path, required=True, help="a JSON file, as above")
    parser.add_argument("--trace", type=Path, help="a folder for the profiler's traces")
    options, common = parser.parse_known_args()
    variants: dict[str, str] = json.loads(options.variants.read_text())
    for number in range(options.rounds):
        for name, flags in variants.items():
            train(number, name, [*common, *flags.split()])
    if options.trace:
        for name, flags in variants.items():
            folder = options.trace / name
            profiler = [
                *("--profile", "--use-pytorch-profiler", "--tensorboard-dir", str(folder / "logs")),
                *("--profile-step-start", str(TRACED_STEP)),
                *("--profile-step-end", str(TRACED_STEP + 1)),
                *("--profile-ranks", *map(str, range(int(os.environ["WORLD_SIZE"])))),
                *("--train-iters", str(TRACED_STEP + 2)),
            ]
            train("traced", name, [*common, *flags.split(), *profiler])


if __name__ == "__main__":
    main()
