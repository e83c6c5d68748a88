import numpy as np
import pytest
import torch

from cvft.noise import derive, drawn_noise, dropout, pair_noise

NUM_WORDS = 1 << 32


def _lowbias32(word: int) -> int:
    """Wellons's hash, in Python's integers."""
    word = (word ^ (word >> 16)) * 0x7FEB352D % NUM_WORDS
    word = (word ^ (word >> 15)) * 0x846CA68B % NUM_WORDS
    return word ^ (word >> 16)


def test_noise_and_masks_are_those_of_plain_integer_arithmetic():
    index, seed, step, probability = [0, 7, 44_415, 2**31, 2**32 - 1], 3, 11, 0.3
    first, second = (int(word) for word in np.random.SeedSequence([seed, step]).generate_state(2))
    words = [_lowbias32(_lowbias32(row ^ first) ^ second) for row in index]
    noise = pair_noise(torch.tensor(index), seed=seed, step=step)
    assert [word % NUM_WORDS for word in noise.tolist()] == words
    words = [_lowbias32(word ^ (19 * 0x9E3779B9 + 1) % NUM_WORDS) for word in words]
    noise = derive(noise, 19)
    assert [word % NUM_WORDS for word in noise.tolist()] == words

    channels, rows, columns = 3, 2, 4
    found = dropout(torch.ones(len(index), channels, rows, columns), probability, noise)
    threshold = round(probability * NUM_WORDS)
    for b, word in enumerate(words):
        for c in range(channels):
            for position in range(rows * columns):
                place = position * channels + c
                value = ((_lowbias32(2 * place) | 1) * word + _lowbias32(2 * place + 1)) % NUM_WORDS
                # The threshold counts from the lowest signed word.
                is_kept = (value + NUM_WORDS // 2) % NUM_WORDS >= threshold
                assert found[b, c].flatten()[position].item() == pytest.approx(is_kept / (1 - probability))


def test_pairs_steps_seeds_and_places_have_each_their_own_noise():
    index = torch.arange(50_000)
    noise = pair_noise(index, seed=0, step=0)
    assert len(noise.unique()) == len(derive(noise, 5).unique()) == len(index)
    others = [pair_noise(index, seed=1, step=0), pair_noise(index, seed=0, step=1), derive(noise, 0), derive(noise, 1)]
    assert all((noise == other).float().mean() < 1e-3 for other in others)


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(probability):
    found = dropout(torch.ones(16, 32, 16, 16), probability, pair_noise(torch.arange(16), seed=0, step=0))
    assert (found == 0).float().mean().item() == pytest.approx(probability, abs=3e-3)
    assert found.mean().item() == pytest.approx(1, abs=1e-2)
    per_pair, per_position = (found == 0).float().flatten(1).mean(1), (found == 0).float().mean(0)
    assert (per_pair - probability).abs().max() < 0.03
    assert per_position.std().item() == pytest.approx((probability * (1 - probability) / 16) ** 0.5, rel=0.05, abs=1e-9)


def test_masks_of_pairs_of_positions_and_of_steps_do_not_go_together():
    masks = [dropout(torch.ones(256, 64, 4, 4), 0.5, pair_noise(torch.arange(256), seed=0, step=s)) for s in (0, 1)]
    signs = torch.stack(masks).flatten(2) - 1  # 1 or -1, mean 0
    of_pairs = signs[0] @ signs[0].T / signs.shape[2]
    of_positions = signs[0].T @ signs[0] / signs.shape[1]
    of_steps = (signs[0] * signs[1]).mean(1)
    for found, count in ((of_pairs, 1024), (of_positions, 256)):
        off_diagonal = found - torch.diag(found.diagonal())
        assert off_diagonal.std().item() == pytest.approx(count**-0.5, rel=0.1)  # that of independent ones
        assert off_diagonal.abs().max() < 6.5 * count**-0.5
    assert of_steps.abs().max() < 6.5 / 32


def test_a_mask_depends_on_its_pair_alone_not_on_the_batch_or_the_layout_in_memory():
    features = torch.rand(6, 8, 5, 3) + 0.5
    noise = pair_noise(torch.tensor([4, 9, 2, 30, 7, 1]), seed=0, step=0)
    whole = dropout(features, 0.4, noise)
    rows = torch.tensor([5, 0, 3])
    assert torch.equal(dropout(features[rows], 0.4, noise[rows]), whole[rows])
    last = dropout(features.to(memory_format=torch.channels_last), 0.4, noise)
    assert torch.equal(last, whole)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert dropout(features.bfloat16(), 0.4, noise).dtype == torch.bfloat16


def test_the_gradient_is_the_mask():
    features = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    noise = drawn_noise(2, features.device)
    (gradient,) = torch.autograd.grad(dropout(features, 0.25, noise).sum(), features)
    assert torch.equal(gradient, dropout(torch.ones_like(features), 0.25, noise))


def test_drawn_noise_follows_torchs_generator():
    noise = [torch.manual_seed(seed) and drawn_noise(1000, torch.device("cpu")) for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    assert (noise[0] != noise[2]).all()
    assert noise[0].min() < -(2**30)
    assert noise[0].max() > 2**30
