"""A model over several processes, each of which holds a share of every matrix's rows (ZeRO stage 3, Rajbhandari et al.
2020; PyTorch's FSDP2): a block's parameters are whole where and while they are needed, its gradients only until summed.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mini.training.ranks import World


def shard(losses_of: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype, world: World) -> None:
    """Leaves in this process its rows of all parameters, on its device, as DTensors of float32.

    losses_of: the module whose forward pass a training calls; what is not in a block is whole all through it.
    dtype: of matrix products, in which blocks are gathered, their norms' gains too: in bfloat16 half the bytes, and no
    copies for autocast to keep.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(losses_of, mesh=mesh)
    if not world.on_gpu:  # gloo's mean was a sum in some versions (github.com/pytorch/pytorch/issues/162338)
        for module in (*blocks, losses_of):
            module.set_force_sum_reduction_for_comms(True)
    world.sharded = True


@contextlib.contextmanager
def whole(losses_of: nn.Module) -> Iterator[None]:
    """While active, the model's parts may be called without losses_of: each process has what is not in a block."""
    sharded = isinstance(losses_of, FSDPModule)
    if sharded:
        losses_of.unshard()
    try:
        yield
    finally:
        if sharded:
            losses_of.reshard()
