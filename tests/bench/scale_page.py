"""Write `infra/cost.md`: what a run on CVUSA and CVACT needs and costs, and how it goes to a billion aerial tiles.

    PYTHONPATH=. python tests/bench/scale_page.py            # half a minute; prints the page
    PYTHONPATH=. python tests/bench/scale_page.py --write    # and writes it to infra/cost.md

Its inputs stand in `infra/cost/inputs.yaml`: what was measured and by which script, the data sets' sizes, prices; its
words in `infra/cost/page.md.j2`. Three things are found here and now: the work of an embedding, by torch's counter of
FLOP on the official network; the bytes of a manifest's row on disk and in memory; the memory of a pair in the driver
that plans. The latter two on rows of random keys and hashes like the real ones. The rest is arithmetic.
"""

from __future__ import annotations

import argparse
import io
import secrets
import sys
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from cvft.config import ModelConfig, PreprocessConfig
from cvft.model import build_model
from pipeline.manifest import PAIR_SCHEMA
from pipeline.schema import Location, PairSource
from pipeline.storage import FileStatus

ROOT = Path(__file__).parents[2]
INPUTS, TEMPLATE, PAGE = ROOT / "infra/cost/inputs.yaml", ROOT / "infra/cost/page.md.j2", ROOT / "infra/cost.md"
TILES = (10**6, 10**8, 10**9)
NUM_ROWS = 10_000
DESCRIPTOR = 4096
PAIRS_PER_SHARD = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    page = make_page(yaml.safe_load(INPUTS.read_text(encoding="utf-8")))
    print(page, end="")
    if arguments.write:
        PAGE.write_text(page, encoding="utf-8")
    return 0


def make_page(inputs: dict[str, Any]) -> str:
    measured = inputs["measured"]
    found = {**embedding_gflop(), **row_bytes(), "driver_pair_bytes": driver_pair_bytes()}
    preresized = measured["decode_pairs_per_cpu_s"] / measured["decode_preresized_pairs_per_cpu_s"]
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    return (
        template.render(
            date=inputs["prices"]["date"],
            data_table=_data_table(inputs),
            training_table=_training_table(inputs),
            scale_table=_scale_table(inputs, found),
            preresized_share=f"{preresized:.2f}",
            kept_pixels=_bytes(44_416 * (112 * 616 + 256 * 256) * 3),
            pair_gflop=f"{found['ground_gflop'] + found['aerial_gflop']:.0f}",
            rank_cpu_s=measured["rank_cpu_s"],
            rank_cvact_min=f"{_rank_cpu_s(measured) * 92_802**2 / 60:.0f}",
            driver_pair_bytes=f"{found['driver_pair_bytes']:,.0f}",
            row_memory_bytes=f"{found['row_memory_bytes']:.0f}",
            driver_of_store=_bytes(1e7 * found["driver_pair_bytes"]),
            worker_of_store=_bytes(1e7 * found["row_memory_bytes"]),
            descriptor=f"{DESCRIPTOR:,}",
        )
        + "\n"
    )


def _rank_cpu_s(measured: dict[str, Any]) -> float:
    """CPU seconds of one query against one reference."""
    return measured["rank_cpu_s"] / measured["rank_num_queries"] / measured["rank_num_references"]


# --- what is found here ----------------------------------------------------------------------------------------------


@cache
def embedding_gflop() -> dict[str, float]:
    """The work of embedding one image of each kind with the official network, forward only."""
    preprocess = PreprocessConfig()
    model = build_model(ModelConfig(), preprocess).eval()
    ground = torch.zeros(1, 3, *preprocess.ground_size_px)
    aerial = torch.zeros(1, 3, *preprocess.aerial_size_px)
    work = {}
    for name, embed, pixels in (("ground", model.embed_ground, ground), ("aerial", model.embed_aerial, aerial)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            embed(pixels)
        work[f"{name}_gflop"] = counter.get_total_flops() / 1e9
    return work


def row_bytes() -> dict[str, float]:
    """Bytes of a pair in a manifest, on disk and in memory."""
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {}
    for field in PAIR_SCHEMA:
        if field.name == "key":
            values: Any = [f"{number:09d}" for number in range(NUM_ROWS)]
        elif field.name.endswith("xxh3_128") and not field.name.startswith(("ground_source", "aerial_source")):
            values = [rng.bytes(16).hex() for _ in range(NUM_ROWS)]
        elif field.name in ("location_id",):
            values = columns["key"]
        elif field.name == "split":
            values = ["train"] * NUM_ROWS
        elif field.name == "shard":
            values = np.arange(NUM_ROWS) // PAIRS_PER_SHARD
        elif field.name.endswith("_offset"):
            values = rng.integers(0, 2**28, NUM_ROWS)
        elif field.name.endswith("_bytes"):
            values = rng.integers(40_000, 150_000, NUM_ROWS)
        elif field.name.endswith("_px") and "row" not in field.name:
            values = np.full(NUM_ROWS, 750)
        elif field.name.endswith("_deg"):
            values = rng.uniform(-90, 90, NUM_ROWS)
        else:
            values = None
        columns[field.name] = pa.nulls(NUM_ROWS, field.type) if values is None else pa.array(values, field.type)
    table = pa.table(columns, schema=PAIR_SCHEMA)
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    return {"row_disk_bytes": len(stream.getvalue()) / NUM_ROWS, "row_memory_bytes": table.nbytes / NUM_ROWS}


def driver_pair_bytes() -> float:
    """Python memory of a pair while `shard` plans."""
    tracemalloc.start()
    pairs = []
    for number in range(NUM_ROWS):
        key = f"{number:09d}"
        status = [FileStatus(num_bytes=100_000 + number, stamp=secrets.token_hex(8)) for _ in range(2)]
        place = Location(latitude_deg=number / 1e4, longitude_deg=number / 2e4)
        pairs.append(
            PairSource(
                key=key,
                split="train",
                ground=f"streetview/panos/{key}.jpg",
                aerial=f"bingmap/19/{key}.jpg",
                ground_status=status[0],
                aerial_status=status[1],
                location=place,
                location_id=key,
            )
        )
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / len(pairs)


# --- the page --------------------------------------------------------------------------------------------------------


def _data_table(inputs: dict[str, Any]) -> str:
    prices = inputs["prices"]
    titles = ["", "pairs", "bytes", "shards of 1,000", "sharding, images decoded"]
    lines = [f"| {' | '.join([*titles, 'cost (assumed price)', 'store a month (assumed)'])} |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, numbers in inputs["datasets"].items():
        pairs = sum(numbers.get(split, 0) for split in ("train", "val", "test"))
        num_bytes = pairs * numbers["pair_kb"] * 1e3
        # The work of the check goes with the bytes; it was measured on pairs of 174 KB.
        cpu_h = pairs / inputs["measured"]["shard_pairs_per_cpu_s"] * numbers["pair_kb"] / 174 / 3600
        lines.append(
            f"| {name} | {pairs:,} | {_bytes(num_bytes)} | {-(-pairs // PAIRS_PER_SHARD):,} | {cpu_h * 60:.0f} CPU min "
            f"| {_usd(_cpu_usd(cpu_h, prices))} | {_usd(num_bytes / 1e9 * prices['store_usd_per_gb_month'])} |"
        )
    return "\n".join(lines)


def _training_table(inputs: dict[str, Any]) -> str:
    measured, prices, recipes = inputs["measured"], inputs["prices"], inputs["recipes"]
    titles = [f"{name}: {recipe['epochs']} epochs, batch {recipe['batch']}" for name, recipe in recipes.items()]
    head = ["GPU", "pairs/s at batch 128", "CPU cores that feed it", *titles, "on demand (assumed)", "spot (assumed)"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for gpu, spec in prices["gpus"].items():
        share = spec["peak_tflops"] / prices["gpus"]["H100"]["peak_tflops"]
        speed = measured["train_pairs_per_s"][128] * share
        hours = [
            recipe["epochs"] * 35_532 / (measured["train_pairs_per_s"][recipe["batch"]] * share) / 3600
            for recipe in recipes.values()
        ]
        usd = [time_h * spec["usd_per_h"] / spec["gpus"] for time_h in hours]
        cells = [f"{gpu} (measured)" if gpu == "H100" else gpu, f"{speed:,.0f}"]
        cells += [f"{speed / measured['decode_pairs_per_cpu_s']:.1f}", *map(_hours, hours)]
        cells += [" / ".join(map(_usd, usd)), " / ".join(_usd(one * prices["spot_share"]) for one in usd)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _scale_table(inputs: dict[str, Any], found: dict[str, float]) -> str:
    measured, prices = inputs["measured"], inputs["prices"]
    rate = (
        measured["train_pairs_per_s"][128] * measured["train_gflop_per_pair"] / 1e3
    )  # TFLOP/s of the H100 in training
    rank = _rank_cpu_s(measured)
    gpu, cpu = prices["gpus"]["H100"], prices["cpu"]
    gpu_usd = gpu["usd_per_h"] / gpu["gpus"] * prices["spot_share"]
    rows: dict[str, list[str]] = {}

    def row(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    for tiles in TILES:
        num_bytes = tiles * inputs["tile_kb"] * 1e3
        cpu_h = tiles / measured["shard_pairs_per_cpu_s"] * inputs["tile_kb"] / 174 / 3600
        gpu_h = tiles * found["aerial_gflop"] / 1e3 / rate / 3600
        decode_h = tiles / measured["decode_pairs_per_cpu_s"] * inputs["tile_kb"] / 174 / 3600
        puts = tiles / PAIRS_PER_SHARD * (2 + num_bytes / tiles * PAIRS_PER_SHARD / 64e6)
        row("bytes", _bytes(num_bytes))
        row("store, a month (assumed price)", _usd(num_bytes / 1e9 * prices["store_usd_per_gb_month"]))
        row("shards of 1,000", f"{tiles // PAIRS_PER_SHARD:,}")
        row("requests that write them", f"{puts:,.0f}, {_usd(puts / 1000 * prices['put_usd_per_1000'])}")
        row("manifest, on disk", _bytes(tiles * found["row_disk_bytes"]))
        row("manifest, in memory", _bytes(tiles * found["row_memory_bytes"]))
        row("pairs in the driver that plans", _bytes(tiles * found["driver_pair_bytes"]))
        row("sharding, images decoded", f"{cpu_h:,.3g} CPU h, {_usd(_cpu_usd(cpu_h, prices))}")
        row(f"... on 100 machines of {cpu['cores']} cores", _hours(cpu_h / cpu["cores"] / 100))
        row("embedding on H100s", f"{gpu_h:,.3g} GPU h, {_usd(gpu_h * gpu_usd)} spot")
        row("... on 16 of them", _hours(gpu_h / 16))
        row("... decoding for it", f"{decode_h:,.3g} CPU h, {decode_h / gpu_h:.0f} cores for each GPU")
        row("index, float32", _bytes(tiles * DESCRIPTOR * 4))
        row("index, float16", _bytes(tiles * DESCRIPTOR * 2))
        row("one query, exact", f"{rank * tiles:,.2g} CPU s")
    head = " | ".join(f"10^{len(str(tiles)) - 1} tiles" for tiles in TILES)
    table = [f"| | {head} |", "|---|" + "---|" * len(TILES)]
    table += [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]
    return "\n".join(table)


def _cpu_usd(cpu_h: float, prices: dict[str, Any]) -> float:
    return cpu_h / prices["cpu"]["cores"] * prices["cpu"]["usd_per_h"] * prices["spot_share"]


def _bytes(number: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.0f} h" if hours < 72 else f"{hours / 24:,.0f} days"


def _usd(usd: float) -> str:
    return "below $0.01" if usd < 0.01 else f"${usd:,.0f}" if usd >= 10 else f"${usd:,.2f}"


if __name__ == "__main__":
    sys.exit(main())
