import numpy as np
import torch

from cvft.config import PreprocessConfig
from cvft.preprocess import Preprocess


def pixels():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3), dtype=np.uint8))


def test_the_papers_input_is_bgr_minus_its_mean():
    rgb = pixels()
    expected = rgb.numpy()[..., ::-1].astype(np.float64) - (103.939, 116.779, 123.6)
    actual = Preprocess(PreprocessConfig())(rgb)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.permute(0, 2, 3, 1), expected, atol=1e-5)


def test_mean_and_deviation_apply_in_the_configured_order():
    rgb = pixels()
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    config = PreprocessConfig(channel_order="rgb", mean=mean, std=std)
    expected = (rgb.numpy().astype(np.float64) - mean) / std
    np.testing.assert_allclose(Preprocess(config)(rgb).permute(0, 2, 3, 1), expected, atol=1e-5)


def test_the_result_keeps_the_channels_last_in_memory():
    result = Preprocess(PreprocessConfig())(pixels())
    assert result.shape == (2, 3, 6, 9)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_the_callers_pixels_are_left_alone():
    rgb = pixels()
    before = rgb.clone()
    Preprocess(PreprocessConfig())(rgb)
    assert torch.equal(rgb, before)


def test_a_first_call_under_inference_mode_does_not_spoil_later_training():
    config = PreprocessConfig(mean=(1.0, 2.0, 3.0))
    with torch.inference_mode():
        Preprocess(config)(pixels())
    weight = torch.ones(1, requires_grad=True)
    (Preprocess(config)(pixels()) * weight).sum().backward()
    assert weight.grad is not None
