"""Megatron-Bridge's mappings for the hyper-connections, beside those that it has for the rest.

    class Bridge(DeepSeekV4Bridge):
        def mapping_registry(self):
            return MegatronMappingRegistry(*rest, *hyper_connection_mappings("deepseek_v4", layers))

`rest` are the mappings of the model's own bridge without those of its hyper-connections, which are
for Megatron's; its provider's `transformer_layer_spec` then goes through `with_mhc`.
"""

import math
from typing import Any

from torch import Tensor

from megatron_mhc.kernels.reference import transpose_res_rows

from .hf_sites import CONVENTIONS_OF, NAMES, PARTS, SITES
from .site_items import HEAD


def _other_rows(value: Tensor) -> Tensor:
    """phi or bias with the rows of H_res in the other order."""
    return transpose_res_rows(value, math.isqrt(len(value) + 1) - 1)


def hyper_connection_mappings(kind: str, layers: int) -> list[Any]:
    """Mappings (`MegatronParamMapping`) of all hyper-connections of a model, both ways, in fp32.

    Args:
        kind: the `model_type` of its config.json: deepseek_v4, deepseek_v41 or glm5_next.
        layers: the number of its layers; the last one has the learned head.

    Raises:
        ImportError: megatron-bridge is not installed.
        ValueError: another model.
    """
    from megatron.bridge.models.conversion.param_mapping import ReplicatedMapping

    if kind not in CONVENTIONS_OF:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(CONVENTIONS_OF)}")

    class AsItIs(ReplicatedMapping):
        def hf_to_megatron(self, hf_weights: Tensor, megatron_module: Any) -> Tensor:
            return super().hf_to_megatron(hf_weights.float(), megatron_module)

    class OtherRows(AsItIs):
        def hf_to_megatron(self, hf_weights: Tensor, megatron_module: Any) -> Tensor:
            return super().hf_to_megatron(_other_rows(hf_weights), megatron_module)

        def megatron_to_hf(self, megatron_weights: Any, megatron_module: Any) -> dict[str, Tensor]:
            found = super().megatron_to_hf(megatron_weights, megatron_module)
            return {name: _other_rows(value).contiguous() for name, value in found.items()}

    names = NAMES[kind]
    mappings = [
        (AsItIs if part == "scale" else OtherRows)(
            f"decoder.layers.*.{connection}.{parameter}", f"{names.prefix}layers.*.{site}_{part}"
        )
        for site, connection in SITES.items()
        for part, parameter in PARTS.items()
    ]
    if CONVENTIONS_OF[kind] == "deepseek_v4":
        last = f"decoder.layers.{layers - 1}.head"
        mappings += [AsItIs(f"{last}.{p}", f"{names.prefix}{names.head}{p}") for p in HEAD]
    return mappings
