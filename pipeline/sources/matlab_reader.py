"""A program that turns CVACT's `ACT_data.mat` (standard input) into plain arrays (an .npz on standard output).

SciPy's compiled reader can crash on a damaged file instead of raising; here it takes nobody along. It ends with exit
code 0, or with 2 and the reason on standard error. It needs numpy and scipy alone.
"""

from __future__ import annotations

import io
import sys
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

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


def read(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Return `panoIds` [N], `utm` [N, 2] and, for each split that is there, its indices [n] under the split's name.

    Raises:
        ValueError: It is damaged, of MATLAB's version 7.3, or lacks what CVACT's has.
    """
    wanted = ["panoIds", "utm", *(struct for struct, _ in INDEX_FIELDS.values())]
    try:
        content = loadmat(io.BytesIO(data), variable_names=wanted)
    except NotImplementedError:
        raise ValueError("is a MATLAB 7.3 file; save it again in MATLAB with save(..., '-v7')") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"is damaged or no MATLAB file ({reason}); fetch it again") from None
    absent = [field for field in ("panoIds", "utm") if field not in content]
    if absent:
        raise ValueError(f"has no {' and no '.join(absent)}, so it is not CVACT's ACT_data.mat")
    names, utm_m = _strings(content["panoIds"]), _numbers(content["utm"], what="utm")
    if utm_m.shape != (len(names), 2):
        raise ValueError(f"utm has the shape {list(utm_m.shape)}, expected [{len(names)}, 2] as panoIds")
    indices = {
        split: _indices(content[struct], field, what=f"{struct}.{field}")
        for split, (struct, field) in INDEX_FIELDS.items()
        if struct in content
    }
    return {"panoIds": np.array(names, dtype=np.str_), "utm": utm_m, **indices}


def _strings(value: npt.NDArray[Any]) -> list[str]:
    """Return a character matrix or a cell array of strings as a list."""
    if value.dtype.kind == "U":
        return [str(text).strip() for text in value.ravel()]
    cells = [np.asarray(cell).ravel() for cell in value.ravel()] if value.dtype.kind == "O" else []
    if not cells or any(cell.dtype.kind != "U" or cell.size > 1 for cell in cells if cell.size):
        raise ValueError("panoIds is neither a character matrix nor a cell array of strings")
    return [str(cell[0]).strip() if cell.size else "" for cell in cells]


def _indices(struct: npt.NDArray[Any], field: str, *, what: str) -> npt.NDArray[np.float64]:
    if struct.dtype.names is None or field not in struct.dtype.names or struct.size != 1:
        raise ValueError(f"has no {what}, the list of a split's ids")
    return _numbers(struct[field].item(), what=what).ravel()


def _numbers(value: npt.NDArray[Any], *, what: str) -> npt.NDArray[np.float64]:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{what} does not hold numbers")
    return array.astype(np.float64)


if __name__ == "__main__":
    try:
        arrays = read(sys.stdin.buffer.read())
    except ValueError as problem:
        sys.exit(print(problem, file=sys.stderr) or 2)  # noqa: T201 - this is how it answers
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
    sys.stdout.buffer.write(stream.getvalue())
