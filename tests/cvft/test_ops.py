import numpy as np
import pytest
import torch
from torch.nn import functional

from cvft.ops import LegacyBilinearResize, SameConv2d, max_pool, pooled_size


def same_convolution_by_loops(image, kernel, stride):
    """TensorFlow's definition, straight: ceil(size / stride) outputs, half of the padding before, the rest after."""
    size, width = image.shape[0], kernel.shape[0]
    num_out = -(-size // stride)
    total = max((num_out - 1) * stride + width - size, 0)
    padded = np.pad(image, (total // 2, total - total // 2))
    return np.array(
        [
            [
                (padded[i * stride : i * stride + width, j * stride : j * stride + width] * kernel).sum()
                for j in range(num_out)
            ]
            for i in range(num_out)
        ]
    )


@pytest.mark.parametrize("size", [7, 8, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_same_convolution_equals_the_loops_of_its_definition(size, stride, kernel_size):
    torch.manual_seed(0)
    convolution = SameConv2d(1, 1, kernel_size=kernel_size, stride=stride)
    image = torch.randn(1, 1, size, size)
    expected = same_convolution_by_loops(
        image[0, 0].double().numpy(), convolution.weight[0, 0].double().detach().numpy(), stride
    )
    actual = convolution(image)[0, 0] - convolution.bias
    np.testing.assert_allclose(actual.detach().numpy(), expected, atol=1e-5)


def test_stride_two_on_an_even_size_pads_after_the_map_only():
    convolution = SameConv2d(1, 1, stride=2)
    torch.nn.init.zeros_(convolution.bias)
    torch.nn.init.zeros_(convolution.weight)
    with torch.no_grad():
        convolution.weight[0, 0, 0, 0] = 1.0  # the first output sees its window's first pixel
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert convolution(image)[0, 0].tolist() == [[0.0, 2.0], [8.0, 10.0]]


def legacy_resize_by_loops(image, target):
    """resize_bilinear(align_corners=False) of TensorFlow 1, pixel by pixel."""
    height, width = image.shape
    result = np.zeros(target)
    for row in range(target[0]):
        for column in range(target[1]):
            y, x = row * height / target[0], column * width / target[1]
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            result[row, column] = upper + (lower - upper) * (y - top)
    return result


@pytest.mark.parametrize(("source", "target"), [((4, 20), (8, 8)), ((5, 7), (3, 11)), ((1, 6), (4, 4))])
def test_legacy_resize_equals_the_loops_of_its_definition(source, target):
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, *source)).astype(np.float32))
    resized = LegacyBilinearResize(source, target)(image)
    assert resized.shape == (2, 3, *target)
    np.testing.assert_allclose(resized[1, 2], legacy_resize_by_loops(image[1, 2].double().numpy(), target), atol=1e-6)


def test_legacy_resize_has_no_half_pixel_centres():
    image = torch.arange(20.0).reshape(1, 1, 1, 20)
    resized = LegacyBilinearResize((1, 20), (1, 8))(image)[0, 0, 0]
    modern = functional.interpolate(image, size=(1, 8), mode="bilinear", align_corners=False)[0, 0, 0]
    assert resized.tolist() == [0.0, 2.5, 5.0, 7.5, 10.0, 12.5, 15.0, 17.5]
    assert (modern - resized).tolist() == [0.75] * 8


def test_resize_to_the_same_size_changes_nothing():
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(LegacyBilinearResize((8, 8), (8, 8))(image), image)


def test_resize_tables_are_no_part_of_a_checkpoint():
    assert not LegacyBilinearResize((4, 20), (8, 8)).state_dict()


@pytest.mark.parametrize(
    ("size", "pooling", "expected"),
    [((112, 616), "ceil", (7, 39)), ((112, 616), "floor", (7, 38)), ((256, 256), "ceil", (16, 16))],
)
def test_pooled_size_is_what_four_pools_leave(size, pooling, expected):
    image = torch.zeros(1, 1, *size)
    for _ in range(4):
        image = max_pool(image, pooling)
    assert tuple(image.shape[2:]) == expected == pooled_size(size, 4, pooling)
