"""A plan puts every pair into one shard, mixed by the seed; its folder is named by what is cut how on top of what."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cvft.errors import ConfigError, ShardError
from pipeline.manifest import Manifest
from pipeline.plan import Cut, Plan, make_plan, read_plan
from pipeline.profile import preresized
from pipeline.sources.detect import open_source
from pipeline.storage import Store


def plan_of(root: Path, *, base: Manifest | None = None, **options: object) -> Plan:
    cut = Cut(**({"pairs_per_shard": 100} | options))
    return make_plan(open_source(root), cut, check_images=True, base=base)


def test_every_pair_is_in_one_shard_of_its_split(cvusa):
    specs = plan_of(cvusa, pairs_per_shard=4).specs
    assert [len(spec.pairs) for spec in specs] == [4, 4, 3, 4, 1]
    assert [spec.name.rpartition("/")[2] for spec in specs] == [
        "train-00000.tar",
        "train-00001.tar",
        "train-00002.tar",
        "val-00000.tar",
        "val-00001.tar",
    ]
    keys = sorted(pair.key for spec in specs for pair in spec.pairs)
    assert keys == sorted(pair.key for pair in open_source(cvusa).pairs)


def test_pairs_are_mixed_by_the_seed_and_not_by_the_lists_order(cvusa):
    before = plan_of(cvusa)
    path = cvusa / "splits/train-19zl.csv"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    after = plan_of(cvusa)
    assert [spec.pairs for spec in after.specs] == [spec.pairs for spec in before.specs]
    assert after.fingerprint == before.fingerprint
    keys = [pair.key for pair in before.specs[0].pairs]
    assert keys != sorted(keys)
    assert keys != [pair.key for pair in plan_of(cvusa, seed=1).specs[0].pairs]


def test_anything_that_changes_a_shards_bytes_changes_the_folder(cvusa, tmp_path, make_shards):
    options = [{}, {"seed": 1}, {"pairs_per_shard": 9}, {"profile": preresized((14, 77), (16, 16))}]
    plans = [plan_of(cvusa, **option) for option in options]
    plans.append(plan_of(cvusa, base=make_shards(cvusa, str(tmp_path / "store"))))
    (cvusa / "bingmap/19/0000001.jpg").write_bytes(b"changed")
    plans.append(plan_of(cvusa))
    assert len({plan.folder for plan in plans}) == len(plans)
    assert plans[0].content == plans[4].content


def test_files_times_do_not_enter_the_fingerprint(cvusa):
    before = plan_of(cvusa).fingerprint
    for path in cvusa.rglob("*.jpg"):
        path.touch()
    assert plan_of(cvusa).fingerprint == before


def test_document_says_where_each_pair_goes(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    facts = read_plan(manifest)
    assert facts.cut == Cut(pairs_per_shard=4)
    assert (facts.layout, facts.num_kept_shards) == ("cvusa", 0)
    assert facts.content == plan_of(cvusa, pairs_per_shard=4).content
    table = pq.read_table(tmp_path / f"store/plans/{manifest.plan[:16]}.parquet")
    names = json.loads(table.schema.metadata[b"cvft"])["shards"]
    planned = {row["key"]: names[row["shard"]] for row in table.to_pylist()}
    assert planned == {row["key"]: manifest.shards[row["shard"]].name for row in manifest.pairs.to_pylist()}


def test_document_is_compact(tmp_path):
    rows = [f"k{number:06d},a.jpg,a.jpg" for number in range(20_000)]
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "pairs.csv").write_text("key,ground,aerial\n" + "\n".join(rows))
    plan_of(tmp_path, pairs_per_shard=1000).write(Store.from_uri(tmp_path / "store"))
    (path,) = (tmp_path / "store/plans").iterdir()
    assert path.stat().st_size < 10 * len(rows)


@pytest.mark.parametrize("content", [None, b"", b"PAR1"])
def test_missing_or_damaged_document_is_told_with_what_to_do(content, cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    (path,) = (tmp_path / "store/plans").iterdir()
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ShardError, match=r"plans/.*--rebuild"):
        read_plan(manifest)


@pytest.mark.parametrize("option", [{"pairs_per_shard": 0}, {"pairs_per_shard": -1}, {"seed": -1}, {"seed": 2**64}])
def test_number_out_of_range_is_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=f"^{name}: {value} must"):
        Cut(**option)
