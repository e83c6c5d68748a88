import dataclasses

import pytest
import torch

from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.errors import ConfigError
from cvft.model import CrossViewModel, build_model

INPUT = PreprocessConfig(ground_size_px=(32, 80), aerial_size_px=(64, 64))
KINDS = ("cvft", "conv", "global_pool")


def config(kind="cvft", *, norm="none", is_shared=False, init="zero"):
    return ModelConfig(
        backbone=BackboneConfig(blocks=(1, 1, 1), width=1 / 8, num_frozen_blocks=1, norm=norm, is_shared=is_shared),
        head=HeadConfig(kind=kind, channels=6, grid=(8, 8), transport=TransportConfig(init=init)),
    )


def model(kind="cvft", **changes):
    torch.manual_seed(0)
    return build_model(config(kind, **changes), INPUT).eval()


def images(num_pairs=2):
    generator = torch.Generator().manual_seed(1)
    sizes = (INPUT.ground_size_px, INPUT.aerial_size_px)
    return [torch.randn(num_pairs, 3, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_shared", [False, True])
@torch.no_grad()
def test_descriptors_are_unit_vectors_of_the_announced_size(kind, is_shared):
    network = model(kind, is_shared=is_shared)
    for descriptor in network(*images()):
        assert descriptor.shape == (2, network.descriptor_dim)
        torch.testing.assert_close(descriptor.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["none", "group"])
@torch.no_grad()
def test_a_batch_of_two_equals_two_batches_of_one(kind, norm):
    network = model(kind, norm=norm)
    ground, aerial = images()
    for side, together in enumerate(network(ground, aerial)):
        alone = [network(ground[i : i + 1], aerial[i : i + 1])[side] for i in range(2)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@torch.no_grad()
def test_each_side_is_embedded_without_the_other():
    network = model()
    ground, aerial = images()
    ground_descriptor, aerial_descriptor = network(ground, aerial)
    assert torch.equal(network.embed_ground(ground), ground_descriptor)
    assert torch.equal(network.embed_aerial(aerial), aerial_descriptor)
    assert torch.equal(network(torch.randn_like(ground), aerial)[1], aerial_descriptor)


@torch.no_grad()
def test_evaluation_is_deterministic_and_training_drops_values():
    network = model()
    ground, aerial = images()
    assert all(torch.equal(one, two) for one, two in zip(network(ground, aerial), network(ground, aerial), strict=True))
    network.train()
    assert not torch.equal(network.embed_aerial(aerial), network.embed_aerial(aerial))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_channels_last_equals_channels_first(kind):
    network = model(kind)
    ground, aerial = images()
    expected = network(ground, aerial)
    network = network.to(memory_format=torch.channels_last)
    actual = network(*(image.contiguous(memory_format=torch.channels_last) for image in (ground, aerial)))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bfloat16_autocast_stays_close_and_returns_float32(kind):
    network = model(kind)
    expected = network(*images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = network(*images())
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one * other).sum(1).min() > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one_does(kind):
    network = model(kind).train()
    ground, aerial = network(*images())
    (ground * aerial).sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_shared_trunk_is_one_trunk():
    network = model(is_shared=True)
    assert not any(name.startswith("aerial_trunk") for name in network.state_dict())
    aerial = network.embed_aerial(images()[1])
    (trunk_gradient,) = torch.autograd.grad(
        aerial.sum(), [network.ground_trunk.features["3"].weight], retain_graph=True
    )
    assert trunk_gradient.abs().max() > 0


@torch.no_grad()
def test_only_the_ground_branch_is_transported():
    network, plain = model("cvft"), model("conv")
    plain.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name in plain.state_dict()})
    ground, aerial = images()
    assert torch.equal(network.embed_aerial(aerial), plain.embed_aerial(aerial))
    assert not torch.equal(network.embed_ground(ground), plain.embed_ground(ground))


@torch.no_grad()
def test_a_plan_that_stays_in_place_gives_the_descriptor_without_transport():
    network, plain = model("cvft"), model("conv")
    plain.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name in plain.state_dict()})
    torch.nn.init.zeros_(network.transport.score.weight)
    network.transport.cost.bias.copy_((1 - torch.eye(64)).flatten())
    ground, _ = images()
    torch.testing.assert_close(network.embed_ground(ground), plain.embed_ground(ground))


@torch.no_grad()
def test_the_descriptor_is_flattened_with_the_channels_fastest():
    network = model("conv")
    _, aerial = images()
    features = torch.relu(network.aerial_projection(network.aerial_trunk(aerial)))[0]
    by_hand = torch.stack([features[c, h, w] for h in range(8) for w in range(8) for c in range(6)])
    torch.testing.assert_close(network.embed_aerial(aerial)[0], by_hand / by_hand.norm())


def test_every_part_of_a_network_with_all_transport_variants_learns():
    transport = TransportConfig(
        init="soft", epsilon=0.1, is_rectangular=True, num_groups=2, polar_weight=4.0, dustbin_share=0.2
    )
    head = HeadConfig(channels=6, stride=1, grid=(16, 16), transport=transport)
    torch.manual_seed(0)
    network = build_model(dataclasses.replace(config(), head=head), INPUT)
    ground, aerial = network(*images())
    assert ground.shape == aerial.shape == (2, 6 * 16 * 16)
    (ground * aerial).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters() if parameter.requires_grad)
    assert network.ground_plan(images()[0]).shape == (2, 8 * 20, 16 * 16)


@torch.no_grad()
def test_the_transport_of_a_panorama_can_be_looked_at():
    result = model().ground_transport(images()[0])
    assert result.plan.shape == (2, 64, 64)
    torch.testing.assert_close(result.plan.sum(1), torch.ones(2, 64))


@pytest.mark.parametrize("kind", ["conv", "global_pool"])
def test_a_head_without_transport_has_none_to_look_at(kind):
    with pytest.raises(ConfigError, match=rf"model\.head\.kind: {kind} moves no features"):
        model(kind).ground_transport(images()[0])


def test_a_grid_that_the_aerial_image_does_not_give_is_refused_by_its_name():
    wrong = dataclasses.replace(INPUT, aerial_size_px=(128, 64))
    with pytest.raises(ConfigError, match=r"model\.head\.grid: \[8, 8\] is not the map \[16, 8\]"):
        build_model(config(), wrong)


def test_equal_seeds_build_equal_networks():
    one, other = model().state_dict(), model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_defaults_are_the_paper():
    network = CrossViewModel(ModelConfig(), PreprocessConfig())
    assert network.descriptor_dim == 4096
    assert sum(parameter.numel() for parameter in network.ground_trunk.parameters()) == 14_714_688  # VGG16's features
    assert network.transport.cost.weight.shape == (4096, 64)
    frozen = {name for name, parameter in network.ground_trunk.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"features.{i}.{kind}" for i in (0, 2, 5, 7, 10, 12, 14) for kind in ("weight", "bias")}
