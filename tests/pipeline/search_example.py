"""Searches made of a formula, for the tests of their report: some parameters decide the recall, others do not."""

import numpy as np

from pipeline.ablation import Trial, summarise
from pipeline.search import Parameter, SearchResult, SearchTrial

PARAMETERS = (
    Parameter(name="train.optimizer.learning_rate", kind="float", low=1e-5, high=1e-2, is_log=True, default=1e-4),
    Parameter(name="train.loss.kind", kind="choice", choices=("triplet", "info_nce"), default="triplet"),
    Parameter(name="train.loss.gamma", kind="float", low=2.0, high=30.0, default=10.0),
    Parameter(name="train.loss.temperature", kind="float", low=0.01, high=0.5, is_log=True, default=None),
    Parameter(name="model.transport.num_iterations", kind="int", low=1, high=40, default=10),
    Parameter(name="train.augment.mirror", kind="choice", choices=(False, True), default=False),
    Parameter(name="train.average_decay", kind="choice", choices=(None, 0.99, 0.999), default=None),
)
RUNGS = (2, 6)
NUM_EPOCHS = 18
CHANCE = 1 / 160


def drawn_values(random):
    values = {
        "train.optimizer.learning_rate": float(10 ** random.uniform(-5, -2)),
        "train.loss.kind": ("triplet", "info_nce")[random.integers(2)],
        "model.transport.num_iterations": int(random.integers(1, 41)),
        "train.augment.mirror": bool(random.integers(2)),
        "train.average_decay": (None, 0.99, 0.999)[random.integers(3)],
    }
    if values["train.loss.kind"] == "triplet":
        return values | {"train.loss.gamma": float(random.uniform(2, 30))}
    return values | {"train.loss.temperature": float(10 ** random.uniform(-2, -0.3))}


def recall(values, epoch, random):
    """The learning rate decides most, the kind of the loss some; all else is luck."""
    distance = (np.log10(values["train.optimizer.learning_rate"]) + 3.3) / 1.3
    height = 0.72 * np.exp(-(distance**2)) * (1.0 if values["train.loss.kind"] == "info_nce" else 0.8)
    return float(np.clip(CHANCE + height * (1 - np.exp(-epoch / 5)) + random.normal(0, 0.012), 0, 1))


def trained(number, values, *, num_epochs, status, random, **changes):
    evaluations = tuple(
        {"epoch": epoch, "step": 20 * epoch, "loss": 3 / epoch, "recall_at_1": recall(values, epoch, random)}
        for epoch in range(1, num_epochs + 1)
    )
    return SearchTrial(
        name=f"trial-{number:04d}",
        values=values,
        status=status,
        evaluations=evaluations,
        seconds=3.1 * num_epochs,
        run_id=f"{number:032x}",
        **changes,
    )


def search(num_trials=24, *, seed=0, gain=0.08, **changes):
    """A search by successive halving: at each rung the lower half is stopped; every eighth trial fails."""
    random = np.random.default_rng(seed)
    trials = []
    for number in range(num_trials):
        values = drawn_values(random)
        height = recall(values, NUM_EPOCHS, np.random.default_rng(number))
        if number % 8 == 5:
            reason = "TrainingError: step 31: the loss is nan; lower train.optimizer.learning_rate=0.0081"
            trials.append(trained(number, values, num_epochs=number % 3, status="failed", random=random, reason=reason))
        elif height < 0.2:
            trials.append(trained(number, values, num_epochs=2, status="stopped", random=random))
        elif height < 0.45:
            trials.append(trained(number, values, num_epochs=6, status="stopped", random=random))
        else:
            trials.append(trained(number, values, num_epochs=NUM_EPOCHS, status="finished", random=random))
    evaluated = [trial for trial in trials if trial.evaluations]
    best = max(evaluated, key=lambda trial: trial.best("recall_at_1"), default=None)
    fields = {
        "name": "town-loss",
        "about": "24 trials of the town's 640 pairs, sampled by TPE, stopped by ASHA, 18 epochs at most.",
        "metric": "recall_at_1",
        "parameters": PARAMETERS,
        "trials": tuple(trials),
        "best": best.name if best else "",
        "comparison": comparison(best.name if best else "none", gain=gain),
        "chance": CHANCE,
        "rungs": RUNGS,
    }
    return SearchResult(**{**fields, **changes})


def comparison(name, *, gain=0.08, num_seeds=5, noise=0.02, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for number in range(100, 100 + num_seeds):
        for variant, height in (("default", 0.52), (name, 0.52 + gain)):
            recalls = dict.fromkeys(("recall_at_5", "recall_at_10", "recall_at_1_percent"), 0.9)
            metrics = {"recall_at_1": float(height + random.normal(0, noise)), **recalls}
            made.append(Trial(variant=variant, seed=number, metrics=metrics))
    return tuple(summarise(made, reference="default"))
