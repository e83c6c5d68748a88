"""A checkpoint measured on a split of a manifest, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cvft.checkpoint import CheckpointInfo, load_model, read_info
from cvft.config import PreprocessConfig
from cvft.configuration import parse, to_plain
from cvft.engine import embed
from cvft.model import CrossViewModel
from cvft.preprocess import Preprocess
from cvft.retrieval import RetrievalResult, rank_matches
from pipeline.checkpoints import fetch
from pipeline.dataset import PairDataset, default_cache
from pipeline.loader import Loader
from pipeline.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured and with what.

    Attributes:
        model: The network, on `device`.
        info: What the checkpoint says about itself.
        checkpoint: Local directory of the checkpoint.
        preprocess: How the network's input was made.
        dataset: The split's pairs.
        result: Ranks of all its queries.
        device: Where the network is.
    """

    model: CrossViewModel
    info: CheckpointInfo
    checkpoint: Path
    preprocess: PreprocessConfig
    dataset: PairDataset
    result: RetrievalResult
    device: torch.device


def evaluate_checkpoint(
    checkpoint: str,
    manifest: str,
    *,
    split: str = "val",
    preprocess_changes: dict[str, Any] | None = None,
    allow_other_preprocess: bool = False,
    batch_size: int = 32,
    num_threads: int = 2,
    cache: Path | None = None,
) -> Evaluation:
    """Embed a split with a checkpoint's network and rank every ground image's own aerial image.

    Args:
        checkpoint: Path or URI of a checkpoint.
        manifest: Path or URI of a manifest.
        split: Which pairs.
        preprocess_changes: Fields of the checkpoint's `PreprocessConfig` to change; refused unless allowed.
        allow_other_preprocess: Accept input prepared otherwise than in training.
        batch_size: Pairs embedded at a time.
        num_threads: Decoding threads.
        cache: Folder for copies of remote shards.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or trained with other preprocessing.
        ConfigError: A changed field is unknown or refused.
        DataError: There is no such split, or an image cannot be decoded.
        ShardError: The manifest or a shard is missing or damaged.
        StoreError: A store cannot be reached.
    """
    directory = fetch(checkpoint, cache=(cache or default_cache()).parent)
    trained_with = read_info(directory).preprocess
    changed = {**to_plain(trained_with), **(preprocess_changes or {})}
    preprocess = parse(PreprocessConfig, changed, prefix="preprocess")
    model, info = load_model(directory, preprocess=preprocess, allow_other_preprocess=allow_other_preprocess)
    dataset = PairDataset(Manifest.load(manifest), split, cache=cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    loader = Loader(dataset, preprocess=preprocess, batch_size=batch_size, num_threads=num_threads)
    found = embed(model, loader.eval_batches(), preprocess=Preprocess(preprocess), num_pairs=len(dataset))
    return Evaluation(
        model=model,
        info=info,
        checkpoint=directory,
        preprocess=preprocess,
        dataset=dataset,
        result=rank_matches(found.ground, found.aerial),
        device=device,
    )
