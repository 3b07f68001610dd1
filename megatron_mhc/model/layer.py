"""A layer whose residual is n streams, through Megatron's own slots.

The way of a token: the first layer replicates the embedding into n streams (entry); each site reads
them in front of its norm (`Site.read`) and writes to them where the residual was added
(`Site.write`); the last layer contracts them (exit). Between layers they are one tensor
[s, b, n*C], stream-major: index j*C + c (`columns` says what may stand behind them). A layer of
multi-token prediction, which gets one stream (the last layer's, normed and projected with the next
token's embedding), is entry and exit at once.

There is a site wherever a layer adds to the residual: two in a GPT's layer, one in a HybridModel's,
which is attention, an MLP or a Mamba mixer alone.
"""

from typing import Any, NamedTuple

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_mhc import kernels
from megatron_mhc.config import MHCConfig
from megatron_mhc.costs.recompute_plan import Plan, plan

from .compatibility import check_transformer_config
from .config_marks import mark_streams
from .connection import Head, HyperConnection
from .recompute import Block
from .regions import is_one_region, runs_on_into_the_next
from .site import Site
from .stored_settings import StoredSettings


class Slots(NamedTuple):
    """Where a layer adds to the residual: what the site there is called, and its two slots."""

    name: str
    norm: str
    residual: str


class MHCLayer(GraphableMegatronModule):
    """Mixed into a layer class by `mhc_layer`: a site at each residual slot that is filled.

    Args:
        mhc: the settings.
        in_stack: whether a HybridStack builds it and says its place (`stack.place`); else that is
            by its number. The rest as for the layer class.

    Attributes:
        is_any_built: of the class: whether this process has built a layer with sites, or a stage
            without layers of a model that was to have them.
        SLOTS: of the class: where it may add to the residual, in the order of running.
        sites: the sites, in that order.
        is_mtp: whether it belongs to multi-token prediction.
        fuses_inside: whether the first of two sites may compute the second one's input.
        fuses_with_next: whether the last site may compute the input of the next layer's first one.

    Raises:
        ValueError: the model's configuration has something that mHC cannot work with.
    """

    is_any_built = False
    SLOTS: tuple[Slots, ...] = ()

    def __init__(
        self, config: Any, *args: Any, mhc: MHCConfig, in_stack: bool = False, **kwargs: Any
    ) -> None:
        check_transformer_config(config, mhc)
        super().__init__(config, *args, **kwargs)
        mark_streams(config, mhc)
        self.mhc = mhc
        self.mhc_settings = StoredSettings(mhc)
        self.chunk = kwargs.get("vp_stage")
        self.is_mtp = bool(kwargs.get("is_mtp_layer"))
        slots = [s for s in self.SLOTS if getattr(self, s.residual) is get_bias_dropout_add]
        # Megatron numbers the layers of multi-token prediction from 1 again
        before = config.num_layers if self.is_mtp and not in_stack else 0
        first = len(slots) * (self.layer_number - 1 + before)
        self.sites = tuple(self._fill(slot, first + i) for i, slot in enumerate(slots))
        _ask_the_norms_again(self)
        self.fuses_inside = len(slots) > 1 and is_one_region(
            config, isinstance(getattr(self, "mlp", None), MoELayer)
        )
        self.sites[0].following = self.sites[1] if self.fuses_inside else None
        has_next = in_stack or not self.is_mtp
        self.fuses_with_next = has_next and runs_on_into_the_next(config)
        self.recompute_plan: Plan | None = None
        if mhc.recompute is not None:
            block = Block(self.sites, mhc.backend)
            for site in self.sites:
                site.block = block  # until `arrange` knows the layers beside this one
        MHCLayer.is_any_built = True
        if not in_stack:
            self._take_place_by_number()

    def _fill(self, slot: Slots, index: int) -> Site:
        """A site, the whole model's `index`-th, in these slots."""
        connection = HyperConnection(
            self.mhc,
            self.config.hidden_size,
            index,
            sequence_parallel=self.config.sequence_parallel,
        )
        setattr(self, f"{slot.name}_connection", connection)
        site = Site(connection, getattr(self, slot.norm))
        setattr(self, f"{slot.name}_site", site)
        setattr(self, slot.residual, site.write)
        return site

    def _take_place_by_number(self) -> None:
        """A Transformer block's layer: the first and the last of all are the model's ends."""
        number, config = self.layer_number, self.config
        is_exit = self.is_mtp or number == config.num_layers
        if self.mhc.recompute is not None:
            stage = get_pg_rank(self.pg_collection.pp)
            self.recompute_plan = plan(config, self.mhc, self.own_norms, stage)
        if is_exit:
            self.add_head()
        self.set_place(is_entry=self.is_mtp or number == 1, is_exit=is_exit)

    @property
    def own_norms(self) -> int:
        """How many sites have a norm that is a module of its own, not fused into a linear."""
        norms = (getattr(self, s.norm) for s in self.SLOTS if hasattr(self, f"{s.name}_site"))
        return sum(not isinstance(norm, IdentityOp) for norm in norms)

    @property
    def first_index(self) -> int:
        """The first site's index from the model's start, by what the layer's number is now."""
        return len(self.sites) * (self.layer_number - 1)

    @property
    def is_entry(self) -> bool:
        """Whether one stream comes in, to be replicated."""
        return self.sites[0].is_entry

    @property
    def is_exit(self) -> bool:
        """Whether the streams are contracted to one behind this layer."""
        return self.sites[-1].contract is not None

    @property
    def recompute_block(self) -> Block | None:
        """The block that this layer's streams are dropped and rebuilt in, if any."""
        return self.sites[-1].block

    def add_head(self) -> None:
        """The learned end of a model, where the convention has one."""
        if self.mhc.learned_head:
            parallel = self.config.sequence_parallel
            self.head = Head(self.mhc, self.config.hidden_size, sequence_parallel=parallel)

    def set_place(self, *, is_entry: bool, is_exit: bool) -> None:
        """Say whether one stream comes into this layer, and whether one leaves it."""
        self.sites[0].is_entry = is_entry
        if is_exit != self.is_exit:
            self.sites[-1].contract = self._contract if is_exit else None

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

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward on [s, b, n*C]; the first takes, the last gives [s, b, C]."""
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


def _ask_the_norms_again(layer: Any) -> None:
    """Megatron, from 0.20 on, asks each norm once, while it builds the layer: before the sites."""
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        answer = f"_{norm}_returns_residual"
        if hasattr(layer, answer):
            setattr(layer, answer, getattr(getattr(layer, norm), "returns_residual", False))
