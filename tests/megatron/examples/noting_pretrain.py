"""`examples/pretrain_gpt.py`, which keeps the hyper-connections of a run's first forward pass.

They are in `first_forward_ITERATION.pt` beside the --save folder, by the names of the model.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(1, str(Path(__file__).parents[3] / "examples"))

import pretrain_gpt
from megatron.training import get_args

of_the_example = pretrain_gpt.forward_step
kept: set[Path] = set()


@functools.wraps(of_the_example)
def forward_step(data_iterator: Any, model: Any, *more: Any) -> tuple[Any, Any]:
    """The example's; before the first one of this process it writes the file."""
    if not kept:
        args = get_args()
        file = Path(args.save).with_name(f"first_forward_{args.iteration}.pt")
        kept.add(file)
        parameters = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        ours = {
            n: p.detach() for n, p in parameters.items() if "_connection." in n or ".head." in n
        }
        torch.save(ours, file)
    return of_the_example(data_iterator, model, *more)


pretrain_gpt.forward_step = forward_step

if __name__ == "__main__":
    pretrain_gpt.main()
