"""Gradients in two dtypes: their norm and their clipping, by kernels that take one dtype at a time.

A CPU has no precision-aware optimizer. So Megatron's own two functions get gradients as it leaves
them there, and kernels that do what Transformer Engine's do: take all for the first one's dtype.
`tests/gpu/test_mixed_gradients_gpu.py` trains.
"""

import pytest

from tests.megatron.common.launch import forked_python

PROGRAM = """
import torch
from megatron_mhc.patches import cpu, registry
cpu.enter()
from megatron_mhc.start.activate import activate
activate()
from megatron.core.optimizer import clip_grads

def of_one_dtype(original):
    def kernel(chunk, flag, lists, *args):
        assert len({tensor.dtype for tensor in lists[0]}) == 1, "read as another dtype"
        return original(chunk, flag, lists, *args)
    return kernel

for name in ("l2_norm_impl", "multi_tensor_scale_impl"):
    setattr(clip_grads, name, of_one_dtype(getattr(clip_grads, name)))
torch.distributed.init_process_group("gloo", "tcp://127.0.0.1:0", rank=0, world_size=1)
torch.manual_seed(1)
kinds = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (7, 24, 64, 3)]
for parameter, kind in zip(parameters, kinds):
    parameter.decoupled_grad = torch.randn(parameter.shape).to(kind)
before = [parameter.decoupled_grad.double() for parameter in parameters]
wanted = torch.cat(before).norm().item()
norm = clip_grads.get_grad_norm_fp32([parameter.decoupled_grad for parameter in parameters])
alone = clip_grads.get_grad_norm_fp32([parameters[1].decoupled_grad])
clip_grads.clip_grad_by_total_norm_fp32(parameters, 1.0, norm, use_decoupled_grad=True)
for parameter, was, kind in zip(parameters, before, kinds):
    assert parameter.decoupled_grad.dtype == kind
    # a rounding of the gradient, and one of the factor
    torch.testing.assert_close(
        parameter.decoupled_grad.double(), was / norm, rtol=2 * torch.finfo(kind).eps, atol=0
    )
# Megatron's stand-in for the kernel rounds the norm of a bf16 tensor to bf16
assert abs(norm - wanted) < torch.finfo(torch.bfloat16).eps / 2 * wanted
assert abs(alone - before[1].norm()) < 1e-6 * wanted  # a sum of squares in fp32
print("scaled as one vector")
"""


@pytest.mark.parametrize("is_patched", [True, False])
def test_they_are_measured_and_clipped_as_one_vector(is_patched: bool) -> None:
    off = {} if is_patched else {"MEGATRON_MHC_PATCHES": "-mixed-gradients"}
    done = forked_python("-c", PROGRAM, **off)
    assert (done.returncode == 0) == is_patched, done.stdout[-3000:]
    assert ("scaled as one vector" if is_patched else "read as another dtype") in done.stdout
