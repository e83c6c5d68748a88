"""The versions of a registered model: listed, fetched, tagged, described, and put in use."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import Run as StoredRun
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from cvft.checkpoint import verify_checkpoint
from cvft.errors import CheckpointError, ConfigError, StoreError
from pipeline.tracking.aliases import Rollback, alias_history, aliased_version, move_alias, roll_back
from pipeline.tracking.registry import CARD_FILE, MODEL_ID_TAG, checkpoint_sha256, find_version
from pipeline.tracking.runs import COMMIT_TAG
from pipeline.tracking.server import SQLITE, is_refusal, resolve, store_errors, tracking_client

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a registered model.

    Attributes:
        version: Its number.
        aliases: The aliases that name it.
        tags: Its tags.
        description: For people.
        run_id: The run that it comes from.
        created_s: When it was registered, in seconds since 1970.
        source: Where its files are.
        model_id: MLflow's name of those files; none for versions of older releases.
    """

    version: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    description: str
    run_id: str
    created_s: float
    source: str
    model_id: str | None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the run says that trained a model.

    Attributes:
        config: The resolved configuration; empty if the run has none.
        commit: Commit of the code, if it is known.
        layout: Raw layout of the data trained on; empty if it is not known.
        num_pairs: Its pairs by split; empty if they are not known.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    layout: str = ""
    num_pairs: Mapping[str, int] = field(default_factory=dict)


def split_model_uri(uri: str) -> tuple[str, int | None, str | None] | None:
    """Return name, version and alias of `models:/name/3` or `models:/name@alias`; None if it is neither."""
    found = _MODEL_URI.fullmatch(uri)
    if found is None:
        return None
    return found["name"], int(found["version"]) if found["version"] else None, found["alias"]


@dataclass(frozen=True)
class Registry:
    """A registered model and the place that keeps it.

    Attributes:
        uri: Tracking and registry URI, see `prepare`.
        name: The registered model.
    """

    uri: str
    name: str

    @classmethod
    def at(cls, uri: str, name: str) -> Registry:
        """Return the registry of a place that is there already.

        Raises:
            StoreError: There is no such sqlite file.
        """
        uri = resolve(uri)[0]
        if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
            raise StoreError(f"--tracking-uri {uri}: there is no such file, so no registered model either")
        return cls(uri, name)

    @property
    def _client(self) -> MlflowClient:
        return tracking_client(self.uri)

    def versions(self) -> list[Version]:
        """List all versions, oldest first.

        Raises:
            StoreError: MLflow cannot be asked.
        """
        with store_errors(self.uri):
            aliases = self._aliases()
            found: list[ModelVersion] = []
            token: str | None = None
            while token != "":
                page = self._client.search_model_versions(f"name = '{self.name}'", max_results=1000, page_token=token)
                found, token = [*found, *page], page.token or ""
        return sorted((_version(item, aliases) for item in found), key=lambda version: version.version)

    def version(self, number: int) -> Version:
        """Return a version.

        Raises:
            ConfigError: There is no such version.
            StoreError: MLflow cannot be asked.
        """
        with store_errors(self.uri):
            try:
                found = self._client.get_model_version(self.name, str(number))
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                known = ", ".join(str(version.version) for version in self.versions()) or "none"
                raise ConfigError(f"{self.name} has no version {number}; there is: {known}") from error
            return _version(found, self._aliases())

    def aliased(self, alias: str) -> Version | None:
        """Return the version that an alias names, or none.

        Raises:
            StoreError: MLflow cannot be asked.
        """
        with store_errors(self.uri):
            number = aliased_version(self._client, self.name, alias)
        return None if number is None else self.version(number)

    def holding(self, checkpoint: Path) -> Version | None:
        """Return the version that holds a checkpoint, or none.

        Raises:
            StoreError: MLflow cannot be asked.
        """
        with store_errors(self.uri):
            number = find_version(self._client, self.name, checkpoint_sha256(checkpoint))
        return None if number is None else self.version(number)

    def history(self, alias: str) -> list[int]:
        """Return the versions that an alias named, oldest first, up to the one that it names now."""
        with store_errors(self.uri):
            return alias_history(self._client, self.name, alias)

    def move(self, alias: str, *, expected: int | None, to: int) -> None:
        """Move an alias, see `move_alias`."""
        with store_errors(self.uri):
            move_alias(self._client, self.name, alias, expected=expected, to=to)

    def roll_back(self, alias: str) -> Rollback:
        """Move an alias back, see `pipeline.tracking.aliases.roll_back`."""
        with store_errors(self.uri):
            return roll_back(self._client, self.name, alias)

    def set_tags(self, number: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version; an older value of the same name is replaced."""
        with store_errors(self.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, str(number), key, value)

    def describe(self, version: Version, *, description: str, card: str) -> None:
        """Set a version's description, and the model card beside its files."""
        with store_errors(self.uri):
            self._client.update_model_version(self.name, str(version.version), description)
            if version.model_id is None:
                return
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
                self._client.log_model_artifact(version.model_id, str(Path(folder) / CARD_FILE))

    def run_facts(self, run_id: str) -> RunFacts:
        """Return what the run says that trained a model; what it does not say is left out."""
        with store_errors(self.uri), tempfile.TemporaryDirectory() as folder:
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if is_refusal(error):
                    return RunFacts()
                raise
            has_config = any(item.path == "config.json" for item in self._client.list_artifacts(run_id))
            file = self._client.download_artifacts(run_id, "config.json", folder) if has_config else None
            config = {} if file is None else json.loads(Path(file).read_bytes())
        layout, num_pairs = _datasets(run)
        return RunFacts(config=config, commit=run.data.tags.get(COMMIT_TAG), layout=layout, num_pairs=num_pairs)

    def fetch(self, version: Version, folder: Path) -> Path:
        """Copy a version's files into a folder and return where they are; its checkpoint is whole.

        Raises:
            CheckpointError: They are gone or damaged.
        """
        try:
            local = mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder), tracking_uri=self.uri)
            verify_checkpoint(checkpoint_of(Path(local)), is_model_alone=True)
        except (MlflowException, OSError, CheckpointError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"version {version.version} of {self.name} cannot be read from {version.source}: {reason}"
            ) from error
        return Path(local)

    def _aliases(self) -> dict[int, list[str]]:
        try:
            named = self._client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if is_refusal(error):
                return {}
            raise
        aliases: dict[int, list[str]] = {}
        for alias, number in sorted(named.items()):
            aliases.setdefault(int(number), []).append(alias)
        return aliases


def checkpoint_of(model: Path) -> Path:
    """Return the checkpoint within the files of a version."""
    return model / "artifacts" / "checkpoint"


def size_bytes(model: Path) -> int:
    """Return the size of the files of a version."""
    return sum(file.stat().st_size for file in model.rglob("*") if file.is_file())


def _datasets(run: StoredRun) -> tuple[str, dict[str, int]]:
    """Return the layout of the data that a run was given, and its pairs by split, as `Run.log_dataset` wrote them."""
    layout, num_pairs = "", {}
    for dataset in (item.dataset for item in run.inputs.dataset_inputs):
        profile = json.loads(dataset.profile or "{}")
        if "split" in profile:
            layout = dataset.name.removesuffix(f" {profile['split']}")
            num_pairs[profile["split"]] = int(profile["pairs"])
    return layout, num_pairs


def _version(found: ModelVersion, aliases: Mapping[int, list[str]]) -> Version:
    number = int(found.version)
    return Version(
        version=number,
        aliases=tuple(aliases.get(number, ())),
        tags=dict(found.tags),
        description=found.description or "",
        run_id=found.run_id or "",
        created_s=found.creation_timestamp / 1000,
        source=found.source,
        model_id=found.tags.get(MODEL_ID_TAG),
    )
