"""The main script of the evidence: `examples/pretrain_gpt.py`, and three things more.

Every validation of every seed reads the same samples. The gradients and updates of mHC's parameters
are written to `mhc_updates.jsonl` in --tensorboard-dir, at the steps of --mhc-log-interval. And
flags for ablations, beside Megatron's:

    python -m megatron_mhc.run examples/stability/pretrain.py FLAGS --mhc --static
    python -m megatron_mhc.run examples/stability/pretrain.py FLAGS --mhc --rate-factor 10
    python -m megatron_mhc.run examples/stability/pretrain.py FLAGS --mhc --phi-std 0.02

phi stays at zero; alpha and b take steps ten times as long; phi starts at random.
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

VALIDATION_SEED = 0


class Again(Dataset):
    """`length` samples, for one validation after another: the first `size` of a dataset."""

    def __init__(self, dataset: Any, size: int, length: int) -> None:
        self.dataset, self.size, self.length = dataset, size, length
        self.split = dataset.index_split

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % self.size]


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """The training data, and validation data: the same samples every time, for all seeds."""
    args = get_args()
    size = args.eval_iters * args.global_batch_size
    train, *_ = pretrain_gpt.datasets_provider(num_samples, vp_stage)
    _, valid, _ = pretrain_gpt.datasets_provider([1, size, 0], vp_stage, seed=VALIDATION_SEED)
    return train, Again(valid, size, num_samples[1]), None


datasets.is_distributed = True  # type: ignore[attr-defined]


def main() -> None:
    """Reads the flags and trains."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--rate-factor", type=float, default=1.0)
    parser.add_argument("--phi-std", type=float, default=0.0)
    own, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    Watch(own.static, own.rate_factor, own.phi_std).register()
    pretrain_gpt.main(datasets)


if __name__ == "__main__":
    main()
