import dataclasses
import hashlib
import json

import pytest
import torch

from cvft.checkpoint import (
    INFO_FILE,
    MODEL_FILE,
    TRAINING_FILE,
    CheckpointInfo,
    load_model,
    read_info,
    restore_training,
)
from cvft.config import (
    BackboneConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PreprocessConfig,
    TransportConfig,
)
from cvft.errors import CheckpointError
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.optim import build_optimizer
from cvft.snapshot import save_checkpoint

PREPROCESS = PreprocessConfig(ground_size_px=(16, 48), aerial_size_px=(32, 32))
CONFIG = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1), width=1 / 16, num_frozen_blocks=0),
    head=HeadConfig(channels=4, grid=(8, 8), transport=TransportConfig(init="zero")),
)
INFO = CheckpointInfo(
    model=CONFIG,
    preprocess=PREPROCESS,
    step=7,
    epoch=2,
    manifest_digest="abc",
    metrics={"recall_at_1": 0.1 + 0.2},
    training={"sampler": {"epoch": 2, "offset": 96}, "best": [0.3, None]},
)


def network(seed=0):
    torch.manual_seed(seed)
    return build_model(CONFIG, PREPROCESS)


def pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 16, 48, generator=generator), torch.randn(3, 3, 32, 32, generator=generator)


def optimizer_of(model):
    """Two groups, as a weight decay on kernels alone makes them."""
    kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )


def train(model, optimizer, steps):
    model.train()
    for step in steps:
        torch.manual_seed(step)
        ground, aerial = model(*pairs(step))
        loss = (ground @ aerial.T).logsumexp(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def saved(tmp_path):
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    save_checkpoint(tmp_path / "last", model=model, info=INFO, optimizer=optimizer)
    return tmp_path / "last", model


def test_a_checkpoint_gives_back_the_network_and_all_it_said(saved):
    directory, model = saved
    loaded, info = load_model(directory)
    assert info == INFO == read_info(directory)
    assert loaded.config == CONFIG
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_goes_on_to_the_bit_as_if_it_had_never_stopped(tmp_path, memory_format):
    straight = network().to(memory_format=memory_format)
    optimizer = optimizer_of(straight)
    train(straight, optimizer, range(3))
    save_checkpoint(tmp_path / "last", model=straight, info=INFO, optimizer=optimizer)
    train(straight, optimizer, range(3, 6))

    resumed = network(seed=99).to(memory_format=memory_format)
    optimizer = optimizer_of(resumed)
    assert restore_training(tmp_path / "last", model=resumed, preprocess=INFO.preprocess, optimizer=optimizer) == INFO
    train(resumed, optimizer, range(3, 6))
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in straight.state_dict().items())


def test_a_checkpoint_before_the_first_step_can_be_resumed(tmp_path):
    model = network()
    save_checkpoint(tmp_path / "first", model=model, info=INFO, optimizer=optimizer_of(model))
    fresh = network(seed=1)
    restore_training(tmp_path / "first", model=fresh, preprocess=INFO.preprocess, optimizer=optimizer_of(fresh))


def test_no_pickle_is_written(saved):
    directory, _ = saved
    assert {path.name for path in directory.iterdir()} == {MODEL_FILE, TRAINING_FILE, INFO_FILE}
    for name in (MODEL_FILE, TRAINING_FILE):
        data = (directory / name).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert all(entry["dtype"] == "F32" for entry in header.values())


def test_a_newer_checkpoint_takes_the_place_of_an_older_one(saved):
    directory, model = saved
    save_checkpoint(directory, model=model, info=dataclasses.replace(INFO, step=8))
    assert read_info(directory).step == 8
    assert not (directory / TRAINING_FILE).exists()
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_failed_write_leaves_the_older_checkpoint_and_nothing_else(saved):
    directory, model = saved
    with pytest.raises(TypeError):
        save_checkpoint(directory, model=model, info=dataclasses.replace(INFO, training={"bad": object()}))
    assert load_model(directory)[1] == INFO
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"file/last: cannot write the checkpoint: Not a directory"):
        save_checkpoint(tmp_path / "file" / "last", model=network(), info=INFO)


def test_other_preprocessing_is_refused_with_each_difference_named(saved):
    directory, _ = saved
    other = dataclasses.replace(PREPROCESS, channel_order="rgb", mean=(123.675, 116.28, 103.53))
    with pytest.raises(CheckpointError) as caught:
        load_model(directory, preprocess=other)
    message = str(caught.value)
    assert "channel_order was bgr and is rgb here" in message
    assert "mean was [103.939, 116.779, 123.6] and is [123.675, 116.28, 103.53] here" in message
    assert "allow_other_preprocess=True" in message
    assert "std" not in message
    assert "\n" not in message


def test_other_preprocessing_is_taken_if_said(saved):
    directory, _ = saved
    other = dataclasses.replace(PREPROCESS, decode_profile="fast")
    _, info = load_model(directory, preprocess=other, allow_other_preprocess=True)
    assert info.preprocess == PREPROCESS


def test_the_same_preprocessing_needs_no_permission(saved):
    load_model(saved[0], preprocess=dataclasses.replace(PREPROCESS))


def edit_document(directory, **changes):
    document = json.loads((directory / INFO_FILE).read_text()) | changes
    del document["sha256"]
    spelled = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    (directory / INFO_FILE).write_text(json.dumps({**document, "sha256": hashlib.sha256(spelled).hexdigest()}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: truncate(d / MODEL_FILE), r"model\.safetensors is damaged: its SHA-256"),
        (lambda d: flip_a_bit(d / MODEL_FILE), r"model\.safetensors is damaged: its SHA-256"),
        (lambda d: (d / MODEL_FILE).unlink(), r"model\.safetensors: cannot read it .*incomplete"),
        (lambda d: (d / INFO_FILE).unlink(), r"checkpoint\.json: cannot read it .*give the directory of a checkpoint"),
        (lambda d: truncate(d / INFO_FILE), r"checkpoint\.json is damaged"),
        (lambda d: (d / INFO_FILE).write_text("[]"), r"not a checkpoint of this project"),
        (lambda d: edit_document(d, format="other"), r"not a checkpoint of this project"),
        (lambda d: edit_document(d, format_version=3), r"format_version 3, this release reads 1 and 2"),
        (lambda d: edit_document(d, files={}), r"`files` names no model\.safetensors"),
        (lambda d: edit_document(d, stepp=3), r"checkpoint\.json cannot be used: stepp: unknown key"),
        (lambda d: edit_document(d, step="x"), r"checkpoint\.json cannot be used: step: expected int"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_one_clear_line(saved, damage, message):
    directory, _ = saved
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)


def test_tensors_of_another_network_are_named(saved):
    directory, _ = saved
    document = json.loads((directory / INFO_FILE).read_text())
    document["model"]["head"]["channels"] = 5
    edit_document(directory, model=document["model"])
    message = r"ground_projection\.weight has shape \[4, 8, 3, 3\] where \[5, 8, 3, 3\]"
    with pytest.raises(CheckpointError, match=message):
        load_model(directory)


def test_no_training_goes_on_without_its_optimizer(tmp_path):
    model = network()
    save_checkpoint(tmp_path / "best", model=model, info=INFO)
    with pytest.raises(CheckpointError, match="best holds no optimizer state"):
        restore_training(tmp_path / "best", model=model, preprocess=INFO.preprocess, optimizer=optimizer_of(model))


def test_no_training_goes_on_with_other_parameter_groups(saved):
    directory, model = saved
    with pytest.raises(CheckpointError, match="other parameter groups"):
        restore_training(
            directory, model=model, preprocess=INFO.preprocess, optimizer=torch.optim.Adam(model.parameters())
        )


def test_no_training_goes_on_with_another_configuration(saved):
    directory, _ = saved
    transport = dataclasses.replace(CONFIG.head.transport, epsilon=0.1)
    other = dataclasses.replace(CONFIG, head=dataclasses.replace(CONFIG.head, transport=transport))
    model = build_model(other, PREPROCESS)
    with pytest.raises(CheckpointError, match=r"another model: head\.transport\.epsilon was 0\.01 and is 0\.1 here"):
        restore_training(directory, model=model, preprocess=INFO.preprocess, optimizer=optimizer_of(model))


def test_loading_does_not_read_the_backbones_first_weights_again(tmp_path):
    backbone = dataclasses.replace(CONFIG.backbone, weights="/nowhere/vgg16.pth")
    config = dataclasses.replace(CONFIG, backbone=backbone)
    save_checkpoint(tmp_path / "last", model=network(), info=dataclasses.replace(INFO, model=config))
    assert load_model(tmp_path / "last")[0].config == config


def test_no_training_goes_on_with_other_preprocessing(saved):
    directory, model = saved
    other = dataclasses.replace(INFO.preprocess, std=(9.0, 9.0, 9.0))
    with pytest.raises(CheckpointError, match=r"another preprocessing: std was .* and is \[9\.0, 9\.0, 9\.0\] here"):
        restore_training(directory, model=model, preprocess=other, optimizer=optimizer_of(model))


def train_by_info_nce(model, loss, optimizer, steps):
    model.train()
    for step in steps:
        torch.manual_seed(step)
        value = loss(*model(*pairs(step)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss.clamp_parameters()


def info_nce_of(model):
    loss = build_loss(LossConfig(kind="info_nce"))
    return loss, build_optimizer(model, OptimizerConfig(learning_rate=1e-2), loss=loss)


def test_a_learned_temperature_and_its_moments_go_on_to_the_bit(tmp_path):
    straight = network()
    loss, optimizer = info_nce_of(straight)
    train_by_info_nce(straight, loss, optimizer, range(3))
    save_checkpoint(tmp_path / "last", model=straight, info=INFO, optimizer=optimizer, loss=loss)
    train_by_info_nce(straight, loss, optimizer, range(3, 6))

    resumed = network(seed=99)
    other, optimizer = info_nce_of(resumed)
    start = other.log_scale.item()
    restore_training(tmp_path / "last", model=resumed, preprocess=PREPROCESS, optimizer=optimizer, loss=other)
    assert other.log_scale.item() != start
    train_by_info_nce(resumed, other, optimizer, range(3, 6))
    assert other.log_scale.item() == loss.log_scale.item()
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in straight.state_dict().items())
    assert load_model(tmp_path / "last")[1] == INFO  # whoever evaluates needs no loss


def test_a_checkpoint_of_another_loss_is_refused(saved):
    directory, model = saved
    loss, optimizer = info_nce_of(model)
    with pytest.raises(CheckpointError, match=r"loss\.log_scale is missing"):
        restore_training(directory, model=model, preprocess=PREPROCESS, optimizer=optimizer, loss=loss)
