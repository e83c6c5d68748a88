"""CVACT's `ACT_data.mat`: ids, UTM positions and the splits' index lists, in MATLAB's shapes.

What `scipy.io.loadmat` makes of the published file: `panoIds` is a character matrix (N strings; a cell array of strings
is met as well), `utm` is [N, 2] in metres, and each split is a 1 x 1 struct with a field that holds an n x 1 array of
indices counted from 1: `mat["trainSet"]["trainInd"][0, 0] - 1`.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cvft.errors import DataError
from pipeline.sources import matlab_reader
from pipeline.sources.matlab_reader import INDEX_FIELDS

_REFUSED = 2


@dataclass(frozen=True, kw_only=True)
class ActData:
    """The content of `ACT_data.mat`.

    Attributes:
        pano_ids: N names.
        utm_m: Easting and northing, float64 [N, 2].
        indices: For each split the numbers of its ids, counted from 1 as they stand there, float64 [n].
    """

    pano_ids: list[str]
    utm_m: npt.NDArray[np.float64]
    indices: Mapping[str, npt.NDArray[np.float64]]


def read_act_data(data: bytes, *, name: str) -> ActData:
    """Read `ACT_data.mat`, in a process of its own (see `matlab_reader`).

    Args:
        data: The file.
        name: Its name, for messages.

    Raises:
        DataError: It is damaged, of MATLAB's version 7.3, or lacks what CVACT's has.
    """
    try:
        return _read(data)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


@lru_cache(maxsize=4)  # a process that validates and shards asks twice, and starting the reader takes half a second
def _read(data: bytes) -> ActData:
    command = [sys.executable, "-P", matlab_reader.__file__]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode == _REFUSED:
        raise DataError(done.stderr.decode().splitlines()[-1])
    if done.returncode:
        raise DataError(f"is damaged: its reader ended with code {done.returncode}; fetch it again")
    with np.load(io.BytesIO(done.stdout)) as arrays:
        return ActData(
            pano_ids=arrays["panoIds"].tolist(),
            utm_m=arrays["utm"],
            indices={split: arrays[split] for split in INDEX_FIELDS if split in arrays},
        )
