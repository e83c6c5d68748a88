"""A profile says what the shards' images are, and nothing impossible."""

from __future__ import annotations

import pytest

from cvft.errors import ConfigError
from pipeline.profile import ORIGINAL, ShardProfile, preresized


@pytest.mark.parametrize("profile", [ORIGINAL, preresized((112, 616), (256, 256))])
def test_plain_data_leads_back_to_the_profile(profile):
    assert ShardProfile.from_plain(profile.plain()) == profile


def test_words_name_the_sizes():
    assert str(ORIGINAL) == "original"
    assert str(preresized((112, 616), (256, 255))) == "preresized (ground 112x616, aerial 256x255, quality 95)"


@pytest.mark.parametrize(
    "content",
    [
        {"name": "small"},
        {"name": "original", "jpeg_quality": 95},
        {"name": "preresized"},
        {"name": "preresized", "ground_size_px": [0, 616], "aerial_size_px": [256, 256], "jpeg_quality": 95},
        {"name": "preresized", "ground_size_px": [112, 70_000], "aerial_size_px": [256, 256], "jpeg_quality": 95},
        {"name": "preresized", "ground_size_px": [112, 616], "aerial_size_px": [256, 256]},
    ],
)
def test_impossible_profile_is_refused(content):
    with pytest.raises(ConfigError, match=r"^profile: "):
        ShardProfile.from_plain(content)
