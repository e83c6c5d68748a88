"""What of a configuration says where MLflow keeps runs and models, and what it is told."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from cvft.configuration import require

URI_VARIABLE = "MLFLOW_TRACKING_URI"


def default_uri() -> str:
    """Return the tracking URI where none is named: that of MLflow's own variable, else a file in this folder."""
    return os.environ.get(URI_VARIABLE) or "sqlite:///mlflow.db"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps runs and models.

    Attributes:
        uri: Tracking URI, by default MLFLOW_TRACKING_URI or `sqlite:///mlflow.db`; relative sqlite paths are relative
            to the working directory.
        experiment: Experiment's name.
        log_every_steps: Number of steps whose means go to MLflow together.
        pictures: Whether a training draws its report at its end, into `report/` of its folder and into MLflow.
        registered_model: Name under which `train` registers its best checkpoint; none registers nothing.
        alias: Alias that is moved to it; which version is `champion` is decided by `promote` alone.
    """

    uri: str = field(default_factory=default_uri)
    experiment: str = "cvft"
    log_every_steps: int = 10
    pictures: bool = True
    registered_model: str | None = None
    alias: str = "candidate"

    def __post_init__(self) -> None:
        require(self.log_every_steps >= 1, f"log_every_steps: {self.log_every_steps} must be at least 1")
        is_free = self.alias != "champion"
        require(is_free, "alias: champion is moved by `cvft promote` alone, which compares first; choose another alias")
