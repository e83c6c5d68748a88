"""CVACT's `ACT_data.mat`: ids, UTM positions and the splits' index lists, in MATLAB's shapes.

What `scipy.io.loadmat` makes of the published file: `panoIds` is a character matrix (N strings; a cell array of strings
is met as well), `utm` is [N, 2] in metres, and each split is a 1 x 1 struct with a field that holds an n x 1 array of
indices counted from 1: `mat["trainSet"]["trainInd"][0, 0] - 1`.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from cvft.errors import DataError

# Everything that a damaged file has been seen to make the reader raise.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MatReadError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
    zlib.error,
)
INDEX_FIELDS = {"train": ("trainSet", "trainInd"), "val": ("valSet", "valInd"), "test": ("valSetAll", "valInd")}


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
    """Read `ACT_data.mat`.

    Args:
        data: The file.
        name: Its name, for messages.

    Raises:
        DataError: It is damaged, of MATLAB's version 7.3, or lacks what CVACT's has.
    """
    try:
        content = loadmat(
            io.BytesIO(data), variable_names=["panoIds", "utm", *(name for name, _ in INDEX_FIELDS.values())]
        )
    except NotImplementedError:
        raise DataError(f"{name}: is a MATLAB 7.3 file; save it again in MATLAB with save(..., '-v7')") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: is damaged or no MATLAB file ({reason}); fetch it again") from None
    absent = [field for field in ("panoIds", "utm") if field not in content]
    if absent:
        raise DataError(f"{name}: has no {' and no '.join(absent)}, so it is not CVACT's ACT_data.mat")
    pano_ids = _strings(content["panoIds"], name=name)
    utm_m = _numbers(content["utm"], what="utm", name=name)
    if utm_m.shape != (len(pano_ids), 2):
        raise DataError(f"{name}: utm has the shape {list(utm_m.shape)}, expected [{len(pano_ids)}, 2] as panoIds")
    indices = {
        split: _indices(content[struct], field, what=f"{struct}.{field}", name=name)
        for split, (struct, field) in INDEX_FIELDS.items()
        if struct in content
    }
    return ActData(pano_ids=pano_ids, utm_m=utm_m, indices=indices)


def _strings(value: npt.NDArray[Any], *, name: str) -> list[str]:
    """Return a character matrix or a cell array of strings as a list."""
    if value.dtype.kind == "U":
        return [str(text).strip() for text in value.ravel()]
    cells = [np.asarray(cell).ravel() for cell in value.ravel()] if value.dtype.kind == "O" else []
    if not cells or any(cell.dtype.kind != "U" or cell.size > 1 for cell in cells if cell.size):
        raise DataError(f"{name}: panoIds is neither a character matrix nor a cell array of strings")
    return [str(cell[0]).strip() if cell.size else "" for cell in cells]


def _indices(struct: npt.NDArray[Any], field: str, *, what: str, name: str) -> npt.NDArray[np.float64]:
    if struct.dtype.names is None or field not in struct.dtype.names or struct.size != 1:
        raise DataError(f"{name}: has no {what}, the list of a split's ids")
    return _numbers(struct[field].item(), what=what, name=name).ravel()


def _numbers(value: npt.NDArray[Any], *, what: str, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{name}: {what} does not hold numbers")
    return array.astype(np.float64)
