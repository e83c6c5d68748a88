"""The model card: what a registered model is, what it is good for, how good it is, and what nobody should ask of it.

Sections after Mitchell et al., Model Cards for Model Reporting, 2019. It states what the checkpoint, the run and the
measurement say, and nothing besides.
"""

from __future__ import annotations

from collections.abc import Iterable

from cvft.retrieval import one_percent_k
from pipeline.model_facts import (
    HEADS,
    Comparison,
    Measurement,
    Origin,
    code_text,
    costs_text,
    data_text,
    percent,
    recipe_text,
)

_TITLES: dict[int | str, str] = {1: "R@1", 5: "R@5", 10: "R@10", "1_percent": "R@1 %"}


def model_card(
    name: str,
    origin: Origin,
    *,
    version: int | None = None,
    measurement: Measurement | None = None,
    comparison: Comparison | None = None,
) -> str:
    """Return the card as Markdown.

    Args:
        name: The registered model.
        origin: Where the model comes from.
        version: Its version; none before it has one.
        measurement: The newest measurement; none if there is none.
        comparison: How it stood beside the champion; none if it was not compared.
    """
    title = f"# Model card: {name}{f', version {version}' if version else ''}"
    sections = {
        "": _summary(origin, comparison),
        "What it is for": _uses(),
        "How it was trained": _training(origin),
        "How good it is": _quality(origin, measurement),
        "Beside the champion of its time": _comparison(comparison),
        "What goes in and what comes out": _interface(origin),
        "How to load it": _loading(name, version),
        "Limits": _limits(origin),
        "Licence": _licence(origin),
    }
    parts = [f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items()]
    return "\n\n".join([title, *parts]) + "\n"


def _summary(origin: Origin, comparison: Comparison | None) -> str:
    head = HEADS[origin.info.model.head.kind]
    status = comparison.headline if comparison else "A candidate: nothing has compared it with a champion yet."
    return (
        "Finds where a street-level panorama was taken, among aerial images of known places. Each image becomes a"
        " descriptor, a unit vector; the aerial image whose descriptor is most similar is the answer."
        f" The two views meet by {head}.\n\n{status}"
    )


def _uses() -> str:
    return (
        "- For ranking aerial images of one area by how well they fit a panorama, in research and as one hint of"
        " several.\n"
        "- Not for finding out where a person is without their consent.\n"
        "- Not as the only source of a position that somebody's safety depends on.\n"
        "- Not for places of which no aerial image is among the references: it names the most similar one all the same."
    )


def _training(origin: Origin) -> str:
    rows = {
        "Data": data_text(origin),
        "Recipe": recipe_text(origin),
        "Chosen": f"step {origin.info.step:,}, {_choice(origin)}",
        "Network": f"{_trunk(origin)}; {costs_text(origin, None)}",
        "Code": code_text(origin),
    }
    return _table(("", ""), rows.items())


def _choice(origin: Origin) -> str:
    if not origin.config:
        return "nobody recorded why"
    return f"the evaluated epoch with the highest R@1 on split {origin.setting('data.eval_split', 'val')}"


def _trunk(origin: Origin) -> str:
    backbone = origin.info.model.backbone
    if backbone.kind == "timm":
        return f"trunk {backbone.name} of timm"
    start = "random weights" if backbone.weights is None else "weights from a file"
    sharing = "one trunk for both views" if backbone.is_shared else "one trunk for each view"
    return (
        f"{sum(backbone.blocks)} convolutions of {backbone.width:g} times VGG16's width, {sharing}, begun from {start}"
    )


def _quality(origin: Origin, found: Measurement | None) -> str:
    if found is None:
        return "Not measured."
    columns = {"all queries": "", "without leaked ones": "_deleaked"}
    if found.hit_distance_m is not None:
        columns[f"any reference within {found.hit_distance_m:g} m"] = found.judged_suffix
    rows = [
        (title, *(percent(found.recall(k, end)) for end in columns.values()), _chance(found, k))
        for k, title in _TITLES.items()
    ]
    number = {key: found.metrics.get(f"num_{key}") for key in ("queries", "references", "leaked_queries")}
    leaked = "an unknown number" if number["leaked_queries"] is None else f"{number['leaked_queries']:,.0f}"
    text = [
        _table(("recall", *columns, "a guess"), rows),
        "",
        f"{number['queries'] or 0:,.0f} queries of split `{found.split}` among {number['references'] or 0:,.0f}"
        f" references, manifest `{found.digest[:16]}`{f', measured on {found.day}' if found.day else ''}."
        f" Of the queries, {leaked} are in the training split as well. Equal scores count against the query.",
    ]
    if origin.info.manifest_digest == found.digest and origin.setting("data.train_split") == found.split:
        text.append("These are the very pairs that it was trained on: of places never seen this says nothing.")
    if _is_choosing_split(origin, found):
        text.append("The checkpoint was chosen on this very split, which flatters it a little.")
    if origin.info.manifest_digest not in (None, found.digest):
        text.append(
            f"It was trained on another manifest, `{str(origin.info.manifest_digest)[:16]}`: whether queries stand in"
            " that one was not looked at."
        )
    if found.latency_ms is not None and found.model_mb is not None:
        text.append(
            f"One ground image takes {found.latency_ms:.1f} ms ({found.device}, median); the files are"
            f" {found.model_mb:.1f} MB."
        )
    return "\n".join(text)


def _chance(found: Measurement, k: int | str) -> str:
    references = found.metrics.get("num_references")
    if not references:
        return "unknown"
    number = one_percent_k(int(references)) if isinstance(k, str) else k
    return percent(min(number / references, 1.0))


def _is_choosing_split(origin: Origin, found: Measurement) -> bool:
    return origin.info.manifest_digest == found.digest and origin.setting("data.eval_split") == found.split


def _comparison(comparison: Comparison | None) -> str:
    if comparison is None:
        return "It was not compared with one."
    verdict = comparison.verdict
    lines = [f"{comparison.headline} Gate `{comparison.gate}`:", ""]
    lines += [f"- {'holds' if item.holds else 'FAILS'}: {item.text}." for item in verdict.conditions]
    lines += [f"- Note: {note}." for note in verdict.notes]
    if comparison.champion is not None:
        lines += ["", "Both models answered the same queries; the interval is a paired bootstrap over them."]
    return "\n".join(lines)


def _interface(origin: Origin) -> str:
    preprocess, dim = origin.info.preprocess, origin.descriptor_dim
    (ground_rows, ground_columns), (aerial_rows, aerial_columns) = preprocess.ground_size_px, preprocess.aerial_size_px
    rows = [
        ("in", "`ground`", f"uint8 [N, {ground_rows}, {ground_columns}, 3]", "panorama, RGB, resized to this"),
        ("in", "`aerial`", f"uint8 [M, {aerial_rows}, {aerial_columns}, 3]", "aerial image, RGB, resized to this"),
        ("out", "`ground`", f"float32 [N, {dim}]", "unit vectors"),
        ("out", "`aerial`", f"float32 [M, {dim}]", "unit vectors"),
    ]
    return (
        f"{_table(('', 'name', 'type and shape', ''), rows)}\n\n"
        "N and M may differ; to embed one view alone give none of the other, [0, rows, columns, 3]. Similarity is the"
        " dot product. Channel order, mean and deviation are the model's own business."
    )


def _loading(name: str, version: int | None) -> str:
    return f"""With MLflow and the model's own `requirements.txt`:

```python
import mlflow
model = mlflow.pyfunc.load_model("models:/{name}/{version or "VERSION"}")
descriptors = model.predict({{"ground": ground, "aerial": aerial}})
```

With torch, numpy, safetensors and the `cvft` package alone (`cvft models --fetch FOLDER` copies the checkpoint):

```python
from pathlib import Path
from cvft.checkpoint import load_model
from cvft.preprocess import Preprocess
model, info = load_model(Path("FOLDER"))
descriptors = model.embed_ground(Preprocess(info.preprocess)(ground))  # uint8 tensor [N, rows, columns, 3]
```"""


def _limits(origin: Origin) -> str:
    augment = origin.setting("train.augment", {})
    fov = augment.get("fov_deg", [360.0, 360.0])
    lines = [
        "It knows the places, seasons and cameras of its training data. What it does elsewhere, nobody has measured."
    ]
    if not origin.config:
        lines.append("How its panoramas were turned and cut in training is not recorded; take north in the middle.")
    elif augment.get("is_orientation_unknown"):
        lines.append("Panoramas may be turned in any direction: it was trained so.")
    else:
        lines.append("North must be in the middle of the panorama's width: it was trained with nothing else.")
    if origin.config and list(fov) == [360.0, 360.0]:
        lines.append("The panorama must show all 360 degrees: it was trained with nothing less.")
    elif origin.config:
        lines.append(f"Panoramas may show from {fov[0]:g} to {fov[1]:g} degrees, the rest blank: it was trained so.")
    lines.append("The aerial image must have north up and the camera's place in its middle.")
    lines.append("It gives similarities, not probabilities: none of them says how sure it is.")
    return "\n".join(f"- {line}" for line in lines)


def _licence(origin: Origin) -> str:
    data = origin.data_licence or (
        "nobody recorded the data's licence. CVUSA, CVACT and VIGOR are given by their authors for research on request;"
        " ask them before you use weights trained on their images for anything else"
    )
    return f"- Code: Apache-2.0.\n- Data: {data}."


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
