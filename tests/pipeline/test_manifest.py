"""A manifest is named by its content, refuses any other, and says in metres where pairs were taken."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pytest

from cvft.errors import DataError, ShardError, StoreError
from pipeline.geography import geocentric_m
from pipeline.manifest import Manifest, pair_table
from pipeline.pointer import Pointer
from pipeline.profile import ORIGINAL, preresized
from pipeline.sources.base import Problem
from pipeline.storage import Store


def located(places: list[tuple[float | None, float | None]], store_uri: str = "/nowhere") -> Manifest:
    image = {"offset": 0, "bytes": 1, "xxh3_128": "", "height_px": 1, "width_px": 1}
    rows = [
        {"key": str(number), "location_id": str(number), "split": "val", "shard": 0, "heading_deg": None}
        | {f"{role}_{name}": value for role in ("ground", "aerial") for name, value in image.items()}
        | {"latitude_deg": latitude, "longitude_deg": longitude}
        for number, (latitude, longitude) in enumerate(places)
    ]
    return Manifest(layout="table", plan="", pairs=pair_table(rows), shards=[], excluded=[], store_uri=store_uri)


def test_published_manifest_comes_back_whole(cvusa, tmp_path, make_shards):
    manifest = make_shards(cvusa, str(tmp_path / "store"))
    again = Manifest.load(manifest.uri)
    assert manifest.uri == str(tmp_path / f"store/manifests/{manifest.digest[:16]}.parquet")
    assert again.pairs.equals(manifest.pairs)
    assert (again.digest, again.shards, again.layout, again.plan) == (
        manifest.digest,
        manifest.shards,
        "cvusa",
        manifest.plan,
    )
    assert again.splits == {"train": 11, "val": 5}
    assert again.store_uri == str(tmp_path / "store")


def test_digest_is_the_contents_and_neither_the_places_nor_the_files(cvusa, tmp_path, make_shards):
    first = make_shards(cvusa, str(tmp_path / "one"))
    second = make_shards(cvusa, str(tmp_path / "two"))
    assert first.digest == second.digest
    rewritten = tmp_path / f"two/manifests/{first.digest[:16]}.parquet"
    pq.write_table(pq.read_table(rewritten), rewritten, compression="none", version="1.0")
    assert Manifest.load(str(rewritten)).digest == first.digest


def test_digest_of_a_known_manifest_is_a_constant():
    assert (
        located([(60.0, 24.0), (None, None)]).digest
        == "0f01ae4e6b6c81376e6c7d8128719a0001a71a8b5abfb539da3a03d303883643"
    )


def test_digest_changes_with_any_content():
    place = (60.0, 24.0)
    digests = {located([place]).digest, located([(60.0, 24.000001)]).digest, located([(None, None)]).digest}
    problem = Problem(kind="truncated", key="a", path="a.jpg", detail="")
    excluding = Manifest(
        layout="table", plan="", pairs=located([place]).pairs, shards=[], excluded=[problem], store_uri="/nowhere"
    )
    assert len(digests | {excluding.digest}) == 4


def test_profile_is_remembered_and_part_of_the_digest(tmp_path):
    pairs = located([(1.0, 2.0)]).pairs
    manifests = [
        Manifest(layout="table", plan="", pairs=pairs, shards=[], excluded=[], store_uri=str(tmp_path), profile=profile)
        for profile in (ORIGINAL, preresized((112, 616), (256, 256)), preresized((112, 616), (256, 260)))
    ]
    assert len({manifest.digest for manifest in manifests}) == 3
    assert [Manifest.load(manifest.publish()).profile for manifest in manifests] == [m.profile for m in manifests]


def test_null_differs_from_zero_in_the_digest():
    assert located([(0.0, 0.0)]).digest != located([(None, None)]).digest


def test_manifest_of_an_older_schema_is_refused_by_its_version(tmp_path):
    path = located([(1.0, 2.0)], str(tmp_path)).publish()
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"cvft"]) | {"schema_version": 1}
    pq.write_table(table.replace_schema_metadata({b"cvft": json.dumps(metadata).encode()}), path)
    with pytest.raises(ShardError, match="has schema version 1, this program reads 2; shard the raw data again"):
        Manifest.load(path)


class TestStoreInPlaceOfTheManifest:
    def test_pointer_is_followed_and_the_digest_said(self, tmp_path, caplog):
        manifest = located([(1.0, 2.0)], str(tmp_path))
        name = manifest.publish().removeprefix(f"{tmp_path}/")
        pointer = Pointer(generation=3, manifest=name, digest=manifest.digest, previous="0" * 64)
        (tmp_path / "dataset.json").write_bytes(pointer.encode())
        caplog.set_level("INFO")
        assert Manifest.load(str(tmp_path)).digest == manifest.digest
        assert f"generation 3, digest {manifest.digest}" in caplog.text

    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 1, "generation": 1}', b"\xff"])
    def test_damaged_pointer_is_told(self, content, tmp_path):
        (tmp_path / "dataset.json").write_bytes(content)
        with pytest.raises(ShardError, match=r"dataset\.json: is damaged"):
            Manifest.load(str(tmp_path))

    @pytest.mark.parametrize(
        "change",
        [{"manifest": ""}, {"manifest": 5}, {"manifest": "../a.parquet"}, {"generation": "1"}, {"digest": "g" * 64}],
        ids=str,
    )
    def test_pointer_whose_fields_make_no_sense_is_told(self, change, tmp_path):
        manifest = located([(1.0, 2.0)], str(tmp_path))
        manifest.publish()
        pointer = Pointer(generation=1, manifest=manifest.path, digest=manifest.digest, previous=None)
        (tmp_path / "dataset.json").write_text(json.dumps(json.loads(pointer.encode()) | change))
        with pytest.raises(ShardError, match=r"dataset\.json:? is damaged"):
            Manifest.load(str(tmp_path))

    def test_pointer_whose_digest_is_damaged_beyond_the_manifests_name_is_told(self, tmp_path):
        manifest = located([(1.0, 2.0)], str(tmp_path))
        manifest.publish()
        digest = manifest.digest[:16] + "0" * 48
        pointer = Pointer(generation=1, manifest=manifest.path, digest=digest, previous=None)
        (tmp_path / "dataset.json").write_bytes(pointer.encode())
        with pytest.raises(ShardError, match="its digest is not that of"):
            Manifest.load(str(tmp_path))

    def test_pointer_of_a_later_format_is_told(self, tmp_path):
        name = f"manifests/{'0' * 16}.parquet"
        content = json.loads(Pointer(generation=1, manifest=name, digest="0" * 64, previous=None).encode())
        (tmp_path / "dataset.json").write_text(json.dumps(content | {"format": 2}))
        with pytest.raises(ShardError, match="is of another format than 1"):
            Manifest.load(str(tmp_path))


def test_excluded_pairs_are_remembered(tmp_path):
    problem = Problem(kind="truncated", key="a", path="a.jpg", detail="Premature end of JPEG file")
    manifest = Manifest(
        layout="table", plan="", pairs=located([(1, 2)]).pairs, shards=[], excluded=[problem], store_uri=str(tmp_path)
    )
    assert Manifest.load(manifest.publish()).excluded == (problem,)


def test_publishing_twice_is_harmless(tmp_path):
    manifest = located([(1.0, 2.0)], str(tmp_path))
    assert manifest.publish() == manifest.publish()
    assert Store.from_uri(tmp_path).list() == [f"manifests/{manifest.digest[:16]}.parquet"]


def test_publishing_over_a_damaged_manifest_tells(tmp_path):
    manifest = located([(1.0, 2.0)], str(tmp_path))
    path = tmp_path / f"manifests/{manifest.digest[:16]}.parquet"
    manifest.publish()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ShardError, match="delete it and shard again"):
        manifest.publish()


def test_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    path = located([(1.0, 2.0), (3.0, 4.0)], str(tmp_path)).publish()
    with open(path, "rb") as stream:
        content = stream.read()
    num_refused = 0
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with open(path, "wb") as stream:
            stream.write(damaged)
        try:
            survivor = Manifest.load(path)
        except ShardError:
            num_refused += 1
        else:  # bits that Parquet does not use, such as its writer's name
            assert survivor.pairs.equals(located([(1.0, 2.0), (3.0, 4.0)]).pairs)
    assert num_refused > 0


def test_renamed_manifest_is_refused(tmp_path):
    path = tmp_path / "manifests/0123456789abcdef.parquet"
    located([(1.0, 2.0)], str(tmp_path)).publish()
    next(path.parent.iterdir()).rename(path)
    with pytest.raises(ShardError, match="renamed or damaged"):
        Manifest.load(str(path))


def test_other_names_and_absent_files_are_refused(tmp_path):
    with pytest.raises(ShardError, match=r"is no manifest and has no dataset\.json"):
        Manifest.load(str(tmp_path / "shards.parquet"))
    with pytest.raises(StoreError, match="no such file"):
        Manifest.load(str(tmp_path / "manifests/0123456789abcdef.parquet"))


def test_manifest_is_loaded_by_any_relative_path(tmp_path, monkeypatch):
    manifest = located([(1.0, 2.0)], str(tmp_path))
    name = manifest.publish().rpartition("/")[2]
    for folder, path in ((tmp_path, f"manifests/{name}"), (tmp_path / "manifests", name)):
        monkeypatch.chdir(folder)
        assert Manifest.load(path).store_uri == str(tmp_path)


def test_unknown_split_lists_the_known_ones(cvusa, tmp_path, make_shards):
    with pytest.raises(DataError, match="it has train, val"):
        make_shards(cvusa, str(tmp_path / "store")).split("test")


class TestLocation:
    @pytest.mark.parametrize("centre", [(0.0, 0.0), (45.0, -100.0), (60.2, 24.9), (-35.3, 149.1), (0.0, 180.0)])
    def test_distances_in_a_city_are_geodesics(self, centre):
        offsets_deg = np.random.default_rng(0).uniform(-0.09, 0.09, (40, 2))  # 20 km from south to north
        places = [(centre[0] + north, centre[1] + east) for north, east in offsets_deg.tolist()]
        places_m = located(places).location_m("val")
        assert places_m.shape == (40, 3)
        geodesic = pyproj.Geod(ellps="WGS84")
        for i in range(40):
            for j in range(i):
                expected_m = geodesic.inv(*places[i][::-1], *places[j][::-1])[2]
                assert math.dist(places_m[i], places_m[j]) == pytest.approx(expected_m, abs=0.03)

    def test_unknown_places_are_nan_and_shift_nobody(self):
        with_gap = located([(60.0, 24.0), (None, None), (60.1, 24.1)]).location_m("val")
        assert np.isnan(with_gap[1]).all()
        np.testing.assert_array_equal(with_gap[[0, 2]], located([(60.0, 24.0), (60.1, 24.1)]).location_m("val"))

    def test_dataset_without_places_is_all_nan(self):
        assert np.isnan(located([(None, None)] * 3).location_m("val")).all()

    def test_easting_and_northing_are_used_where_all_located_pairs_have_them(self):
        manifest = located([(-35.3, 149.1), (-35.3, 149.1), (None, None)])
        degrees_m = manifest.location_m("val")
        for easting_m, is_on_a_plane in (([5.0, 8.0, None], True), ([5.0, None, None], False)):
            names = manifest.pairs.column_names
            for name in ("easting_m", "northing_m"):
                column = pa.array(easting_m, pa.float64())
                manifest.pairs = manifest.pairs.set_column(names.index(name), name, column)
            found = manifest.location_m("val")
            expected = np.array([[5, 5, 0], [8, 8, 0], [np.nan] * 3]) if is_on_a_plane else degrees_m
            np.testing.assert_array_equal(found, expected)

    def test_splits_share_their_axes(self, cvusa, tmp_path, make_shards):
        manifest = make_shards(cvusa, str(tmp_path / "store"))
        for split in ("train", "val"):
            degrees = (manifest.split(split)[name].to_numpy() for name in ("latitude_deg", "longitude_deg"))
            np.testing.assert_array_equal(manifest.location_m(split), geocentric_m(*degrees))
