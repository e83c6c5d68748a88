"""Recomputing activations and compiling: what they may change is memory and time."""

import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cvft.config import BackboneConfig, HeadConfig, ModelConfig, PreprocessConfig, TransportConfig
from cvft.errors import ConfigError
from cvft.model import build_model

INPUT = PreprocessConfig(ground_size_px=(32, 80), aerial_size_px=(64, 64))


def model(*, num_frozen_blocks=1):
    torch.manual_seed(0)
    backbone = BackboneConfig(
        blocks=(1, 1, 2), width=1 / 8, norm="group", num_frozen_blocks=num_frozen_blocks, dropout=0.3
    )
    head = HeadConfig(channels=6, grid=(8, 8), transport=TransportConfig(init="zero"))
    return build_model(ModelConfig(backbone=backbone, head=head), INPUT)


def images(num_pairs=4):
    generator = torch.Generator().manual_seed(1)
    sizes = (INPUT.ground_size_px, INPUT.aerial_size_px)
    return [torch.randn(num_pairs, 3, *size, generator=generator) for size in sizes]


def gradients(network, *, dtype=None):
    noise = torch.arange(4, dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        ground, aerial = network(*images(), noise=noise)
    (ground * aerial.roll(1, 0)).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("num_frozen_blocks", [0, 1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recomputed_activations_give_the_same_gradients_to_the_bit(num_frozen_blocks, dtype):
    expected = gradients(model(num_frozen_blocks=num_frozen_blocks), dtype=dtype)
    network = model(num_frozen_blocks=num_frozen_blocks)
    network.recompute_activations()
    found = gradients(network, dtype=dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Storages(TorchDispatchMode):
    """Remembers every storage that an operation makes, and tells how many bytes of them still live."""

    def __init__(self):
        super().__init__()
        self._made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return made

    def living_bytes(self):
        return sum(size for reference, size in self._made.values() if not reference.expired())


def kept_bytes(network):
    """Memory between the forward and the backward pass, over that of the images and the weights."""
    pixels = images()
    with Storages() as storages:
        descriptors = network(*pixels, noise=torch.arange(4, dtype=torch.int32))
    kept = storages.living_bytes()
    del descriptors
    return kept


def test_recomputing_keeps_less_than_half_of_the_activations():
    network = model(num_frozen_blocks=0)
    everything = kept_bytes(network)
    network.recompute_activations()
    assert 0 < kept_bytes(network) < everything / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler among its own parts
def test_compiled_trunks_give_the_results_of_plain_ones_under_the_same_names():
    noise, (_, aerial) = torch.arange(4, dtype=torch.int32), images()
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        backbone = BackboneConfig(blocks=(1,), width=1 / 8, num_frozen_blocks=0, dropout=0.3, is_shared=True)
        network = build_model(ModelConfig(backbone=backbone, head=HeadConfig(kind="global_pool")), INPUT)
        names = list(network.state_dict())
        if is_compiled:
            network.compile_trunks()
        features = network.ground_trunk(aerial, noise)
        features.square().mean().backward()
        assert list(network.state_dict()) == names
        found.append([features, *(parameter.grad for parameter in network.parameters())])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    assert (found[1][0] == 0).equal(found[0][0] == 0)  # dropout's words wrap around in compiled code too


def test_compiling_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"train\.compile: torch\.compile needs a C\+\+ compiler"):
        model().compile_trunks()


def test_a_trunk_of_timm_without_timm_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    config = ModelConfig(backbone=BackboneConfig(kind="timm", name="convnext_atto"))
    with pytest.raises(ConfigError, match=r"model\.backbone\.kind: timm needs .* pip install 'cvft\[timm\]'"):
        build_model(config, INPUT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "timm"}, "name: kind=timm needs"),
        ({"name": "resnet18"}, "name: resnet18 is of kind=timm"),
        ({"kind": "timm", "name": "resnet18", "width": 0.5}, r"width: 0\.5 is of kind=vgg"),
        ({"kind": "timm", "name": "resnet18", "num_frozen_blocks": -1}, "num_frozen_blocks: -1"),
    ],
)
def test_keys_of_the_other_kind_of_trunk_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        BackboneConfig(**changes)
