"""An exponential moving average of a network's weights over the steps, to be evaluated instead of the weights.

After step t (counted from 0) the average goes towards the weights by 1 - d, where d = min(decay, (1 + t) / (10 + t)):
the rise of the decay, TensorFlow's `ExponentialMovingAverage` has the same, lets the random start be forgotten. It
depends on the number of the step alone, so that the tensors are all there is to carry.

torch's `AveragedModel` holds a second network under other names and a counter; here the tensors alone are held, under
the network's own names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average of the trained parameters of a network; all else in it is the network's own.

    Attributes:
        decay: Share of the average that a step leaves, once the training is long.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """Start from the weights as they are.

        Args:
            model: The network itself, without a DDP wrapper; on the device where it is trained.
            decay: Within (0, 1); 0.999 averages over about the last thousand steps.
        """
        self.decay = decay
        self._model = model
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._average = {name: value.detach().clone() for name, value in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after step number `step` into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average, weights = list(self._average.values()), [value.detach() for value in self._trained.values()]
        get_ema_multi_avg_fn(decay)(average, weights, None)  # type: ignore[no-untyped-call]

    def weights(self) -> dict[str, Tensor]:
        """Return the network's state dict with the averages in it; no copies."""
        return {**self._model.state_dict(), **self._average}

    def raw(self) -> dict[str, Tensor]:
        """Return the trained parameters as the optimizer left them; no copies."""
        return {name: value.detach() for name, value in self._trained.items()}

    @torch.no_grad()
    def restore(self, raw: Mapping[str, Tensor]) -> None:
        """Go on from the network that was loaded from `weights()` and from `raw()` of the same moment."""
        for name, value in self._trained.items():
            self._average[name].copy_(value)
            value.copy_(raw[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the network computes with the averages; afterwards it has its weights again, to the bit."""
        raw = {name: value.clone() for name, value in self.raw().items()}
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(raw)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._trained.items():
            value.copy_(values[name])
