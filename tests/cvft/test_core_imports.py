import os
import subprocess
import sys
from pathlib import Path

SCRIPT = '''
import importlib, pkgutil, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

ABSENT = {
    "ray", "mlflow", "webdataset", "pyarrow", "boto3", "yaml", "PIL", "cv2", "simplejpeg", "pandas", "matplotlib",
    "tensorflow", "triton", "timm", "torchvision",
}

class Bare:
    """Finds modules as ever, except that those of the pipeline look as if they had never been installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Bare]
for name in ABSENT:
    assert importlib.util.find_spec(name) is None, name

import cvft
for module in pkgutil.walk_packages(cvft.__path__, "cvft."):
    if not module.name.endswith("_triton"):  # device code, loaded where Triton is
        importlib.import_module(module.name)

import torch
from cvft.config import LossConfig, OptimizerConfig
from cvft.engine import evaluate, train_epoch
from cvft.loss import build_loss
from cvft.optim import build_optimizer, build_schedule
from tests.cvft.tiny import TinyModel, eval_batches, preprocess, train_batches

torch.set_num_threads(1)
model, config = TinyModel(dropout=0.2), OptimizerConfig()
report = train_epoch(
    model, train_batches(2), preprocess=preprocess, loss=build_loss(LossConfig()),
    optimizer=build_optimizer(model, config), learning_rate=build_schedule(config, num_steps=2), first_step=0, seed=0,
)
assert report.num_steps == 2
assert evaluate(model, eval_batches(11), preprocess=preprocess).metrics()["num_queries"] == 11
assert not ABSENT & set(sys.modules)
print("ok")
'''


def test_the_core_trains_and_evaluates_where_only_torch_numpy_and_safetensors_are_installed():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
