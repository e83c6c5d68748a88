"""Queries that stand in the training split are found by bytes and by place, and nothing else is."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.leaks import TRAITS, Repeat, find_leaks, find_repeats, make_traits
from pipeline.manifest import PAIR_SCHEMA

LISTS = Path(__file__).parents[2].parent / "shared/real/cvusa_lists"


def table(*rows: dict) -> pa.Table:
    """A manifest's table whose rows differ in everything but what is told."""
    filled = [
        {
            "key": str(number),
            "location_id": str(number),
            "split": "train",
            "ground_xxh3_128": f"g{number}",
            "aerial_xxh3_128": f"a{number}",
            "latitude_deg": 60 + number / 1000,
            "longitude_deg": 24.0,
            "heading_deg": 10.0,
        }
        | row
        for number, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(filled, schema=PAIR_SCHEMA)


def read_list(name: str) -> list[list[str]]:
    return list(csv.reader((LISTS / name).read_text().splitlines()))


PLACE = {"latitude_deg": 60.0, "longitude_deg": 24.0, "heading_deg": 10.0}


@pytest.mark.parametrize(
    ("shared", "trait"),
    [({"ground_xxh3_128": "g0"}, TRAITS[0]), ({"aerial_xxh3_128": "a0"}, TRAITS[1]), (PLACE, TRAITS[2])],
)
def test_query_that_shares_one_trait_with_a_training_pair_is_leaked(shared, trait):
    leaks = find_leaks(table({}, {"split": "val"}, {"split": "val"} | shared), "val", train_split="train")
    assert leaks.is_leaked.tolist() == [False, True]
    assert leaks.num_leaked == 1
    assert leaks.num_by_trait == dict.fromkeys(TRAITS, 0) | {trait: 1}


def test_query_with_several_traits_in_common_is_counted_once():
    query = {"split": "val", "ground_xxh3_128": "g0", "aerial_xxh3_128": "a0"} | PLACE
    leaks = find_leaks(table({}, query), "val", train_split="train")
    assert (leaks.num_leaked, leaks.num_by_trait) == (1, dict.fromkeys(TRAITS, 1))


@pytest.mark.parametrize(
    "near", [{"heading_deg": 10.5}, {"heading_deg": None}, {"latitude_deg": 60.0000001}, {"longitude_deg": None}]
)
def test_another_heading_or_position_is_no_leak(near):
    leaks = find_leaks(table({}, {"split": "val"} | PLACE | near), "val", train_split="train")
    assert leaks.num_leaked == 0


def test_pairs_without_a_place_are_not_alike_and_those_without_any_heading_are():
    unknown = {"latitude_deg": None, "longitude_deg": None, "heading_deg": None}
    assert find_leaks(table(unknown, {"split": "val"} | unknown), "val", train_split="train").num_leaked == 0
    headless = PLACE | {"heading_deg": None}
    assert find_leaks(table(headless, {"split": "val"} | headless), "val", train_split="train").num_leaked == 1


def test_a_reference_that_the_dataset_lists_for_both_splits_is_no_leak_unless_another_location_has_it():
    shared = {"aerial_xxh3_128": "a", "location_id": "sat"}
    pairs = table(shared, shared | {"split": "val"})
    assert find_leaks(pairs, "val", train_split="train").num_leaked == 0
    pairs = table(shared, shared | {"split": "val"}, {"split": "val", "aerial_xxh3_128": "a"})
    assert find_leaks(pairs, "val", train_split="train").is_leaked.tolist() == [True, True]


def test_hashes_of_the_source_files_count_where_shards_hold_derived_images():
    sources = (("x", "train"), ("y", "val"), ("x", "val"))
    pairs = table(*({"ground_xxh3_128": "same", "ground_source_xxh3_128": x, "split": split} for x, split in sources))
    assert find_leaks(pairs, "val", train_split="train").is_leaked.tolist() == [False, True]


@pytest.mark.parametrize(
    ("split", "train_split", "reason"), [("val", "other", "no split 'other'"), ("train", "train", "training split")]
)
def test_without_a_training_split_leaks_are_unknown_and_not_none(split, train_split, reason):
    leaks = find_leaks(table({}, {"split": "val"}), split, train_split=train_split)
    assert leaks.is_leaked is None
    assert leaks.num_leaked is None
    assert reason in leaks.unknown_because


def test_repeats_name_the_first_pair_of_the_training_split_or_else_of_their_own():
    splits = ["val", "train", "val", "train", "val", "test"]
    traits = {"ground_bytes": ["x", "y", "y", "y", "x", "x"]}
    assert list(find_repeats(traits, splits, train_split="train")) == [
        Repeat(trait="ground_bytes", row=2, other=1, is_leak=True),
        Repeat(trait="ground_bytes", row=3, other=1, is_leak=False),
        Repeat(trait="ground_bytes", row=4, other=0, is_leak=False),
    ]


def test_repeats_equal_a_comparison_of_all_pairs():
    random = np.random.default_rng(0)
    num_pairs = 60
    splits = random.choice(["train", "val", "test"], num_pairs).tolist()
    ground, aerial = ([str(value) for value in random.integers(0, 40, num_pairs)] for _ in range(2))
    places = [(60.0, float(value), None) if value else None for value in random.integers(0, 30, num_pairs)]
    traits = make_traits(ground=ground, aerial=aerial, location_ids=list(map(str, range(num_pairs))), places=places)
    found = {(r.trait, r.row, r.is_leak) for r in find_repeats(traits, splits, train_split="train")}
    expected = set()
    for trait, values in zip(TRAITS, (ground, aerial, places), strict=True):
        for row in range(num_pairs):
            alike = [other for other in range(num_pairs) if other != row and values[other] == values[row] is not None]
            if splits[row] != "train" and any(splits[other] == "train" for other in alike):
                expected.add((trait, row, True))
            elif any(splits[other] == splits[row] and other < row for other in alike):
                expected.add((trait, row, False))
    assert found == expected


@pytest.mark.skipif(not LISTS.is_dir(), reason="the real lists are not beside the checkout")
def test_real_cvusa_has_the_known_377_leaked_queries_and_86_twins():
    """The training list here is de-duplicated within itself, which keeps one row of every place: the leaks stay."""
    locations = read_list("all.csv")
    rows = []
    for split, name in (("train", "train-19zl.deduplicated.csv"), ("val", "val-19zl.csv")):
        for _, ground, _ in read_list(name):
            key = Path(ground).stem
            latitude, longitude, heading = map(float, locations[int(key) - 1][2:])
            place = {"latitude_deg": latitude, "longitude_deg": longitude, "heading_deg": heading}
            unknown = {"ground_xxh3_128": None, "aerial_xxh3_128": None}
            rows.append({"key": key, "location_id": key, "split": split} | place | unknown)
    pairs = table(*rows)
    leaks = find_leaks(pairs, "val", train_split="train")
    assert (len(leaks.is_leaked), leaks.num_leaked) == (8884, 377)
    val = [(row["latitude_deg"], row["longitude_deg"], row["heading_deg"]) for row in rows if row["split"] == "val"]
    traits = make_traits(ground=[None] * 8884, aerial=[None] * 8884, location_ids=[""] * 8884, places=val)
    twins = {row for r in find_repeats(traits, ["val"] * 8884, train_split="train") for row in (r.row, r.other)}
    assert len(twins) == 86
