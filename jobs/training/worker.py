"""What one training process does: the same in this process, under Ray Train, on one node or many.

Every rank runs `train`; rank 0 alone writes checkpoints and metrics. A worker that starts looks for the newest
checkpoint of the run's folder and goes on from there, so that a restart is nothing special.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from jobs.config import ExperimentConfig
from jobs.training.progress import Metrics
from jobs.training.rank import OnStep, ShouldLeave, Training
from pipeline.checkpoint_writer import OnWritten

OnEpoch = Callable[[Metrics], None]


def train(
    config: ExperimentConfig,
    *,
    device: torch.device,
    on_epoch: OnEpoch,
    on_step: OnStep | None = None,
    should_leave: ShouldLeave | None = None,
    guard: Callable[[], None] | None = None,
    on_saved: OnWritten | None = None,
    is_durable: bool = False,
) -> bool:
    """Train from the newest whole checkpoint, or from the start, to the last epoch or until recall stalls.

    Args:
        config: The experiment.
        device: Where this rank computes.
        on_epoch: Called on every rank after each evaluation, with its numbers.
        on_step: Called on every rank after each step.
        should_leave: Called on every rank after each step with the number of steps done; the same answer on all of
            them. True ends this call after a checkpoint of that very step.
        guard: Called in rank 0, by a thread in the background, before a checkpoint is published and before others are
            deleted; what it raises prevents both and ends the training.
        on_saved: Called in rank 0, by that thread, once a checkpoint is durable and others are deleted, with what its
            `checkpoint.json` says and the names of those that are there now.
        is_durable: Wait for an evaluation's checkpoint before `on_epoch` hears of it.

    Returns:
        Whether the training is over, every checkpoint of it durable; False where it was told to leave.

    Raises:
        CvftError: The configuration, the data, the store or a checkpoint cannot be used.
    """
    training = Training(config, device, on_step=on_step, should_leave=should_leave, guard=guard, on_saved=on_saved)
    try:
        while not training.is_over:
            if training.is_evaluation_due:
                metrics = training.evaluate_and_save()
                if is_durable:
                    training.finish()
                on_epoch(metrics)
            elif not training.run_epoch():
                return False
        training.finish()
    except BaseException:
        training.settle()
        raise
    return True
