"""Every patch of the plugin: undone it leaves nothing, and Muon never sees mHC."""

from megatron_mhc import MHCConfig


def test_every_patch_of_the_plugin_undoes_cleanly() -> None:
    from megatron_mhc.patches import registry
    from megatron_mhc.patches.registry import locate
    from megatron_mhc.start.activate import plugin_patches

    registry.undo()  # what with_mhc applied in the tests above
    patches = plugin_patches()
    held = [vars(owner)[name] for owner, name in (locate(patch.target) for patch in patches)]
    registry.apply(*patches)
    try:
        changed = [vars(owner)[name] for owner, name in (locate(p.target) for p in patches)]
        assert all(new is not old for new, old in zip(changed, held, strict=True))
    finally:
        registry.undo()
    back = [vars(owner)[name] for owner, name in (locate(patch.target) for patch in patches)]
    assert all(new is old for new, old in zip(back, held, strict=True))


def test_muon_never_sees_mhc() -> None:
    """Megatron's own rule takes every matrix; ours sends marked ones to the other optimizer."""
    import torch
    import torch.distributed as dist
    from megatron.core import optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    from megatron_mhc.model.connection import HyperConnection
    from megatron_mhc.model.parameters import MARK
    from megatron_mhc.patches import registry
    from megatron_mhc.patches.parameter_groups import parameter_group_patches

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), HyperConnection(MHCConfig(), 4, 0))
    phi, weight = model[1].phi, model[0].weight
    no_matrix = ParamPredicate(name="no_matrix", fn=lambda p: p.dim() != 2)
    overrides = {ParamKey(predicate=no_matrix): {"optimizer": "adam"}}
    config = optimizer.OptimizerConfig(optimizer="muon", lr=1e-3)
    layer_wise = optimizer.is_managed_by_layer_wise_optimizer
    assert layer_wise(phi) and layer_wise(weight)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    registry.apply(*parameter_group_patches(MARK))
    try:
        groups = optimizer._get_param_groups([model], config, overrides)
        (ours,) = [g for g in groups if any(p is phi for p in g["params"])]
        (theirs,) = [g for g in groups if any(p is weight for p in g["params"])]
        assert (ours["optimizer"], ours["wd_mult"]) == ("adam", 0.0)
        assert "optimizer" not in theirs and theirs["wd_mult"] == 1.0
        assert not optimizer.is_managed_by_layer_wise_optimizer(phi)
        assert optimizer.is_managed_by_layer_wise_optimizer(weight)
    finally:
        registry.undo()
        dist.destroy_process_group()
