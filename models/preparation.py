"""From a config to a run that can begin: data, backbone and saved run, each checked before anything is written."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbone.vit import load_backbone, resolve_device
from models.registry import training_features
from utils.config import Config
from utils.data.check import check_images
from utils.data.datasets import load_dataset
from utils.data.fingerprints import Fingerprints, fingerprint_splits
from utils.data.old_tests import TestFolder, check_unchanged, with_old_tests
from utils.data.splits import Dataset
from utils.data.tasks import make_stream
from utils.errors import ConfigError, DataError
from utils.features.arrays import TEST_VIEW, View
from utils.features.bank import resolve_cache_dir
from utils.hardware import Ranks, available_cpus
from utils.results.tracker import check_tracker
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.continuing import find_saved_run, read_run, recorded_test_folders, tests_old
from utils.runs.setup import Setup

log = logging.getLogger(__name__)


def prepare(config: Config, ranks: Ranks, loaded: Setup | None = None) -> Setup:
    """Load data and backbone, cheap checks first; ``loaded`` has the same ones at hand."""
    check_tracker(config)
    device = loaded.backbone.device if loaded else resolve_device(config, ranks.local_rank, ranks.count)
    data = loaded.data if loaded else load_dataset(config)
    old_tests = OldTests(data) if loaded else _find_old_tests(config, data, ranks)
    if config.continue_from is None:
        make_stream(data, config, config.seed[0])  # more classes asked for than there are is known here
    elif not config.method.continual:
        raise ConfigError(f"{config.model_name} needs the data of all tasks; it cannot continue a saved run")
    if config.num_workers is not None and config.num_workers > available_cpus():
        log.warning("num_workers %d is above the %d CPUs of this process", config.num_workers, available_cpus())
    if config.check_images and ranks.first and not loaded:
        check_images(old_tests.data, threads=available_cpus())
    backbone = loaded.backbone if loaded else load_backbone(config, device)
    for name in ("mlp_ratio", "se_ratio"):
        if getattr(config, name) > backbone.feature_dim:
            raise ConfigError(
                f"{name} {getattr(config, name)} is above the feature width {backbone.feature_dim} of {backbone.name}"
            )
    if loaded:
        fingerprints = loaded.fingerprints
    else:
        looked_at = old_tests.looked_at(data, resolve_cache_dir(config.cache_dir)) if ranks.first else None
        fingerprints, unchanged = ranks.share(looked_at)
        data = old_tests.data if unchanged else data
    setup = Setup(config, data, backbone, fingerprints, ranks)
    return setup if config.continue_from is None else _on_top(setup)


@dataclass(frozen=True)
class OldTests:
    """The data of a run with the test images of what it continues, where ``test_old: auto`` found them.

    Attributes:
        data: with these images; the data itself where there are none to add.
        recorded: what the saved run recorded of them.
    """

    data: Dataset
    recorded: Sequence[TestFolder] = ()

    def looked_at(self, own: Dataset, cache_dir: Path | None) -> tuple[Fingerprints, bool]:
        """Fingerprints, and whether they are of ``data``: of ``own`` if images are not those that were recorded."""
        fingerprints = fingerprint_splits(self.data, cache_dir)
        try:
            check_unchanged(self.data, fingerprints, self.recorded)
        except DataError as error:
            _say_not_tested(error)
            return fingerprint_splits(own, cache_dir), False
        return fingerprints, True


def _find_old_tests(config: Config, data: Dataset, ranks: Ranks) -> OldTests:
    """List the test images of what is continued; where they cannot be had, say why."""
    if config.continue_from is None or config.test_old != "auto":
        return OldTests(data)
    found: OldTests | None = None
    if ranks.first:
        manifest = read_run(CheckpointFolder(Path(config.continue_from).expanduser()))
        recorded = recorded_test_folders(manifest)
        try:
            found = OldTests(with_old_tests(data, recorded, manifest.learned()), recorded)
        except DataError as error:
            _say_not_tested(error)
    found = ranks.share(found)
    return found or OldTests(data)


def _say_not_tested(reason: DataError) -> None:
    log.warning("test_old=auto: the old classes cannot be tested, the new ones are tested alone: %s", reason)


def _on_top(setup: Setup) -> Setup:
    """The setup with the saved run that it continues."""
    seed = setup.config.seed[0]

    def identity(base_sha256: str) -> dict[str, Any]:
        return setup.identity_on(base_sha256, seed)

    base = setup.ranks.share(find_saved_run(setup.config, identity) if setup.ranks.first else None)
    setup = replace(setup, base=base)
    tests_old(base, setup.stream(seed))
    return setup


def wanted_features(config: Config) -> list[View]:
    """Every (split, view) that a run reads."""
    return [("test", TEST_VIEW), *training_features(config)]
