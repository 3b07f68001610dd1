"""A Transformer layer whose residual is n streams, through Megatron's own slots.

The way of a token: the first layer replicates the embedding into n streams (entry); each site reads
them in front of its norm (`Site.read`) and writes to them where the residual was added
(`Site.write`); the last layer contracts them (exit). Between layers they are one tensor
[s, b, n*C], stream-major: index j*C + c (`columns` says what may stand behind them). A layer of
multi-token prediction, which gets one stream (the last layer's, normed and projected with the next
token's embedding), is entry and exit at once.
"""

import functools
import pkgutil
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_mhc import kernels
from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.recompute_plan import Plan, plan

from .compatibility import check_transformer_config, holds_attention_alone
from .config_marks import mark_streams
from .connection import Head, HyperConnection
from .graphs import GraphedLayer
from .recompute import Block
from .site import Site
from .stored_settings import StoredSettings


class MHCLayer(GraphedLayer):
    """Mixed into a TransformerLayer class by `mhc_layer`: two sites; entry and exit by position.

    Args:
        mhc: the settings; the rest as for the TransformerLayer class.

    Attributes:
        is_any_built: of the class: whether this process has built a layer with sites.
        fuses_inside: whether the first site may compute the second one's input.
        fuses_with_next: whether the last site may compute the input of the next layer's first one.

    Raises:
        ValueError: the model's configuration has something that mHC cannot work with.
    """

    is_any_built = False

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
        self.attention_site = Site(self.attention_connection, self.input_layernorm)
        self.mlp_site = Site(self.mlp_connection, self.pre_mlp_layernorm)
        _ask_the_norms_again(self)
        self.self_attn_bda = self.attention_site.write
        self.mlp_bda = self.mlp_site.write
        if holds_attention_alone(config):
            self.graph_attention_alone()
        self.fuses_inside = _is_one_region(config, isinstance(self.mlp, MoELayer))
        self.attention_site.following = self.mlp_site if self.fuses_inside else None
        self.fuses_with_next = not self.is_mtp and _runs_on_into_the_next(config)
        self.recompute_plan: Plan | None = None
        if mhc.recompute is not None:
            norms = (self.input_layernorm, self.pre_mlp_layernorm)
            self.recompute_plan = plan(
                config,
                mhc,
                norms=sum(not isinstance(norm, IdentityOp) for norm in norms),
                stage=get_pg_rank(self.pg_collection.pp),
            )
            block = Block(self.sites, mhc.backend)
            for site in self.sites:
                site.block = block  # until `arrange` knows the layers beside this one
        if (self.is_mtp or self.layer_number == config.num_layers) and mhc.learned_head:
            self.head = Head(mhc, config.hidden_size, sequence_parallel=config.sequence_parallel)
        self.set_place(
            is_entry=self.is_mtp or self.layer_number == 1,
            is_exit=self.is_mtp or self.layer_number == config.num_layers,
        )
        MHCLayer.is_any_built = True

    @property
    def sites(self) -> tuple[Site, Site]:
        """The sites in the order in which they run."""
        return self.attention_site, self.mlp_site

    @property
    def is_entry(self) -> bool:
        """Whether one stream comes in, to be replicated."""
        return self.attention_site.is_entry

    @property
    def is_exit(self) -> bool:
        """Whether the streams are contracted to one behind this layer."""
        return self.mlp_site.contract is not None

    @property
    def recompute_block(self) -> Block | None:
        """The block that this layer's streams are dropped and rebuilt in, if any."""
        return self.mlp_site.block

    def set_place(self, *, is_entry: bool, is_exit: bool) -> None:
        """Say whether one stream comes into this layer, and whether one leaves it."""
        self.attention_site.is_entry = is_entry
        if is_exit != self.is_exit:
            self.mlp_site.contract = self._contract if is_exit else None

    def _contract(self, x: Tensor, h_pre: Tensor | None = None) -> Tensor:
        """Streams [s, b, n, C] -> one stream [s, b, C], the model's last; h_pre [s, b, n] of the
        last site where sites are delayed."""
        if self.mhc.end == "last_pre":
            assert h_pre is not None
            return kernels.aggregate(x, h_pre, backend=self.mhc.backend)
        return self.head(x) if self.mhc.learned_head else x.mean(-2)

    def forget(self) -> None:
        """Let go of what a forward left that ended before its time."""
        for site in self.sites:
            site.forget()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """TransformerLayer.forward on [s, b, n*C]; the first takes, the last gives [s, b, C].

        Raises:
            ValueError: inference over several pipeline stages, which exchange one stream there.
        """
        inference = kwargs.get("inference_context") or kwargs.get("inference_params")
        if inference is not None and self.config.pipeline_model_parallel_size > 1:
            raise ValueError(
                "Megatron's inference sends one stream between pipeline stages, and mHC has"
                f" {self.mhc.num_streams}: load the checkpoint with"
                " --pipeline-model-parallel-size 1"
            )
        try:
            return super().forward(hidden_states, *args, **kwargs)
        except BaseException:
            self.forget()
            self.mlp_norm_manager = None  # where Megatron (0.19) keeps what its MLP's norm reads
            raise

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


def _ask_the_norms_again(layer: TransformerLayer) -> None:
    """Megatron, from 0.20 on, asks each norm once, while it builds the layer: before the sites."""
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        answer = f"_{norm}_returns_residual"
        if hasattr(layer, answer):
            setattr(layer, answer, getattr(layer, norm).returns_residual)


def _runs_on_into_the_next(config: Any) -> bool:
    """Whether a layer and the next one run in one autograd region, outside any graph.

    The next site's input, left on it by this layer, would have no gradient across a checkpoint,
    would be stale across a CUDA graph, and would belong to another node of a schedule. Whole-layer
    offloading brings a layer's tensors back when its output's gradient is there: before that of
    such an input, which comes from inside the next layer.
    """
    is_graph = config.cuda_graph_impl in ("local", "transformer_engine")
    is_graph = is_graph and not holds_attention_alone(config)
    is_apart = config.overlap_moe_expert_parallel_comm or config.cpu_offloading
    return config.recompute_granularity != "full" and not (is_graph or is_apart)


def _is_one_region(config: Any, is_moe: bool) -> bool:
    """Whether a layer's residual slot of attention and norm slot of the MLP are in one region.

    The nodes of expert-parallel overlap end behind an MoE layer's router, and in front of a dense
    layer's MLP. Transformer Engine's graphs may hold the MLP's part alone.
    """
    if config.overlap_moe_expert_parallel_comm and not is_moe:
        return False
    if config.cuda_graph_impl != "transformer_engine" or holds_attention_alone(config):
        return True
    held = {module.name for module in config.cuda_graph_modules}
    return not held or {"attn"} < held & {"attn", *(("moe", "moe_router") if is_moe else ("mlp",))}


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
    if getattr(base, "supports_mhc_connections", False):
        raise ValueError(
            f"{base.__name__} is a layer of Megatron's own mHC: give with_mhc an ordinary one"
        )
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
