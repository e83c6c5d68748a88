"""The pictures of a training in MLflow: its best checkpoint's report, and a few words that say what to look at.

They lie in the run's folder, below `report/`, and go to MLflow by the outbox: where it is away they arrive later.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cvft.checkpoint import read_info
from cvft.distributed import alone
from cvft.errors import CvftError
from jobs.config import ExperimentConfig
from jobs.entry import LOGGER, Progress
from jobs.report import write_report
from jobs.tracked import outbox_of
from jobs.training.progress import History, read_history
from jobs.training.saving import checkpoints_of, newest_of
from pipeline.evaluation import Evaluation, evaluate_checkpoint
from pipeline.report.distances import PROTOCOL_DISTANCES_M, AnswerDistances, answer_distances
from pipeline.report.gallery import format_distance
from pipeline.report.page import recall_rows
from pipeline.storage import Store
from pipeline.tracking.runs import Run

FOLDER = "report"
NOTE_TAG = "mlflow.note.content"  # what MLflow's page of a run shows as its description, in Markdown
_LOOK_AT = {
    "report.html": "the whole report as one page",
    "figures/training.png": "loss and recalls by epoch",
    "figures/recall_at_k.png": "how often the right place is among the first k",
    "figures/confusion_by_distance.png": "how far off wrong answers are",
    "figures/best_1.png": "the surest answers",
    "figures/worst_1.png": "the greatest mistakes",
    "figures/transport_1.png": "what the transport moves where",
    "figures/locations.png": "where the pairs are",
}


def log_pictures(config: ExperimentConfig, run: Run, *, device: torch.device) -> None:
    """Draw the report of a training's best checkpoint and give it to MLflow; rank 0 alone does.

    What cannot be read or written then is a warning: the training is over, and its checkpoints are whole.

    Args:
        config: The experiment, all of whose epochs are trained.
        run: Its run.
        device: Where to embed the evaluation split.
    """
    if not config.tracking.pictures:
        return
    try:
        with alone():  # the other ranks are done
            names, note = draw(config, run, device=device)
        LOGGER.info("%d pictures of %s are in %s", len(names) - 1, config.name, _store(config).uri())
        with outbox_of(config, run) as outbox:
            outbox.defer(Run.log_folder, source=_store(config).uri(), artifact_path=FOLDER)
            outbox.defer(Run.set_tags, tags={NOTE_TAG: note})
    except CvftError as error:
        LOGGER.warning("the pictures of %s are not in MLflow: %s", config.name, error)


def draw(config: ExperimentConfig, run: Run, *, device: torch.device) -> tuple[list[str], str]:
    """Write the report into the run's folder; return the names of its files there, and the words for MLflow.

    Raises:
        CvftError: The checkpoint, the data or the store cannot be used.
    """
    newest = newest_of(config)
    assert newest is not None  # a training that is over has written one
    info = read_info(newest[1])
    found = evaluate_checkpoint(
        checkpoints_of(config).uri(History(**info.training).best),
        config.data.manifest,
        split=config.data.eval_split,
        train_split=config.data.train_split,
        batch_size=config.train.batch_size,
        num_threads=config.data.num_threads,
        device=device,
        progress=Progress("embedding for the pictures"),
    )
    store = _store(config)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        files = write_report(
            found,
            out,
            title=f"{config.name}: which aerial image shows this place?",
            facts={"MLflow run": run.run_id},
            history=read_history(info),
        )
        names = [str(path.relative_to(out)) for path in [files.html, *files.pngs]]
        for name in names:
            store.write_bytes(name, (out / name).read_bytes())
    return names, note_of(found, num_epochs=config.train.num_epochs, names=names)


def note_of(found: Evaluation, *, num_epochs: int, names: Sequence[str]) -> str:
    """Describe a run in Markdown: what it reached, and which of its pictures show what."""
    result, info = found.result, found.info
    recalls = ", ".join(f"{row['name']} {row['recall']:.1%}" for row in recall_rows(result)[1:])
    lines = [
        f"**recall@1 {result.recall_at(1):.1%}** (a guess: {result.chance_at(1):.2%}), {recalls}, on "
        f"{len(result.match_rank):,} queries among {result.num_references:,} references of split "
        f"`{found.dataset.split}`.",
    ]
    distances = answer_distances(result, found.dataset.location_m)
    if distances is not None:
        within = zip(PROTOCOL_DISTANCES_M, distances.found_within(PROTOCOL_DISTANCES_M).tolist(), strict=True)
        reached = " and ".join(f"{part:.1%} within {limit:g} m" for limit, part in within)
        far = f"; wrong answers lie {_median(distances)} off (median)" if len(distances.wrong_m) else ""
        lines.append(f"First answers: {reached}{far}.")
    lines.append(
        f"Best checkpoint: `{found.checkpoint.name}`, epoch {info.epoch} of {num_epochs}, {info.model.head.kind} head."
    )
    looks = [f"- `{FOLDER}/{name}`: {words}" for name, words in _LOOK_AT.items() if name in names]
    return "\n\n".join([*lines, "To look at, among the artifacts:", "\n".join(looks)])


def _median(distances: AnswerDistances) -> str:
    return format_distance(float(np.median(distances.wrong_m)))


def _store(config: ExperimentConfig) -> Store:
    return Store.from_uri(f"{config.folder}/{FOLDER}")
