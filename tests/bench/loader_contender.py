"""One loader of bench_loader.py in a process of its own: NAME FOLDER; runs an epoch for each line of standard input.

Runs in the project's environment for `official`, `fast`, `exact` and `preresized`, and in `.venv-peers` for
`webdataset`, `litdata` and `streaming`, which get our decoder, two worker processes and no shuffling, their easiest
case. For each epoch it prints a line of JSON with its pairs and seconds; `shares` prints where our time goes instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

_ANSWERS = os.fdopen(os.dup(1), "w")
BATCH_SIZE = 32
NUM_WORKERS = 2
GROUND_PX, AERIAL_PX = (112, 616), (256, 256)
HALF_AERIAL_PX = 375
BGR_MEAN = (103.939, 116.779, 123.6)


def official(folder: Path) -> Callable[[], int]:
    """The authors' input_data: loose files, full decode, float32, then areas; one process, OpenCV as it comes."""
    lines = (folder / "raw/splits/train-19zl.csv").read_text().split()
    pairs = [line.split(",")[1::-1] for line in lines]

    def load(name: str, size_px: tuple[int, int]) -> np.ndarray:
        image = cv2.imread(str(folder / "raw" / name)).astype(np.float32)
        image = cv2.resize(image, size_px[::-1], interpolation=cv2.INTER_AREA)
        for channel, mean in enumerate(BGR_MEAN):
            image[:, :, channel] -= mean
        return image

    def epoch() -> int:
        random.shuffle(pairs)
        for start in range(0, len(pairs) - BATCH_SIZE + 1, BATCH_SIZE):
            views = [np.zeros([BATCH_SIZE, *size_px, 3], np.float32) for size_px in (GROUND_PX, AERIAL_PX)]
            for place, names in enumerate(pairs[start : start + BATCH_SIZE]):
                for view, name, size_px in zip(views, names, (GROUND_PX, AERIAL_PX), strict=True):
                    view[place] = load(name, size_px)
        return len(pairs) // BATCH_SIZE * BATCH_SIZE

    return epoch


def open_dataset(folder: Path, profile: str) -> Any:
    from pipeline.dataset import PairDataset  # noqa: PLC0415  ours is not in the peers' environment
    from pipeline.manifest import Manifest  # noqa: PLC0415

    store = folder / ("preresized" if profile == "preresized" else "original")
    return PairDataset(Manifest.load(str(store)), "train")


def ours(folder: Path, profile: str, *, num_threads: int = 2) -> Callable[[], int]:
    from cvft.config import PreprocessConfig  # noqa: PLC0415
    from pipeline.loader import Loader  # noqa: PLC0415

    dataset = open_dataset(folder, profile)
    preprocess = PreprocessConfig(ground_size_px=GROUND_PX, aerial_size_px=AERIAL_PX, decode_profile=profile)
    loader = Loader(dataset, preprocess=preprocess, batch_size=BATCH_SIZE, num_threads=num_threads)
    epochs = iter(range(1_000_000))
    return lambda: sum(batch.num_valid for batch in loader.train_batches(next(epochs)))


def decode_fast(ground: bytes, aerial: bytes) -> tuple[np.ndarray, np.ndarray]:
    """What our profile `fast` does with images of CVUSA's sizes."""
    pixels = simplejpeg.decode_jpeg(ground, min_height=GROUND_PX[0], min_width=GROUND_PX[1])
    half = simplejpeg.decode_jpeg(aerial, min_height=HALF_AERIAL_PX, min_width=HALF_AERIAL_PX)
    return pixels, cv2.resize(half, AERIAL_PX[::-1], interpolation=cv2.INTER_LINEAR)


def decode_sample(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    return decode_fast(sample["ground"], sample["aerial"])


def one_opencv_thread(_: int) -> None:
    cv2.setNumThreads(1)


def torch_loader(dataset: object, **options: object) -> Iterable:
    from torch.utils.data import DataLoader  # noqa: PLC0415

    common = {"num_workers": NUM_WORKERS, "persistent_workers": True, "worker_init_fn": one_opencv_thread}
    return DataLoader(dataset, **common, **options)


def count(loader: Iterable) -> Callable[[], int]:
    return lambda: sum(len(ground) for ground, _ in loader)


def webdataset_peer(folder: Path) -> Callable[[], int]:
    import webdataset as wds  # noqa: PLC0415
    from torch.utils.data import default_collate  # noqa: PLC0415

    shards = sorted(map(str, (folder / "original").rglob("train-*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=False).to_tuple("ground.jpg", "aerial.jpg")
    dataset = dataset.map(lambda pair: decode_fast(*pair)).batched(BATCH_SIZE, collation_fn=default_collate)
    return count(torch_loader(dataset, batch_size=None))


def raw_pairs(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "raw/splits/train-19zl.csv").read_text().split()
    names = [line.split(",") for line in lines]
    return [{"ground": f"{folder}/raw/{ground}", "aerial": f"{folder}/raw/{aerial}"} for aerial, ground, _ in names]


def read_pair(paths: dict[str, str]) -> dict[str, bytes]:
    return {role: Path(path).read_bytes() for role, path in paths.items()}


def streaming_peer(folder: Path) -> Callable[[], int]:
    """MosaicML streaming; its package as a whole wants torchvision, its base, where everything is, does not."""
    found = importlib.util.find_spec("streaming")
    package = types.ModuleType("streaming")
    package.__path__ = list(found.submodule_search_locations)
    package.__spec__ = found
    sys.modules["streaming"] = package
    from streaming.base import MDSWriter, StreamingDataset  # noqa: PLC0415

    class Pairs(StreamingDataset):
        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return decode_sample(super().__getitem__(index))

    out = folder / "streaming"
    if not (out / "index.json").exists():
        with MDSWriter(out=str(out), columns={"ground": "bytes", "aerial": "bytes"}) as writer:
            for paths in raw_pairs(folder):
                writer.write(read_pair(paths))
    dataset = Pairs(local=str(out), shuffle=False, batch_size=BATCH_SIZE)
    return count(torch_loader(dataset, batch_size=BATCH_SIZE))


def litdata_peer(folder: Path) -> Callable[[], int]:
    import litdata  # noqa: PLC0415

    class Pairs(litdata.StreamingDataset):
        def __getitem__(self, index: object) -> tuple[np.ndarray, np.ndarray]:
            return decode_sample(super().__getitem__(index))

    out = folder / "litdata"
    if not (out / "index.json").exists():
        inputs = raw_pairs(folder)
        litdata.optimize(fn=read_pair, inputs=inputs, output_dir=str(out), chunk_bytes="64MB", num_workers=1)
    options = {"num_workers": NUM_WORKERS, "persistent_workers": True, "worker_init_fn": one_opencv_thread}
    options["multiprocessing_context"] = "fork"  # `optimize` has set another one
    return count(litdata.StreamingDataLoader(Pairs(str(out), shuffle=False), batch_size=BATCH_SIZE, **options))


def shares(folder: Path, profile: str) -> dict[str, float]:
    """CPU milliseconds of a pair on one thread: finding and hashing its bytes, decoding them, everything else."""
    from pipeline.images import decode  # noqa: PLC0415

    epoch = ours(folder, profile, num_threads=1)
    epoch()
    begun = time.process_time()
    num_pairs = epoch()
    whole = time.process_time() - begun
    dataset = open_dataset(folder, profile)
    outs = [np.empty((*size_px, 3), np.uint8) for size_px in (GROUND_PX, AERIAL_PX)]
    read = decoding = 0.0
    for row in range(num_pairs):
        begun = time.process_time()
        images = dataset.read(row)
        between = time.process_time()
        for data, out in zip(images, outs, strict=True):
            decode(data, out, profile=profile)
        read += between - begun
        decoding += time.process_time() - between
    parts = {"read": read, "decode": decoding, "collate": max(0.0, whole - read - decoding)}
    return {name: round(1e3 * seconds / num_pairs, 4) for name, seconds in parts.items()}


CONTENDERS: dict[str, Callable[[Path], Callable[[], int]]] = {
    "official": official,
    "exact": lambda folder: ours(folder, "exact"),
    "fast": lambda folder: ours(folder, "fast"),
    "preresized": lambda folder: ours(folder, "preresized"),
    "webdataset": webdataset_peer,
    "litdata": litdata_peer,
    "streaming": streaming_peer,
}


def tell(content: dict) -> None:
    _ANSWERS.write(f"{json.dumps(content)}\n")
    _ANSWERS.flush()


def main() -> None:
    os.dup2(2, 1)  # what libraries print
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "shares":
        tell({profile: shares(folder, profile) for profile in ("fast", "preresized")})
        return
    epoch = CONTENDERS[name](folder)
    tell({"pairs": epoch()})  # warm: files in the page cache, workers started
    for _ in sys.stdin:
        begun = time.perf_counter()
        num_pairs = epoch()
        tell({"pairs": num_pairs, "seconds": time.perf_counter() - begun})


if __name__ == "__main__":
    main()
