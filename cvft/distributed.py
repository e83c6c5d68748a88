"""Everything that several training processes say to each other; the only module that imports torch.distributed.

Rank r of W holds the rows [r::W] of every global batch, so that a global batch is the same for any number of processes;
where W does not divide it, the last ranks hold one row less. The gathers put the rows back into global order.

Cost of one gather of a [B, D] tensor over W ranks (b = 4 bytes): each rank receives (W - 1) / W * B * D * b bytes and
holds the result twice for a moment; the backward of `gather_with_gradient` sends nothing. For B=128, D=4096 that is 2
MB for each view.

Shape letters: B pairs of the global batch, D descriptor values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

# Imported before a process group is made: DDP imports it later otherwise, and its default arguments keep the group for
# ever. Gloo's threads then outlive destroy_process_group, and one that wants the GIL as the interpreter ends aborts it.
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cvft.errors import CvftError

T = TypeVar("T")
_IS_ALONE: ContextVar[bool] = ContextVar("is_alone", default=False)


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
    if not _IS_ALONE.get() and dist.is_available() and dist.is_initialized():
        return World(rank=dist.get_rank(), size=dist.get_world_size())
    return World()


@contextmanager
def alone() -> Iterator[None]:
    """Within it, this thread is a world of one: what it computes waits for no other rank, and none needs to come."""
    token = _IS_ALONE.set(True)
    try:
        yield
    finally:
        _IS_ALONE.reset(token)


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


def gather(tensor: Tensor, *, num_rows: int | None = None) -> Tensor:
    """Concatenate a tensor of every rank along the first axis, in global order, without gradient.

    Args:
        tensor: The rows [r::W] of a [B, ...] on rank r, of the same type and other sizes on all of them.
        num_rows: B; none where every rank has the same number of rows. Lengths are not sent: a GPU would be waited for.

    Returns:
        [B, ...], where row i came from rank i % W.

    Raises:
        ValueError: This rank's rows are not its part of `num_rows`, or a rank would have none.
    """
    world = current_world()
    num_rows = len(tensor) * world.size if num_rows is None else num_rows
    longest = _check_rows(len(tensor), num_rows, world)
    own = tensor.detach()
    if world.size == 1:
        return own
    own = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])  # ranks send equal sizes
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(world.size)]
    dist.all_gather(parts, own.contiguous())
    # The rows that were padded are the last ones in global order.
    return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows]


def num_rows_of_longest(num_rows: int, world: World) -> int:
    """Return how many of `num_rows` rows the first rank holds, which holds the most."""
    return -(-num_rows // world.size)


def _check_rows(num_own: int, num_rows: int, world: World) -> int:
    """Return the rows of the longest part."""
    expected = -(-(num_rows - world.rank) // world.size)
    if num_rows < world.size or num_own != expected:
        raise ValueError(
            f"rank {world.rank} of {world.size} holds {num_own} rows of {num_rows}, not {max(expected, 1)}"
        )
    return num_rows_of_longest(num_rows, world)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World, num_rows: int | None) -> Tensor:
        ctx.world = world
        return gather(tensor, num_rows=num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.world.rank :: ctx.world.size] * ctx.world.size, None, None


def gather_with_gradient(tensor: Tensor, *, num_rows: int | None = None) -> Tensor:
    """Concatenate a tensor of every rank along the first axis, in global order, with an exact gradient.

    Every rank must compute the same loss from the result. Then the gradient of that loss is known to every rank, each
    keeps the slice of its own rows, and nothing is sent. The slice is multiplied by W because DDP averages over ranks
    what has to be summed, whatever number of rows each of them has.

    Args:
        tensor: As in `gather`.
        num_rows: As in `gather`.

    Returns:
        [B, ...], where row i came from rank i % W.

    Raises:
        ValueError: As in `gather`.
    """
    world = current_world()
    if world.size == 1:
        return tensor
    return cast(Tensor, _GatherWithGradient.apply(tensor, world, num_rows))  # type: ignore[no-untyped-call]


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


def from_rank_0(function: Callable[[], T]) -> T:
    """Let rank 0 alone call a function and give its result to every rank, so that all of them go the same way.

    Every rank must come here; the others wait until rank 0 is done.

    Args:
        function: Returns plain data (numbers, texts, lists, dictionaries, None).

    Raises:
        CvftError: Rank 0 met it; on the other ranks one with the same message.
    """
    world = current_world()
    if world.size == 1:
        return function()
    told: list[Any] = [None, None]  # the result, or what went wrong
    failure: CvftError | None = None
    if world.rank == 0:
        try:
            told[0] = function()
        except CvftError as error:
            failure, told[1] = error, str(error)
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise CvftError(told[1])
    return cast(T, told[0])
