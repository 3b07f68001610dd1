"""DeepSeek's mHC (manifold-constrained hyper-connections, arXiv 2512.24880) for Megatron-Core."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "kernels").is_dir():
    # Started inside a checkout, Python takes this folder, whatever is installed; kernels/ and
    # patches/ stand beside it there, not in it.
    __path__.append(str(_CHECKOUT))

from .config import MHCConfig  # noqa: E402

if TYPE_CHECKING:
    from .spec import with_mhc

__version__ = "0.2.0"
__all__ = ["MHCConfig", "with_mhc"]


def __getattr__(name: str) -> Any:
    # on first use, so that `import megatron_mhc` (and the stand-in for CUDA) comes before Megatron
    if name == "with_mhc":
        from .spec import with_mhc

        return with_mhc
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
