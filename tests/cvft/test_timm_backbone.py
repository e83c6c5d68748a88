"""Trunks of timm itself. Where it cannot be imported these tests are skipped; `make test-timm` runs them."""

import dataclasses
import importlib.util

import pytest
import safetensors.torch
import torch

from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.errors import CheckpointError, ConfigError
from cvft.model import build_model
from cvft.timm_backbone import TimmTrunk

pytestmark = [
    pytest.mark.timm,
    pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed; see make test-timm"),
    # Its networks in torch's own words; none of them is ours to mend.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

NAMES = ["convnext_atto", "resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
INPUT = PreprocessConfig(ground_size_px=(64, 160), aerial_size_px=(128, 128))


def config(name="convnext_atto", **changes):
    return BackboneConfig(**({"kind": "timm", "name": name, "num_frozen_blocks": 0, "dropout": 0.0} | changes))


def trunk(name="convnext_atto", **changes):
    torch.manual_seed(0)
    return TimmTrunk(config(name, **changes))


def images(num=2, size=(64, 160)):
    return torch.randn(num, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_the_map_has_the_announced_size_and_every_trained_parameter_a_gradient(name):
    network = trunk(name)
    features = network(images())
    assert tuple(features.shape[1:]) == (network.out_channels, *network.map_size((64, 160)))
    features.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


@torch.no_grad()
def test_the_map_is_timms_own():
    import timm  # noqa: PLC0415  # absent where these tests are skipped

    network = trunk().eval()
    reference = timm.create_model("convnext_atto", num_classes=0).eval()
    reference.load_state_dict(network.model.state_dict())
    torch.testing.assert_close(network(images()), reference.forward_features(images()))


def test_frozen_stages_with_all_before_them_are_not_trained():
    network = trunk(num_frozen_blocks=2)
    frozen = {name.split(".")[1:3][0] + "." + name.split(".")[2] for name, value in network.named_parameters()
              if not value.requires_grad and not name.startswith("model.head")}  # fmt: skip
    assert frozen == {"stem.0", "stem.1", "stages.0", "stages.1"}
    with pytest.raises(ConfigError, match=r"num_frozen_blocks: 5 must lie in \[0, 4\], the stages of convnext_atto"):
        trunk(num_frozen_blocks=5)


def test_batch_normalisation_does_not_see_the_batch():
    network = trunk("resnet18").train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    together = network(images())
    alone = torch.cat([network(image[None]) for image in images()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


def test_dropout_of_the_map_is_a_function_of_the_noise():
    network = trunk(dropout=0.5).train()
    first, again, other = (
        network(images(), torch.tensor(noise, dtype=torch.int32)) for noise in ([1, 2], [1, 2], [3, 4])
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.4 < (first == 0).float().mean() < 0.6
    network.eval()
    assert (network(images()) != 0).all()


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_recomputed_activations_give_the_same_gradients_to_the_bit(name):
    gradients = []
    for is_recomputed in (False, True):
        network = trunk(name)
        if is_recomputed:
            network.recompute_activations()
        network(images()).square().sum().backward()
        gradients.append([value.grad for value in network.parameters() if value.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_network_that_cannot_recompute_is_refused():
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing: .* not for vgg11; set it to false"):
        trunk("vgg11").recompute_activations()


@pytest.mark.parametrize("kind", ["cvft", "conv", "global_pool"])
def test_every_head_stands_on_the_trunks_map(kind):
    head = HeadConfig(kind=kind, channels=6, stride=1, grid=(4, 4), transport=TransportConfig(init="zero"))
    torch.manual_seed(0)
    network = build_model(ModelConfig(backbone=config(), head=head), INPUT)
    ground, aerial = network(images(), images(size=(128, 128)))
    assert ground.shape == aerial.shape == (2, network.descriptor_dim)
    (ground * aerial.roll(1, 0)).sum().backward()
    assert all(value.grad is not None for value in network.parameters() if value.requires_grad)


def test_both_trunks_start_from_timms_weights_of_the_whole_network(tmp_path):
    import timm  # noqa: PLC0415  # absent where these tests are skipped

    torch.manual_seed(5)
    whole = timm.create_model("resnet18").state_dict()
    assert "fc.weight" in whole
    safetensors.torch.save_file(whole, tmp_path / "resnet18.safetensors")
    backbone = config("resnet18", weights=str(tmp_path / "resnet18.safetensors"))
    model_config = ModelConfig(backbone=backbone, head=HeadConfig(kind="global_pool"))
    for side in build_model(model_config, INPUT).trunks:
        assert torch.equal(side.model.layer4[1].conv2.weight, whole["layer4.1.conv2.weight"])
    del whole["layer4.1.conv2.weight"]
    safetensors.torch.save_file(whole, tmp_path / "resnet18.safetensors")
    with pytest.raises(CheckpointError, match=r"layer4\.1\.conv2\.weight is missing"):
        build_model(model_config, INPUT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_ato", r"model\.backbone\.name: timm .* knows no 'convnext_ato'; did you mean .*convnext_atto"),
        ("convnext_atto.nowhere", r"model\.backbone\.name: convnext_atto\.nowhere: "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_ones(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        trunk(name)
    assert "\n" not in str(caught.value)


def test_a_size_that_the_network_cannot_take_is_refused_before_anything_is_computed():
    backbone = config("vit_tiny_patch16_224")
    wrong = dataclasses.replace(INPUT, ground_size_px=(64, 150))
    with pytest.raises(
        ConfigError, match=r"vit_tiny_patch16_224 cannot take images of \[64, 150\] px: .*change the si"
    ):
        build_model(ModelConfig(backbone=backbone, head=HeadConfig(stride=1)), wrong)
