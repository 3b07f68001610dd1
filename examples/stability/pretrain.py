"""The main script of the evidence: `examples/pretrain_gpt.py`, and three things more.

Every validation reads the same samples. The gradients and updates of mHC's parameters are written
to `mhc_updates.jsonl` in --tensorboard-dir, at the steps of --mhc-log-interval. And two flags for
ablations, beside Megatron's:

    python -m megatron_mhc.run examples/stability/pretrain.py FLAGS --mhc --static
    python -m megatron_mhc.run examples/stability/pretrain.py FLAGS --mhc --rate-factor 10
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

sys.path.insert(1, str(Path(__file__).parents[1]))

import pretrain_gpt
from megatron.training import get_args
from study.updates import Watch


class Again(Dataset):
    """The first `size` samples of a dataset, over and over: what every validation reads."""

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset, self.size, self.length = dataset, size, len(dataset)
        self.split = dataset.index_split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % self.size]


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """The training and validation data; the latter are the same samples every time."""
    args = get_args()
    train, valid, test = pretrain_gpt.datasets_provider(num_samples, vp_stage)
    if valid is not None:
        valid = Again(valid, args.eval_iters * args.global_batch_size)
    return train, valid, test


datasets.is_distributed = True  # type: ignore[attr-defined]


def main() -> None:
    """Reads the flags and trains."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--rate-factor", type=float, default=1.0)
    own, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    Watch(static=own.static, rate_factor=own.rate_factor).register()
    pretrain_gpt.main(datasets)


if __name__ == "__main__":
    main()
