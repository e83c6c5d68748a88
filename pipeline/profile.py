"""What stands in a dataset's shards: the original files, or JPEGs already at the network's input sizes.

`original` passes bytes through. `preresized` decodes once, exactly as the profile `exact` does when training, and keeps
the result as JPEG of quality 95 without chroma subsampling: half the bytes, and 2.5 times fewer cycles to decode, for
1.8 grey levels of mean difference. A manifest names its profile, and training refuses to mistake one for the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cvft.configuration import require

ProfileName = Literal["original", "preresized"]
JPEG_QUALITY = 95
MAX_SIDE_PX = 10_000  # libjpeg writes no more than 65,500, and `pipeline.images` reads no more than 200 million pixels


@dataclass(frozen=True, kw_only=True)
class ShardProfile:
    """What the images of all shards of a dataset are.

    Attributes:
        name: `original` or `preresized`.
        ground_size_px: Height and width of every ground image, where they are fixed.
        aerial_size_px: Likewise of the aerial images.
        jpeg_quality: Of the encoder, where there is one.
    """

    name: ProfileName = "original"
    ground_size_px: tuple[int, int] | None = None
    aerial_size_px: tuple[int, int] | None = None
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        require(self.name in ("original", "preresized"), f"profile: {self.name!r} must be original or preresized")
        sizes = (self.ground_size_px, self.aerial_size_px)
        if self.name == "original":
            require(
                (*sizes, self.jpeg_quality) == (None, None, None), "profile: original takes no sizes and no quality"
            )
        else:
            for size in sizes:
                is_size = size is not None and len(size) == 2 and min(size) >= 1 and max(size) <= MAX_SIDE_PX
                require(is_size, f"profile: {size} must be a height and a width from 1 to {MAX_SIDE_PX}")
            require(self.jpeg_quality is not None, "profile: preresized needs a JPEG quality")

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON data; what does not apply is left out."""
        content = {
            "name": self.name,
            "ground_size_px": self.ground_size_px and list(self.ground_size_px),
            "aerial_size_px": self.aerial_size_px and list(self.aerial_size_px),
            "jpeg_quality": self.jpeg_quality,
        }
        return {key: value for key, value in content.items() if value is not None}

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> ShardProfile:
        """Return the profile that `plain` wrote."""
        sizes = {key: tuple(content[key]) for key in ("ground_size_px", "aerial_size_px") if key in content}
        return cls(**{**content, **sizes})

    def __str__(self) -> str:
        """Return it in words: `original`, or `preresized (ground 112x616, aerial 256x256, quality 95)`."""
        if self.ground_size_px is None or self.aerial_size_px is None:
            return self.name
        ground, aerial = ("x".join(map(str, size)) for size in (self.ground_size_px, self.aerial_size_px))
        return f"{self.name} (ground {ground}, aerial {aerial}, quality {self.jpeg_quality})"


ORIGINAL = ShardProfile()


def preresized(ground_size_px: tuple[int, int], aerial_size_px: tuple[int, int]) -> ShardProfile:
    """Return the derived profile at these input sizes, height and width each."""
    return ShardProfile(
        name="preresized", ground_size_px=ground_size_px, aerial_size_px=aerial_size_px, jpeg_quality=JPEG_QUALITY
    )
