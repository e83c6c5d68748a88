"""The golden inputs from their seeds: images, and the official checkpoint's variables by their TensorFlow names.

Written from README.md beside this file and from the official names alone, independently of `cvft.official`.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VECTORS = Path(__file__).with_name("cvft_official_vectors.npz")
BGR_MEAN = (103.939, 116.779, 123.6)
VGG16 = {
    "conv1_1": (3, 64),
    "conv1_2": (64, 64),
    "conv2_1": (64, 128),
    "conv2_2": (128, 128),
    "conv3_1": (128, 256),
    "conv3_2": (256, 256),
    "conv3_3": (256, 256),
    "conv4_1": (256, 512),
    "conv4_2": (512, 512),
    "conv4_3": (512, 512),
    "conv5_1": (512, 512),
    "conv5_2": (512, 512),
    "conv5_3": (512, 512),
}
Array = NDArray[np.float32]


def images() -> tuple[Array, Array]:
    """Return two ground [2, 112, 616, 3] and two aerial [2, 256, 256, 3] images, BGR, the mean subtracted."""
    rng = np.random.RandomState(0)
    aerial = (rng.uniform(0, 255, (2, 256, 256, 3)) - BGR_MEAN).astype(np.float32)
    ground = (rng.uniform(0, 255, (2, 112, 616, 3)) - BGR_MEAN).astype(np.float32)
    return ground, aerial


def variable_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each variable of the official graph for the head `cvft`, `conv` or `global_pool`."""
    kernels = {
        f"{trunk}/{name}": (3, 3, *channels) for trunk in ("VGG_grd", "VGG_sat") for name, channels in VGG16.items()
    }
    if kind != "global_pool":
        kernels |= {"grd_conv": (3, 3, 512, 64), "sat_conv": (3, 3, 512, 64)}
    if kind == "cvft":
        kernels |= {"ot_grd_branchot_conv": (1, 1, 64, 1), "ot_grd_branchot_fc": (64, 4096)}
    weights = {f"{name}/weights": shape for name, shape in kernels.items()}
    return weights | {f"{name}/biases": (shape[-1],) for name, shape in kernels.items()}


def variable(name: str, shape: tuple[int, ...]) -> Array:
    """Return one variable of the official graph."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    z = np.random.RandomState(seed).standard_normal(shape)
    if name == "ot_grd_branchot_conv/weights":
        z = np.abs(z) * 0.002
    elif name == "ot_grd_branchot_fc/weights":
        z *= 0.005
    elif name == "ot_grd_branchot_fc/biases":
        z = 0.05 * z + np.eye(64).reshape(-1)
    elif name.endswith("/weights"):
        z *= np.sqrt(2 / (shape[0] * shape[1] * shape[2]))
    else:
        z *= 0.05
    return z.astype(np.float32)


def variables(kind: str) -> dict[str, Array]:
    """Return every variable of the official graph for the head `cvft`, `conv` or `global_pool`."""
    return {name: variable(name, shape) for name, shape in variable_shapes(kind).items()}
