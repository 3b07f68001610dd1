"""A Transformer layer whose residual is n streams, through Megatron's own slots.

The way of a token: the first layer replicates the embedding into n streams (entry); each site reads
them in front of its norm (`Site.read`) and writes to them where the residual was added
(`Site.write`); the last layer contracts them (exit). Between layers they are one tensor
[s, b, n*C], stream-major: index j*C + c.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from .compatibility import check_transformer_config
from .config import MHCConfig
from .connection import Ended, Head, HyperConnection
from .pipeline import mark_streams
from .streams import INLINE, Aside, Inline


class _Ahead(NamedTuple):
    """What the site before has computed for this one: its streams [s, b, n*C] and its `pre`."""

    streams: Tensor
    version: int
    u: Tensor
    h_post: Tensor
    h_res: Tensor

    def is_of(self, streams: Tensor) -> bool:
        """Whether these are the same streams, unchanged (`self` keeps their memory from reuse)."""
        return (
            streams.data_ptr() == self.streams.data_ptr()
            and streams.shape == self.streams.shape
            # a viewless copy, which Megatron makes between layers, counts its own changes from 0
            and self.streams._version == self.version
            and streams._version in (0, self.version)
        )


class Site:
    """What a sublayer's norm slot and residual slot share: a connection and the streams it read.

    Where `following` names the next site, `write` computes that one's `pre` too, in one pass over
    the streams, and leaves it there; `read` of the next site takes it if the streams are the same.

    At the ends of a pipeline stage `aside` may name streams that run beside the compute stream: the
    first site's `pre` and the last one's `combine` then run there, and so do their gradients.
    """

    def __init__(self, connection: HyperConnection) -> None:
        self.connection = connection
        self.following: Site | None = None
        self.aside: Aside | Inline = INLINE
        self._pending: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._ahead: _Ahead | None = None

    def read(self, norm: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook of the norm slot: streams [s, b, n*C] become u [s, b, C].

        Raises:
            ValueError: the streams do not have n*C channels.
        """
        streams, *rest = inputs
        n, width = self.connection.mhc.num_streams, self.connection.hidden_size
        if streams.shape[-1] != n * width:
            raise ValueError(
                f"a site got hidden states of width {streams.shape[-1]}; expected"
                f" {n} streams of {width} = {n * width} channels"
            )
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.is_of(streams):
            x = streams.unflatten(-1, (n, width))
            u, h_post, h_res = ahead.u, ahead.h_post, ahead.h_res
        else:
            x, u, h_post, h_res = self.aside.open(self._pre, streams)
        self._pending = (streams, x, h_post, h_res)
        return (u, *rest)

    def _pre(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The streams as [s, b, n, C], and u, h_post and h_res of them."""
        n, width = self.connection.mhc.num_streams, self.connection.hidden_size
        return self.connection(streams.unflatten(-1, (n, width)))

    def _combine(self, x: Tensor, *ended: Any) -> Tensor:
        """The next streams [s, b, n*C], no view: a stage that sent them frees their memory."""
        y = Ended(*ended).combine(x, self.connection.mhc.backend).flatten(-2)
        return make_viewless_tensor(y, requires_grad=y.requires_grad, keep_graph=True)

    def write(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The residual slot, called as Megatron calls `get_bias_dropout_add`."""

        def combine(
            output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
        ) -> Tensor:
            """(f, bias), the streams and F's dropout -> the next streams [s, b, n*C].

            Raises:
                RuntimeError: the residual is not the streams that `read` saw.
            """
            pending, self._pending = self._pending, None
            if pending is None or pending[0] is not residual:
                raise RuntimeError(
                    "a residual slot got other streams than its norm slot read: something between"
                    " the two (a norm that returns its own residual, offloading) replaced them"
                )
            _, x, h_post, h_res = pending
            f, bias = output_with_bias
            if training and dropout > 0:
                f = f if bias is None else f + bias
                f, bias = torch.nn.functional.dropout(f, dropout), None
            ended = Ended(f, h_post, h_res, bias)
            if self.following is None:
                return self.aside.run(self._combine, x, *ended)
            # through the next connection's __call__: only then are its parameters sure to be there
            y, u, h_post, h_res = self.following.connection(x, ended)
            streams = y.flatten(-2)
            self.following._ahead = _Ahead(streams, streams._version, u, h_post, h_res)
            return streams

        return combine


class MHCLayer(TransformerLayer):
    """Mixed into a TransformerLayer class by `mhc_layer`: two sites; entry and exit by position.

    Args:
        mhc: the settings; the rest as for the TransformerLayer class.

    Raises:
        ValueError: the model's configuration has something that mHC cannot work with.
    """

    def __init__(self, config: Any, *args: Any, mhc: MHCConfig, **kwargs: Any) -> None:
        check_transformer_config(config, overlap_p2p=mhc.overlap_p2p)
        super().__init__(config, *args, **kwargs)
        mark_streams(config, mhc)
        self.mhc = mhc
        self.chunk = kwargs.get("vp_stage")
        first_site = 2 * (self.layer_number - 1)
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
        _link_to_layer_before(self)
        self.is_entry = self.layer_number == 1
        self.is_exit = self.layer_number == config.num_layers
        if self.is_exit and mhc.learned_head:
            self.head = Head(mhc, config.hidden_size, sequence_parallel=config.sequence_parallel)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """TransformerLayer.forward on [s, b, n*C]; the first takes, the last gives [s, b, C]."""
        n = self.mhc.num_streams
        if self.is_entry:
            hidden_states = hidden_states.repeat(1, 1, n)
        streams, context = super().forward(hidden_states, *args, **kwargs)
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


def _link_to_layer_before(layer: MHCLayer) -> None:
    """Let the layer before, if one was just built for the same stage, compute this one's `pre`.

    Not under full recompute: what one checkpointed layer leaves on the next would have no gradient.
    """
    global _last_built
    before = _last_built() if _last_built is not None else None
    _last_built = weakref.ref(layer)
    if (
        before is not None
        and before.config is layer.config
        and before.chunk == layer.chunk
        and before.layer_number == layer.layer_number - 1
        and before.mlp_site.following is None
        and layer.config.recompute_granularity != "full"
    ):
        before.mlp_site.following = layer.attention_site


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
    return type(f"MHC{base.__name__}", (MHCLayer, base), {"__module__": __name__})
