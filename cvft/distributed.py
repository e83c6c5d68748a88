"""Everything that several training processes say to each other; the only module that imports torch.distributed.

Rank r of W holds the rows [r::W] of every global batch, so that a global batch is the same for any number of processes.
The gathers put the rows back into global order.

Cost of one gather of a [B, D] tensor over W ranks (b = 4 bytes): each rank receives (W - 1) / W * B * D * b bytes and
holds the result twice for a moment; the backward of `gather_with_gradient` sends nothing. For B=128, D=4096 that is 2
MB for each view.

Shape letters: B pairs of the global batch, D descriptor values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process's place among the training processes.

    Attributes:
        rank: 0 to size - 1.
        size: Number of processes; 1 without torch.distributed.
    """

    rank: int = 0
    size: int = 1


def current_world() -> World:
    """Return the world of the initialised process group, or a world of one."""
    if dist.is_available() and dist.is_initialized():
        return World(rank=dist.get_rank(), size=dist.get_world_size())
    return World()


@contextmanager
def torchrun_world() -> Iterator[World]:
    """Join the process group that `torchrun` describes in the environment, and leave it at the end.

    Without torchrun, or inside a group that somebody else made (Ray Train), it changes nothing.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield current_world()
        return
    dist.init_process_group()  # without a backend: gloo for CPU tensors, NCCL for CUDA tensors
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of every rank along the first axis, in global order, without gradient.

    Args:
        tensor: [B / W, ...] on each rank, of the same shape on all of them.

    Returns:
        [B, ...], where row i came from rank i % W.
    """
    world = current_world()
    if world.size == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world.size)]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.world.rank :: ctx.world.size] * ctx.world.size, None


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of every rank along the first axis, in global order, with an exact gradient.

    Every rank must compute the same loss from the result. Then the gradient of that loss is known to every rank, each
    keeps the slice of its own rows, and nothing is sent. The slice is multiplied by W because DDP averages over ranks
    what has to be summed.

    Args:
        tensor: [B / W, ...] on each rank, of the same shape on all of them.

    Returns:
        [B, ...], where row i came from rank i % W.
    """
    world = current_world()
    if world.size == 1:
        return tensor
    return cast(Tensor, _GatherWithGradient.apply(tensor, world))  # type: ignore[no-untyped-call]


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Average the model's gradients over the ranks; in a world of one the model itself is returned."""
    if current_world().size == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Within it, forward and backward passes add to a rank's own gradients; the next pass outside averages the sum."""
    if isinstance(model, DistributedDataParallel):
        return cast(AbstractContextManager[None], model.no_sync())
    return nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
