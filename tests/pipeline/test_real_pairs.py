"""Real CVUSA pairs and a real table of street photos go the whole way, where they lie beside the checkout."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cvft.config import PreprocessConfig
from pipeline.dataset import PairDataset
from pipeline.loader import Loader
from pipeline.validate import validate

REAL = Path(__file__).parents[2].parent / "shared/real"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real pairs are not beside the checkout")


@pytest.mark.parametrize(
    ("name", "layout", "pairs", "problems"),
    [("cvusa_sample", "cvusa", {"train": 4, "val": 1}, {"no_location": 5}), ("helsinki", "table", {"val": 10}, {})],
)
def test_real_pairs_become_the_batches_that_opencv_gives(name, layout, pairs, problems, tmp_path, make_shards):
    report = validate(REAL / name)
    assert (report.layout, report.ok, report.pairs, report.problems) == (layout, True, pairs, problems)
    manifest = make_shards(REAL / name, str(tmp_path / "store"))
    for split, num_pairs in pairs.items():
        dataset = PairDataset(manifest, split)
        num_seen = 0
        for batch in Loader(dataset, preprocess=PreprocessConfig(), batch_size=1).eval_batches():
            num_seen += batch.num_valid
            for pixels, data in zip((batch.ground, batch.aerial), dataset.read(int(batch.index)), strict=True):
                picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
                size = pixels.shape[2], pixels.shape[1]
                expected = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)[..., ::-1]
                np.testing.assert_array_equal(pixels[0].numpy(), expected)
        assert num_seen == num_pairs
