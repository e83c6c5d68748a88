"""`infra/local`, `infra/mlflow`, `infra/objectstore`: a folder that is none of theirs is named, and left as it is."""

from __future__ import annotations

import subprocess

import pytest

from tests.infra.validators import INFRA

SCRIPTS = ["local/cluster.sh", "mlflow/server.sh", "objectstore/radosgw.sh"]


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_is_not_there_is_one_line(script, tmp_path):
    done = _run(INFRA / script, "stop", tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr == f"{script.split('/')[1]}: {tmp_path / 'none'}: there is no such folder\n"


def test_make_cluster_stop_deletes_no_folder_in_which_no_cluster_was_started(tmp_path):
    (tmp_path / "mine").touch()
    done = _run("make", "--directory", INFRA.parent, "cluster-stop", f"CLUSTER={tmp_path}")
    assert done.returncode != 0
    assert f"cluster.sh: {tmp_path}: nothing was started here" in done.stderr
    assert (tmp_path / "mine").exists()
