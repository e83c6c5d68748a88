import pytest

from cvft.configuration import parse, to_plain
from cvft.errors import ConfigError
from jobs.config import PRESETS, ExperimentConfig, load, read_yaml


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("name: a\ndata: {manifest: m.parquet}\ntrain:\n  optimizer: {learning_rate: 1e-5}\n")
    return file


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_loads_and_survives_being_stored(preset):
    config = load(preset, ["data.manifest=somewhere.parquet"])
    assert parse(ExperimentConfig, to_plain(config)) == config


def test_a_number_without_a_dot_and_with_an_exponent_is_a_number(config_file):
    assert load(str(config_file)).train.optimizer.learning_rate == 1e-5


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "1e5", "-3e+2", ".5e1"])
def test_an_override_reads_every_way_of_writing_a_float(config_file, text):
    config = load(str(config_file), [f"train.optimizer.learning_rate={text.lstrip('-')}"])
    assert config.train.optimizer.learning_rate == float(text.lstrip("-"))


def test_an_override_reaches_a_section_that_the_file_does_not_have(config_file):
    config = load(
        str(config_file), ["train.loss.gamma=12", "model.head.grid=[4, 4]", "train.loss.mask_distance_m=null"]
    )
    assert (config.train.loss.gamma, config.model.head.grid, config.train.loss.mask_distance_m) == (12.0, (4, 4), None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.loss.gama=12", "train.loss.gama: unknown key; did you mean train.loss.gamma?"),
        ("gamma=12", "gamma: unknown key; did you mean train.loss.gamma?"),
        ("train.loss.gamma=-1", "train.loss.gamma: -1.0 must be positive"),
        ("train.loss.gamma=high", "train.loss.gamma: expected float, got 'high' (str)"),
        ("train.batch_size=1", "train.batch_size: 1 must be at least 2; a pair needs a negative"),
        ("train.workers=33", "train.batch_size: 32 leaves some of train.workers=33 without a pair"),
        ("train.workers=[1, 33]", "train.batch_size: 32 leaves some of train.workers=33 without a pair"),
        ("train.workers=[2, 2]", "train.workers: [2, 2] must rise from the least to the most workers"),
        ("train.workers=[0, 2]", "train.workers: 0 must be at least 1"),
        ("train.workers=[1, 2, 4]", "train.workers: expected 2 values, got 3: [1, 2, 4]"),
        ("train.workers=two", "train.workers: expected int, got 'two' (str)"),
        ("name.first=x", "name.first: name holds the value 'a', not a section"),
        ("train.loss.gamma", "'train.loss.gamma': an override is written dotted.key=value"),
        ("name=../up", "name: '../up' must be letters, digits, '.', '_' and '-': it names a folder"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(config_file, override, message):
    with pytest.raises(ConfigError) as caught:
        load(str(config_file), [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "least", "most"), [("2", 2, 2), ("[1, 4]", 1, 4)])
def test_workers_are_a_number_or_a_range_and_survive_being_stored(config_file, text, least, most):
    config = load(str(config_file), [f"train.workers={text}"])
    assert (config.train.min_workers, config.train.max_workers) == (least, most)
    assert parse(ExperimentConfig, to_plain(config)) == config


def test_a_key_given_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match="key 'name' is given twice"):
        read_yaml(file)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"--config towm: no such file, and no such preset; presets: .*town"):
        load("towm")
