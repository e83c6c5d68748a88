"""`infra/cost.md` is what its script makes of its inputs."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.bench import scale_page

_NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e\+\d+)?")


def test_the_page_is_what_the_script_makes_of_its_inputs():
    made = scale_page.make_page(yaml.safe_load(scale_page.INPUTS.read_text(encoding="utf-8")))
    page = scale_page.PAGE.read_text(encoding="utf-8")
    assert _NUMBER.sub("#", made) == _NUMBER.sub("#", page)
    # What Python's objects and Parquet's files take differs a little between their versions.
    numbers = [[float(found.replace(",", "")) for found in _NUMBER.findall(text)] for text in (made, page)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1)


def test_the_work_of_a_pair_is_that_of_its_two_images_and_below_that_of_training():
    work = scale_page.embedding_gflop()
    measured = yaml.safe_load(scale_page.INPUTS.read_text(encoding="utf-8"))["measured"]
    assert 0.3 < (work["ground_gflop"] + work["aerial_gflop"]) / measured["train_gflop_per_pair"] < 0.7
    assert work["ground_gflop"] / work["aerial_gflop"] == pytest.approx(112 * 616 / 256**2, rel=0.05)
