"""HybridModel: its layers, of one sublayer each, have the places that their HybridStack gives them.

A layer's number says less there than in a Transformer block: a stack inside multi-token prediction
numbers its layers from 1 again and tells them nothing of where they are.
"""

from types import FunctionType
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.utils import get_pg_rank

from megatron_mhc.costs.recompute_plan import plan
from megatron_mhc.costs.sites import hybrid_pattern

from .arrange import arrange
from .config_marks import mark_pattern
from .layer import MHCLayer
from .specs import has_mhc


def place(stack: Any) -> None:
    """Give a new stack's layers their sites' numbers, the head, the plan of recompute, the ends.

    Args:
        stack: a HybridStack that has just been built; one without mHC stays as it is.

    Raises:
        ValueError: some of its layers have mHC and others have none.
    """
    layers = list(stack.layers)
    ordinary = [layer for layer in layers if not isinstance(layer, MHCLayer)]
    if len(ordinary) == len(layers):
        return
    if ordinary:
        names = ", ".join(sorted({type(layer).__name__ for layer in ordinary}))
        raise ValueError(
            f"a HybridStack has layers with mHC and {names} without: give with_mhc the whole"
            " stack's spec, not that of some layers"
        )
    first, last = layers[0], layers[-1]
    begins, ends = stack.pre_process, stack.post_process
    if getattr(stack, "is_mtp_layer", False):
        for layer in layers:
            _continue_behind_the_decoder(layer)
    else:  # the embedding, or the loss, may have a stage of its own
        begins = begins or first.layer_number == 1
        ends = ends or last.layer_number == stack.config.num_layers
    if ends:
        last.add_head()
    for layer in layers:
        layer.set_place(is_entry=begins and layer is first, is_exit=ends and layer is last)
    if first.mhc.recompute is not None:
        norms = sum(layer.own_norms for layer in layers) / len(layers)
        found = plan(stack.config, first.mhc, norms, get_pg_rank(stack.pp_group), sites=1)
        for layer in layers:
            layer.recompute_plan = found
    arrange(stack)


def _continue_behind_the_decoder(layer: MHCLayer) -> None:
    """A layer of multi-token prediction: home streams go on from the decoder's last site."""
    layer.is_mtp = True  # Megatron tells layers of attention alone
    for site in layer.sites:
        site.connection.site += layer.config.num_layers
        site.connection.reset_parameters()


def check_hybrid(config: Any) -> None:
    """Refuse a HybridStack's spec for another model.

    Raises:
        ValueError: no HybridModel is being built with this TransformerConfig.
    """
    if hybrid_pattern(config) is None:  # `stack_spec` notes it before it asks
        raise ValueError(
            "the script builds no HybridModel, and --hybrid-layer-pattern (or --spec"
            " megatron_mhc.spec hybrid_stack_spec) asks for one: give Megatron's pretrain_hybrid.py"
        )


def stack_spec(spec: Any, config: Any, pattern: str | None) -> Any:
    """The spec of a HybridModel: what a function returns, which Megatron hands on uncalled.

    Args:
        spec: what HybridModel was given: a ModuleSpec, or `spec.hybrid_stack_spec`.
        config: the model's TransformerConfig; with mHC it is marked with the pattern.
        pattern: the model's hybrid layer pattern.

    Raises:
        ValueError: the function returns another kind of spec.
    """
    if isinstance(spec, FunctionType):
        mark_pattern(config, pattern)
        name, spec = spec.__name__, spec(config)
        module = getattr(spec, "module", None)
        if not (isinstance(module, type) and issubclass(module, HybridStack)):
            missing = (
                "--spec megatron_mhc.spec hybrid_stack_spec"
                if pattern
                else "--hybrid-layer-pattern"
            )
            raise ValueError(
                f"--spec names {name}, which returns no HybridStack's spec, and the model is a"
                f" HybridModel: give {missing}"
            )
    if has_mhc(spec):
        mark_pattern(config, pattern)
    return spec
