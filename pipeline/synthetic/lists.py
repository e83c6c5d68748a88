"""Where a town's images lie in the layouts that users have, and the lists that name them there.

CVUSA: bingmap/19/NNNNNNN.jpg, streetview/panos/NNNNNNN.jpg, splits/{train,val}-19zl.csv, split_locations/all.csv
CVACT: ANU_data_{small,test}/{streetview/<id>_grdView,satview_polish/<id>_satView_polish}.{jpg,png}, ACT_data.mat
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.io import savemat

from pipeline.schema import TEST, TRAIN, VAL
from pipeline.synthetic.geometry import LocalPlane
from pipeline.synthetic.noise import generator
from pipeline.synthetic.places import Place

TownLayout = Literal["cvusa", "cvact"]
FOLDERS: dict[TownLayout, tuple[str, ...]] = {
    "cvusa": ("bingmap/19", "streetview/panos", "splits", "split_locations"),
    "cvact": tuple(
        f"{half}/{folder}"
        for half in ("ANU_data_small", "ANU_data_test")
        for folder in ("streetview", "satview_polish")
    ),
}
UTM_ORIGIN_M = (692_000.0, 6_092_000.0)  # of the town in zone 55 south, where Canberra lies
_MAT_HEADER_BYTES = 116  # text of a MATLAB 5 file's header, which holds the time of writing


def image_paths(layout: TownLayout, place: Place, *, seed: int, suffix: str) -> tuple[list[str], list[str]]:
    """Return where the panorama and where the aerial image of a place go; CVACT's test half repeats those of val."""
    if layout == "cvusa":
        name = f"{place.number:07d}{suffix}"
        return [f"streetview/panos/{name}"], [f"bingmap/19/{name}"]
    halves = {TRAIN: ("small",), VAL: ("small", "test"), TEST: ("test",)}[place.split]
    name = pano_id(seed, place.number)
    return (
        [f"ANU_data_{half}/streetview/{name}_grdView{suffix}" for half in halves],
        [f"ANU_data_{half}/satview_polish/{name}_satView_polish{suffix}" for half in halves],
    )


def pano_id(seed: int, number: int) -> str:
    """Return 22 characters as CVACT's ids have them: letters, digits, `-` and `_`."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return base64.urlsafe_b64encode(digest)[:22].decode()


def cvusa_lists(seed: int, places: Sequence[Place]) -> dict[str, bytes]:
    """Return the split files and the locations: requested point (some metres off), own position, heading."""
    files = {}
    for split in (TRAIN, VAL):
        rows = [f"{place.number:07d}" for place in places if place.split == split]
        lines = [f"bingmap/19/{row}.jpg,streetview/panos/{row}.jpg,streetview/annotations/{row}.png\n" for row in rows]
        files[f"splits/{split}-19zl.csv"] = "".join(lines).encode()
    numbered = sorted(places)
    random = generator(seed, "requested")
    own = np.array([(place.east_m, place.north_m) for place in numbered])
    turn, off = random.uniform(0, 2 * np.pi, len(own)), random.uniform(1.0, 9.0, len(own))
    asked = own + np.stack([np.sin(turn), np.cos(turn)], axis=1) * off[:, None]
    plane = LocalPlane()
    columns = [*plane.to_degrees(*asked.T), *plane.to_degrees(*own.T), [place.heading_deg for place in numbered]]
    lines = ["{:.8f},{:.8f},{:.8f},{:.8f},{:.6f}\n".format(*row) for row in zip(*columns, strict=True)]
    return files | {"split_locations/all.csv": "".join(lines).encode()}


def cvact_lists(seed: int, places: Sequence[Place], *, num_without_files: int) -> dict[str, bytes]:
    """Return `ACT_data.mat` with all ids, their UTM positions and the three index lists, counted from 1.

    Args:
        seed: The town.
        places: Its cameras.
        num_without_files: How many ids each split's list names besides, of which there are no images.
    """
    numbered = sorted(places)
    names = [pano_id(seed, place.number) for place in numbered]
    own = [(place.east_m, place.north_m) for place in numbered]
    splits = [place.split for place in numbered]
    for split in (TRAIN, VAL, TEST):
        absent = range(len(names) + 1, len(names) + num_without_files + 1)
        names += [pano_id(seed, number) for number in absent]
        own += [own[0]] * num_without_files
        splits += [split] * num_without_files
    content = {
        "panoIds": np.array(names),
        "utm": np.array(own) + UTM_ORIGIN_M,
        "trainSet": _index_struct("trainInd", [k for k, split in enumerate(splits, start=1) if split == TRAIN]),
        "valSet": _index_struct("valInd", [k for k, split in enumerate(splits, start=1) if split == VAL]),
        "valSetAll": _index_struct("valInd", [k for k, split in enumerate(splits, start=1) if split != TRAIN]),
    }
    stream = io.BytesIO()
    savemat(stream, content)
    header = b"MATLAB 5.0 MAT-file, a synthetic town".ljust(_MAT_HEADER_BYTES)
    return {"ACT_data.mat": header + stream.getvalue()[_MAT_HEADER_BYTES:]}


def _index_struct(field: str, indices: list[int]) -> dict[str, Any]:
    """Return a split's struct; as in the published file, the index list [n, 1] is its second field."""
    column: NDArray[np.int32] = np.array(indices, np.int32).reshape(-1, 1)
    return {"numInd": len(indices), field: column}
