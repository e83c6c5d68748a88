import functools
import hashlib
import http.server
import threading

import pytest
import safetensors.torch
import torch
from torch import nn

from cvft.backbone import Trunk
from cvft.config import BackboneConfig, ModelConfig, PreprocessConfig
from cvft.errors import CheckpointError
from cvft.model import build_model

SMALL = BackboneConfig(width=1 / 16, num_frozen_blocks=2)
SMALL_INPUT = PreprocessConfig(ground_size_px=(32, 64), aerial_size_px=(256, 256))
# The positions that torchvision's vgg16().features gives its convolutions.
VGG16_POSITIONS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


def sequential_vgg16(trunk):
    """The same weights in torchvision's own form: one Sequential of convolutions, ReLUs and pools."""
    layers = []
    for block in (2, 2, 3, 3, 3):
        for _ in range(block):
            layers += [trunk.features[str(len(layers))], nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def test_full_width_has_torchvisions_names_and_shapes():
    state = Trunk(BackboneConfig()).state_dict()
    assert list(state) == [f"features.{position}.{kind}" for position in VGG16_POSITIONS for kind in ("weight", "bias")]
    assert state["features.0.weight"].shape == (64, 3, 3, 3)
    assert state["features.28.weight"].shape == (512, 512, 3, 3)


def test_floor_pooling_equals_torchvisions_sequential():
    torch.manual_seed(0)
    trunk = Trunk(BackboneConfig(width=1 / 16, pooling="floor")).eval()
    image = torch.randn(2, 3, 40, 52)
    with torch.no_grad():
        torch.testing.assert_close(trunk(image), sequential_vgg16(trunk)(image))


@pytest.mark.parametrize("blocks", [(1,), (1, 1, 1), (2, 2, 3, 3, 3)])
@pytest.mark.parametrize("pooling", ["ceil", "floor"])
def test_the_map_has_the_announced_size(blocks, pooling):
    trunk = Trunk(BackboneConfig(blocks=blocks, width=1 / 32, pooling=pooling, num_frozen_blocks=0)).eval()
    features = trunk(torch.randn(1, 3, 56, 77))
    assert tuple(features.shape[1:]) == (trunk.out_channels, *trunk.map_size((56, 77)))


def test_gradients_do_not_reach_frozen_blocks():
    trunk = Trunk(SMALL)
    trunk(torch.randn(1, 3, 32, 32)).sum().backward()
    frozen = {f"features.{position}.{kind}" for position in (0, 2, 5, 7) for kind in ("weight", "bias")}
    assert {name for name, parameter in trunk.named_parameters() if not parameter.requires_grad} == frozen
    assert {name for name, parameter in trunk.named_parameters() if parameter.grad is None} == frozen


def test_frozen_blocks_keep_nothing_for_autograd():
    saved = []
    trunk = Trunk(SMALL)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape[-1]) or tensor, lambda x: x):
        trunk(torch.randn(1, 3, 64, 64))
    assert max(saved) == 32 / 2  # the third block sees a quarter of the image; its input is saved, nothing larger


def test_group_norm_is_frozen_with_its_convolution():
    trunk = Trunk(BackboneConfig(width=1 / 16, norm="group", num_frozen_blocks=1))
    assert not any(parameter.requires_grad for parameter in trunk.norms["2"].parameters())
    assert all(parameter.requires_grad for parameter in trunk.norms["5"].parameters())


def test_dropout_acts_in_the_last_two_blocks_while_training_only():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    trunk = Trunk(SMALL).train()
    assert torch.equal(trunk._run(image, range(3), None), trunk._run(image, range(3), None))
    early = trunk._run(image, range(3), None)
    for block in (3, 4):
        first, again, other = (
            trunk._run(early, range(3, block + 1), torch.tensor([word], dtype=torch.int32)) for word in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert not torch.equal(trunk(image), trunk(image))  # drawn from torch's generator
    trunk.eval()
    assert torch.equal(trunk(image), trunk(image))


def vgg16_file(path, **changes):
    torch.manual_seed(1)
    state = {name: torch.randn_like(tensor) for name, tensor in Trunk(SMALL).state_dict().items()}
    state |= {"classifier.0.weight": torch.zeros(4, 4), "classifier.0.bias": torch.zeros(4)} | changes
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return state


def model_from(weights):
    return build_model(
        ModelConfig(backbone=BackboneConfig(width=1 / 16, num_frozen_blocks=2, weights=str(weights))), SMALL_INPUT
    )


@pytest.mark.parametrize("name", ["vgg16.pth", "vgg16.safetensors"])
def test_both_trunks_start_from_the_weights_of_a_file(tmp_path, name):
    state = vgg16_file(tmp_path / name)
    model = model_from(tmp_path / name)
    for trunk in (model.ground_trunk, model.aerial_trunk):
        assert torch.equal(trunk.features["28"].weight, state["features.28.weight"])
        assert torch.equal(trunk.features["0"].bias, state["features.0.bias"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features.28.bias": None}, r"features\.28\.bias is missing"),
        ({"features.30.weight": torch.zeros(2)}, r"features\.30\.weight is unknown"),
        (
            {"features.0.weight": torch.zeros(4, 3, 5, 5)},
            r"features\.0\.weight has shape \[4, 3, 5, 5\] where \[4, 3, 3, 3\]",
        ),
    ],
)
def test_an_unmatched_tensor_is_an_error_that_names_it(tmp_path, changes, message):
    vgg16_file(tmp_path / "vgg16.pth", **changes)
    with pytest.raises(CheckpointError, match=message):
        model_from(tmp_path / "vgg16.pth")


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02cos\nsystem\n(S'true'\ntR."])
def test_a_file_that_holds_no_weights_is_one_clear_line(tmp_path, content):
    (tmp_path / "vgg16.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vgg16\.pth: cannot read these weights: .") as caught:
        model_from(tmp_path / "vgg16.pth")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: cannot read these weights"):
        model_from(tmp_path / "nowhere.safetensors")


def test_a_file_that_holds_more_than_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "run.pth")
    with pytest.raises(CheckpointError, match="no plain mapping of names to tensors"):
        model_from(tmp_path / "run.pth")


@pytest.fixture
def web(tmp_path):
    """A web server over a folder."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_weights_come_from_a_url_and_are_held_against_the_hash_in_their_name(tmp_path, web, monkeypatch):
    folder, url = web
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    state = vgg16_file(folder / "vgg16.pth")
    digest = hashlib.sha256((folder / "vgg16.pth").read_bytes()).hexdigest()[:8]
    (folder / "vgg16.pth").rename(folder / f"vgg16-{digest}.pth")
    model = model_from(f"{url}/vgg16-{digest}.pth")
    assert torch.equal(model.ground_trunk.features["0"].bias, state["features.0.bias"])
    (folder / f"vgg16-{digest}.pth").rename(folder / "vgg16-00000000.pth")
    with pytest.raises(CheckpointError, match=r"vgg16-00000000\.pth: cannot read these weights: invalid hash value"):
        model_from(f"{url}/vgg16-00000000.pth")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: cannot read these weights: .*404"):
        model_from(f"{url}/nowhere.pth")
