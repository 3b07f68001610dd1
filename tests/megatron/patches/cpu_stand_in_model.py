"""The models that the processes of `test_cpu_training` train, and their data."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

LAYERS, HIDDEN, HEADS, SEQUENCE, VOCABULARY, BATCH, STEPS = 4, 64, 4, 32, 128, 4, 3
MLA_WIDTHS = {"qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12}


@dataclasses.dataclass(frozen=True)
class Run:
    """A model, how it is spread, and how it is trained."""

    tensor: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    normalization: str = "LayerNorm"
    experts: int | None = None
    mla: bool = False
    dropout: float = 0.0
    recompute: bool = False
    distributed_optimizer: bool = False
    seed: int = 1

    def config(self) -> Any:
        """Megatron's configuration of the model."""
        from megatron.core.transformer.transformer_config import (
            MLATransformerConfig,
            TransformerConfig,
        )

        settings: dict[str, Any] = {
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "tensor_model_parallel_size": self.tensor,
            "expert_model_parallel_size": self.expert,
            "sequence_parallel": self.sequence_parallel,
            "normalization": self.normalization,
            "hidden_dropout": self.dropout,
            "attention_dropout": self.dropout,
        }
        if self.experts is not None:
            settings |= {
                "num_moe_experts": self.experts,
                "moe_ffn_hidden_size": HIDDEN,
                "moe_router_load_balancing_type": "none",
                "moe_token_dispatcher_type": "alltoall",
                "add_bias_linear": False,
            }
        if self.recompute:
            settings |= {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        if self.mla:
            widths = {"q_lora_rank": 16, "kv_lora_rank": 16, "rope_type": "rope", **MLA_WIDTHS}
            return MLATransformerConfig(**settings, **widths)
        return TransformerConfig(**settings)

    def model(self) -> Any:
        """A GPT of the local specification, in the process groups that it asks for."""
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tensor,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=1,
        )
        torch.manual_seed(self.seed)
        tensor_parallel.model_parallel_cuda_manual_seed(self.seed, force_reset_rng=True)
        spec = get_gpt_layer_local_spec(
            num_experts=self.experts,
            normalization=self.normalization,
            multi_latent_attention=self.mla,
        )
        return GPTModel(
            self.config(), spec, VOCABULARY, SEQUENCE, position_embedding_type="rope"
        ).cuda()


def batches() -> Iterator[torch.Tensor]:
    """The same for every run; a process takes the rows of its data-parallel rank."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(5)
    rows = BATCH // parallel_state.get_data_parallel_world_size()
    first = rows * parallel_state.get_data_parallel_rank()
    while True:
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
        yield tokens[first : first + rows]


def forward_step(data: Iterator[torch.Tensor], model: Any) -> tuple[Any, Any]:
    """Runs the model on the next batch; returns its losses and what makes them one."""
    tokens = next(data).cuda()
    positions = torch.arange(SEQUENCE, device="cuda").expand(len(tokens), -1)
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return losses, lambda output: (output.mean(), {"loss": output.mean().detach()})
