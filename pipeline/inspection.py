"""A look into a dataset: its first pairs as a contact sheet, read by range from the shards, its numbers as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from cvft.configuration import require
from cvft.errors import DataError, ShardError
from pipeline.images import thumbnail
from pipeline.manifest import Manifest
from pipeline.parquet import rows_where
from pipeline.report.contact_sheet import AERIAL_WIDTH_PX, GROUND_WIDTH_PX, Card, contact_sheet
from pipeline.report.gallery import format_distance
from pipeline.report.style import data_uri, rasterise
from pipeline.schema import ROLES
from pipeline.storage import Store

_NUM_THREADS = 8
_MAX_ON_SHEET = 300  # pictures of 30,000 pixels' height are of no use to anybody
_WIDTHS_PX = {"ground": GROUND_WIDTH_PX, "aerial": AERIAL_WIDTH_PX}


def draw_sheet(manifest: Manifest, *, shard: str | None = None, split: str | None = None, num: int = 12) -> Image.Image:
    """Draw the first pairs of a shard or of a split; without either, of the first shard.

    Args:
        manifest: The dataset.
        shard: A shard's path within the store, or the end of it (`train-00000.tar`).
        split: A split.
        num: How many pairs.

    Raises:
        ConfigError: `num` is out of range, or both a shard and a split are named.
        DataError: There is no such shard or split, or an image cannot be decoded.
        ShardError: A pair's bytes are not those that were sharded.
        StoreError: The shard cannot be read.
    """
    require(1 <= num <= _MAX_ON_SHEET, f"num: {num} must lie in [1, {_MAX_ON_SHEET}]")
    require(shard is None or split is None, f"name a shard or a split, not both ({shard} and {split})")
    if split is not None:
        rows, title = manifest.split(split), f"split {split}"
    else:
        number = 0 if shard is None else _find_shard(manifest, shard)
        rows, title = rows_where(manifest.pairs, "shard", number), manifest.shards[number].name
    shown = rows.slice(0, num)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        cards = list(pool.map(lambda row: _read_card(manifest, row), shown.to_pylist()))
    which = f"first {len(cards):,} of {rows.num_rows:,} pairs" if len(cards) < rows.num_rows else "all its pairs"
    return rasterise(contact_sheet(cards, title=f"{title}: {which}"))


def write_page(statistics: Mapping[str, Any], sheet: Image.Image, out: Path) -> None:
    """Write statistics and contact sheet as one HTML page that needs nothing else."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    picture = {"uri": data_uri(sheet, is_photo=True), "width_px": sheet.width, "height_px": sheet.height}
    table = statistics_table(statistics)
    page = environment.get_template("inspection.html.j2").render(facts=statistics, table=table, picture=picture)
    out.write_text(page, encoding="utf-8")


def statistics_table(statistics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the numbers of all splits in words: a row of headings, then one row for each fact."""
    splits: Mapping[str, Mapping[str, Any]] = statistics["splits"]
    facts = [list(_facts(split)) for split in splits.values()]
    names = [name for name, _ in facts[0]] if facts else []
    return [("", *splits), *((name, *(fact[row][1] for fact in facts)) for row, name in enumerate(names))]


def _facts(split: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "pairs", f"{split['pairs']:,}"
    yield "shards", f"{split['shards']:,}, {_size(split['bytes'])}"
    for role in ROLES:
        mean = split["image_bytes"][role] / split["pairs"]
        yield f"{role} images", f"{_sizes(split['sizes_px'][role])}; {_size(mean)} each"
    yield "located", "all" if split["located"] == split["pairs"] else f"{split['located']:,}"
    box = split["extent"]
    if box is None:
        yield "where", "unknown"
    else:
        corners = (_place(box["south_deg"], box["west_deg"]), _place(box["north_deg"], box["east_deg"]))
        sides = f"{format_distance(box['height_m'])} high, {format_distance(box['width_m'])} wide"
        yield "where", f"{corners[0]} to {corners[1]}; {sides}"
    nearest_m = split["nearest_m"]
    yield "nearest other pair (median)", "unknown" if nearest_m is None else f"{nearest_m:,.1f} m"
    yield "shared with train", "-" if split["leaks"] is None else f"{split['leaks']:,}"


def _find_shard(manifest: Manifest, name: str) -> int:
    found = [number for number, shard in enumerate(manifest.shards) if f"/{shard.name}".endswith(f"/{name}")]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(shard.name for shard in manifest.shards[:3])
    trouble = f"is the end of {len(found)} shards' names" if found else "is no shard"
    raise DataError(f"{name!r} {trouble} of {manifest.uri}; it has {len(manifest.shards)}: {shown}, ...")


def _read_card(manifest: Manifest, row: Mapping[str, Any]) -> Card:
    store = Store.from_uri(manifest.store_uri)
    shard = manifest.shards[row["shard"]].name
    start = row["ground_offset"]  # the two images are neighbours: one range holds both
    data = memoryview(store.read_range(shard, start, row["aerial_offset"] + row["aerial_bytes"] - start))
    pictures, sizes = {}, []
    for role in ROLES:
        image = data[row[f"{role}_offset"] - start :][: row[f"{role}_bytes"]]
        if xxhash.xxh3_128_hexdigest(image) != row[f"{role}_xxh3_128"]:
            raise ShardError(
                f"{shard}, key {row['key']}: the {role} image is damaged; `cvft verify` tells what else is"
            )
        try:
            pictures[role] = thumbnail(image, 2 * _WIDTHS_PX[role])
        except DataError as error:
            raise DataError(f"{shard}, key {row['key']}: {role} image: {error}") from None
        sizes.append(f"{role} {row[f'{role}_width_px']}x{row[f'{role}_height_px']}, {_size(len(image))}")
    return Card(ground=pictures["ground"], aerial=pictures["aerial"], title=row["key"], lines=[*_about(row), *sizes])


def _about(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["split"]
    if row["location_id"] != row["key"]:
        yield f"location {row['location_id']}"
    if row["latitude_deg"] is None:
        yield "no location"
    else:
        yield _place(row["latitude_deg"], row["longitude_deg"])
    if row["heading_deg"] is not None:
        yield f"heading {row['heading_deg']:.1f}°"
    if row["ground_first_row_px"] is not None:
        yield f"rows {row['ground_first_row_px']} to {row['ground_stop_row_px']} are used"


def _place(latitude_deg: float, longitude_deg: float) -> str:
    south, west = "NS"[latitude_deg < 0], "EW"[longitude_deg < 0]
    return f"{abs(latitude_deg):.5f}° {south}, {abs(longitude_deg):.5f}° {west}"


def _sizes(sizes: Mapping[str, int], num_shown: int = 3) -> str:
    shown = [f"{size} ({count:,})" if len(sizes) > 1 else size for size, count in list(sizes.items())[:num_shown]]
    more = f" and {len(sizes) - num_shown} more" if len(sizes) > num_shown else ""
    return ", ".join(shown) + more


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.0f} KB"
