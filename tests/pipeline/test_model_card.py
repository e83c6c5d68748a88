import re

import numpy as np
import pytest

from cvft.checkpoint import CheckpointInfo
from cvft.config import ModelConfig, PreprocessConfig
from pipeline.model_card import model_card
from pipeline.model_facts import Comparison, Measurement, Origin, describe
from pipeline.promotion import GateConfig, Measured, decide

DIGEST = "0123456789abcdef" * 4
CONFIG = {
    "data": {"train_split": "train", "eval_split": "val"},
    "train": {
        "num_epochs": 16,
        "batch_size": 32,
        "loss": {"kind": "soft_margin_triplet", "gamma": 10.0, "temperature": 0.07},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "weight_decay": 0.01},
        "augment": {"flip": 0.5, "fov_deg": [360.0, 360.0], "is_orientation_unknown": False, "blur_sigma_px": 1.5},
        "sampling": {"kind": "hard"},
    },
}
METRICS = {
    "recall_at_1": 0.4125,
    "recall_at_5": 0.7,
    "recall_at_10": 0.85,
    "recall_at_1_percent": 0.55,
    "recall_at_1_deleaked": None,
    "chance": 1 / 160,
    "num_queries": 160,
    "num_references": 160,
    "num_leaked_queries": None,
}


def origin(**facts):
    info = CheckpointInfo(
        model=ModelConfig(), preprocess=PreprocessConfig(), step=240, epoch=12, manifest_digest=DIGEST
    )
    known = {"config": CONFIG, "layout": "cvusa", "num_pairs": {"train": 640}, "commit": "abc", "run_id": "run"}
    return Origin(**{"info": info, "descriptor_dim": 4096, "num_parameters": 1234567, **known, **facts})


def measurement(**facts):
    known = {"metrics": METRICS, "split": "val", "digest": DIGEST, "day": "2026-11-26", "latency_ms": 12.34}
    return Measurement(**{**known, "device": "CPU, 2 threads", "model_mb": 5.6, **facts})


def comparison(status, *, champion=1):
    wins = {"promoted": 40, "tie": 2, "refused": 0}[status]
    ours = np.arange(160) < 60 + wins
    theirs = np.arange(160) < (60 if status != "refused" else 100)
    facts = {"is_deleaked": None, "chance": 1 / 160, "latency_ms": 12.0, "model_mb": 5.6}
    verdict = decide(
        Measured(hits=ours, **facts), Measured(hits=theirs, **facts) if champion else None, gate=GateConfig()
    )
    assert verdict.status == status
    return Comparison(verdict=verdict, alias="champion", champion=champion, gate="default", day="2026-11-26")


@pytest.mark.parametrize(
    ("status", "champion", "sentence"),
    [
        ("promoted", 1, "Promoted on 2026-11-26: champion in place of version 1. R@1 +25.00 points"),
        ("promoted", None, "Promoted on 2026-11-26: the first champion. R@1 +61.88 points"),
        ("tie", 1, "Not promoted on 2026-11-26: a tie with version 1. R@1 +1.25 points"),
        ("refused", 1, "Refused on 2026-11-26: R@1 -25.00 points"),
    ],
)
def test_both_texts_begin_with_how_it_ended(status, champion, sentence):
    ended = comparison(status, champion=champion)
    assert describe(origin(), measurement(), ended).startswith(f"**{sentence}")
    card = model_card("cvft", origin(), version=2, measurement=measurement(), comparison=ended)
    assert sentence in card.split("## What it is for")[0]
    assert all(item.text in card for item in ended.verdict.conditions)


def test_the_facts_stand_in_the_card_with_their_units():
    card = model_card("cvft", origin(), version=2, measurement=measurement(), comparison=comparison("promoted"))
    for fact in (
        "# Model card: cvft, version 2\n",
        "640 pairs of split train in layout cvusa, manifest 0123456789abcdef",
        "12 of 16 epochs in batches of 32 pairs; soft-margin triplet loss (gamma 10)",
        "adamw at 0.001, cosine schedule, weight decay 0.01; hard negatives; augmentation: flip",
        "| R@1 | 41.25 % | unknown | 0.62 % |",
        "an unknown number are in the training split as well",
        "chosen on this very split",
        "12.3 ms (CPU, 2 threads, median); the files are 5.6 MB",
        "uint8 [N, 112, 616, 3]",
        "float32 [M, 4096]",
        "1,234,567 parameters",
        "North must be in the middle",
        "all 360 degrees",
        'load_model("models:/cvft/2")',
        "nobody recorded the data's licence",
    ):
        assert fact in card, fact


def test_what_is_not_known_is_said_to_be_unknown_and_nothing_is_none():
    info = CheckpointInfo(model=ModelConfig(), preprocess=PreprocessConfig())
    bare = Origin(info=info, descriptor_dim=4096, num_parameters=1)
    for text in (model_card("cvft", bare), describe(bare, None, None)):
        assert not re.search(r"\bNone\b|nan|\{|\}", text.replace('model.predict({"ground"', "").replace("aerial})", ""))
        assert "A candidate: nothing has compared it with a champion yet." in text
        assert "commit unknown" in text
    assert "Not measured." in model_card("cvft", bare)
    assert "is not recorded" in model_card("cvft", bare)


def test_limits_follow_from_how_it_was_trained():
    augment = {**CONFIG["train"]["augment"], "fov_deg": [90.0, 180.0], "is_orientation_unknown": True}
    turned = origin(config={**CONFIG, "train": {**CONFIG["train"], "augment": augment}})
    card = model_card("cvft", turned)
    assert "Panoramas may be turned in any direction" in card
    assert "from 90 to 180 degrees" in card
    assert "North must be" not in card


def test_a_measurement_on_other_data_than_trained_on_is_named_as_such():
    card = model_card("cvft", origin(), measurement=measurement(digest="f" * 64))
    assert "trained on another manifest, `0123456789abcdef`" in card
    assert "chosen on this very split" not in card


def test_a_measurement_on_the_pairs_trained_on_says_what_it_is_worth():
    warning = "of places never seen this says nothing"
    assert warning in model_card("cvft", origin(), measurement=measurement(split="train"))
    assert warning not in model_card("cvft", origin(), measurement=measurement())


def test_recalls_by_distance_stand_beside_those_of_the_exact_pair():
    metrics = {**METRICS, "recall_at_1_within_5m": 0.5, "recall_at_5_within_5m": 0.8, "recall_at_10_within_5m": 0.9}
    found = measurement(metrics=metrics, hit_distance_m=5.0)
    assert "| R@1 | 41.25 % | unknown | 50.00 % | 0.62 % |" in model_card("cvft", origin(), measurement=found)
    assert "R@1 50.00 %, R@5 80.00 %, R@10 90.00 % within 5 m" in describe(origin(), found, None)
