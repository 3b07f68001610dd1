"""Megatron's layer classes with mHC: `mhc_layer(TransformerLayer)` is `MHCTransformerLayer`."""

import functools
import pkgutil
from collections.abc import Callable
from typing import Any

from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from .compatibility import holds_attention_alone
from .graphs import GraphedLayer
from .layer import MHCLayer, Slots
from .site import Residual


class TransformerSites(MHCLayer, GraphedLayer):
    """Attention and MLP, either of which may be missing."""

    SLOTS = (
        Slots("attention", "input_layernorm", "self_attn_bda"),
        Slots("mlp", "pre_mlp_layernorm", "mlp_bda"),
    )

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if holds_attention_alone(config):
            self.graph_attention_alone()


class MambaSites(MHCLayer, MambaLayer):
    """A Mamba mixer. Its layer takes no residual from the norm, so that is kept here meanwhile:
    norm slot and residual slot run in one call, which no checkpoint or graph begins or ends in."""

    SLOTS = (Slots("mamba", "norm", "mamba_bda"),)
    _residual: Residual | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.norm.forward = self._read
        self.mamba_bda = self._write

    def _read(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The norm slot: streams [s, b, n*C] -> norm(u) [s, b, C]."""
        normed, self._residual = self.sites[0].read(hidden_states, *args, **kwargs)
        return normed

    def _write(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The residual slot: with what the norm slot kept, not with what the layer hands over."""
        residual, self._residual = self._residual, None
        write = self.sites[0].write(training, fused)
        return lambda output_with_bias, _, dropout: write(output_with_bias, residual, dropout)

    def forget(self) -> None:
        """Let go of what a forward left that ended before its time."""
        super().forget()
        self._residual = None


_SITES: dict[type, type[MHCLayer]] = {TransformerLayer: TransformerSites, MambaLayer: MambaSites}
"""Megatron's layers that add to a residual, and what is mixed into them."""


@functools.cache
def mhc_layer(base: type) -> type[MHCLayer]:
    """The class `MHC<base>`: `base` with the sites of mHC.

    Raises:
        ValueError: base is no TransformerLayer nor MambaLayer, or has mHC already.
    """
    kinds = [kind for kind in _SITES if isinstance(base, type) and issubclass(base, kind)]
    if not kinds:
        raise ValueError(
            f"mHC needs a TransformerLayer and the spec has {base!r} (in a HybridStack it may be a"
            " MambaLayer): give with_mhc the spec of such layers, or of subclasses"
        )
    if issubclass(base, MHCLayer):
        raise ValueError(f"{base.__name__} has mHC already: call with_mhc once")
    if getattr(base, "supports_mhc_connections", False):
        raise ValueError(
            f"{base.__name__} is a layer of Megatron's own mHC: give with_mhc an ordinary one"
        )
    name = f"of.{base.__module__}.{base.__qualname__}"
    names = {"__module__": __name__, "__qualname__": name}
    return type(f"MHC{base.__name__}", (_SITES[kinds[0]], base), names)


class _Path:
    """`of.package.module.Class` is `mhc_layer(Class)`: so pickle and Megatron's yaml find it."""

    def __init__(self, path: str = "") -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}".lstrip(".")
        try:
            found = pkgutil.resolve_name(path)
        except (ImportError, ValueError) as error:
            raise AttributeError(f"there is no {path}") from error
        is_layer = isinstance(found, type) and issubclass(found, tuple(_SITES))
        return mhc_layer(found) if is_layer else _Path(path)


of = _Path()
