"""A Transformer layer whose residual is n streams, through Megatron's own slots.

The way of a token: the first layer replicates the embedding into n streams (entry); each site reads
them in front of its norm (`Site.read`) and writes to them where the residual was added
(`Site.write`); the last layer contracts them (exit). Between layers they are one tensor
[s, b, n*C], stream-major: index j*C + c. A layer of multi-token prediction, which gets one stream
(the last layer's, normed and projected with the next token's embedding), is entry and exit at once.
"""

import functools
import pkgutil
import weakref
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.recompute_plan import Plan, plan

from .compatibility import check_transformer_config
from .config_marks import mark_streams
from .connection import Head, HyperConnection
from .recompute import Block
from .site import Site
from .stored_settings import StoredSettings


class MHCLayer(TransformerLayer):
    """Mixed into a TransformerLayer class by `mhc_layer`: two sites; entry and exit by position.

    Args:
        mhc: the settings; the rest as for the TransformerLayer class.

    Raises:
        ValueError: the model's configuration has something that mHC cannot work with.
    """

    def __init__(self, config: Any, *args: Any, mhc: MHCConfig, **kwargs: Any) -> None:
        check_transformer_config(config, mhc)
        super().__init__(config, *args, **kwargs)
        mark_streams(config, mhc)
        self.mhc = mhc
        self.mhc_settings = StoredSettings(mhc)
        self.chunk = kwargs.get("vp_stage")
        self.is_mtp = bool(kwargs.get("is_mtp_layer"))
        # Megatron numbers the layers of multi-token prediction from 1 again
        first_site = 2 * (self.layer_number - 1 + self.is_mtp * config.num_layers)
        build = functools.partial(
            HyperConnection, mhc, config.hidden_size, sequence_parallel=config.sequence_parallel
        )
        self.attention_connection = build(first_site)
        self.mlp_connection = build(first_site + 1)
        self.attention_site = Site(self.attention_connection)
        self.mlp_site = Site(self.mlp_connection)
        self.input_layernorm.register_forward_pre_hook(self.attention_site.read)
        self.self_attn_bda = self.attention_site.write
        self.pre_mlp_layernorm.register_forward_pre_hook(self.mlp_site.read)
        self.mlp_bda = self.mlp_site.write
        self.attention_site.following = self.mlp_site
        before = _layer_before(self)
        # not under full recompute, nor where a layer is a CUDA graph: what it leaves on the next
        # has no gradient, or is not renewed
        alone = config.recompute_granularity == "full"
        alone |= config.cuda_graph_impl in ("local", "transformer_engine")
        if before is not None and not alone:
            before.mlp_site.following = self.attention_site
        self.recompute_block: Block | None = None
        self.recompute_plan: Plan | None = None
        if mhc.recompute is not None:
            self._join_block(before)
        self.is_entry = self.is_mtp or self.layer_number == 1
        self.is_exit = self.is_mtp or self.layer_number == config.num_layers
        if self.is_exit and mhc.learned_head:
            self.head = Head(mhc, config.hidden_size, sequence_parallel=config.sequence_parallel)

    def _join_block(self, before: "MHCLayer | None") -> None:
        """Drop and rebuild the streams together with the layer before, if its block has room."""
        slots = (self.input_layernorm, self.pre_mlp_layernorm)
        if before is not None:
            block, self.recompute_plan = before.recompute_block, before.recompute_plan
        else:
            block = None
            self.recompute_plan = plan(
                self.config,
                self.mhc,
                norms=sum(not isinstance(norm, IdentityOp) for norm in slots),
                stage=get_pg_rank(self.pg_collection.pp),
            )
        if block is None or not block.has_room():
            assert self.recompute_plan is not None
            block = Block(self.recompute_plan.layers, self.mhc.backend)
        self.recompute_block = block
        for site, norm in zip((self.attention_site, self.mlp_site), slots, strict=True):
            site.block = block
            norm.register_forward_hook(site.keep_normed)
        block.join(self.attention_site, self.mlp_site)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """TransformerLayer.forward on [s, b, n*C]; the first takes, the last gives [s, b, C].

        Raises:
            ValueError: inference over several pipeline stages, which exchange one stream there.
        """
        n = self.mhc.num_streams
        inference = kwargs.get("inference_context") or kwargs.get("inference_params")
        if inference is not None and self.config.pipeline_model_parallel_size > 1:
            raise ValueError(
                "Megatron's inference sends one stream between pipeline stages, and mHC has"
                f" {n}: load the checkpoint with --pipeline-model-parallel-size 1"
            )
        if self.is_entry:
            hidden_states = hidden_states.repeat(1, 1, n)
        try:
            streams, context = super().forward(hidden_states, *args, **kwargs)
        except BaseException:
            for site in (self.attention_site, self.mlp_site):
                site.forget()
            self.mlp_norm_manager = None  # where Megatron (0.19) keeps what its MLP's norm reads
            raise
        if not self.is_exit:
            return streams, context
        x = streams.unflatten(-1, (n, -1))
        return (self.head(x) if self.mhc.learned_head else x.mean(-2)), context

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The layer's, but the head (of the last layer alone) is no slice of a stack of layers."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if hasattr(self, "head"):
            from megatron.core.transformer.utils import sharded_state_dict_default

            head_prefix = f"{prefix}head."
            state = {key: value for key, value in state.items() if not key.startswith(head_prefix)}
            state |= sharded_state_dict_default(self.head, head_prefix, (), metadata, self.tp_group)
        return state


_last_built: weakref.ref[MHCLayer] | None = None


def _layer_before(layer: MHCLayer) -> MHCLayer | None:
    """The layer before this one in its model chunk, if that was the last one built."""
    global _last_built
    before = _last_built() if _last_built is not None else None
    _last_built = weakref.ref(layer)
    is_before = (
        before is not None
        and not (before.is_mtp or layer.is_mtp)
        and before.config is layer.config
        and before.chunk == layer.chunk
        and before.layer_number == layer.layer_number - 1
    )
    return before if is_before else None


def is_any_built() -> bool:
    """Whether this process has built a layer with sites, in whatever model."""
    return _last_built is not None


@functools.cache
def mhc_layer(base: type[TransformerLayer]) -> type[TransformerLayer]:
    """The class `MHC<base>`: `base` with the sites of mHC.

    Raises:
        ValueError: base is no TransformerLayer, or has mHC already.
    """
    if not (isinstance(base, type) and issubclass(base, TransformerLayer)):
        raise ValueError(f"mHC needs a TransformerLayer and the spec has {base!r}")
    if issubclass(base, MHCLayer):
        raise ValueError(f"{base.__name__} has mHC already: call with_mhc once")
    name = f"of.{base.__module__}.{base.__qualname__}"
    names = {"__module__": __name__, "__qualname__": name}
    return type(f"MHC{base.__name__}", (MHCLayer, base), names)


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
        is_layer = isinstance(found, type) and issubclass(found, TransformerLayer)
        return mhc_layer(found) if is_layer else _Path(path)


of = _Path()
