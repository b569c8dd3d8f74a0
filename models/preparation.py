"""From a config to a run that can begin: data, backbone and saved run, each checked before anything is written."""

import logging
from dataclasses import replace
from typing import Any

from backbone.vit import load_backbone, resolve_device
from models.registry import training_features
from utils.config.config import Config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.tasks import make_stream
from utils.errors import ConfigError
from utils.features.arrays import TEST_VIEW, View
from utils.features.bank import resolve_cache_dir
from utils.hardware import available_cpus
from utils.ranks import Ranks
from utils.results.tracker import check_tracker
from utils.runs.continuing import find_saved_run, tests_old
from utils.runs.setup import Setup

log = logging.getLogger(__name__)


def prepare(config: Config, ranks: Ranks, loaded: Setup | None = None) -> Setup:
    """Load data and backbone, cheap checks first; ``loaded`` has the same ones at hand."""
    check_tracker(config)
    device = loaded.backbone.device if loaded else resolve_device(config, ranks.local_rank, ranks.count)
    data = loaded.data if loaded else load_dataset(config)
    if config.continue_from is None:
        make_stream(data, config, config.seed[0])  # more classes asked for than there are is known here
    elif not config.method.continual:
        raise ConfigError(f"{config.model_name} needs the data of all tasks; it cannot continue a saved run")
    if config.num_workers is not None and config.num_workers > available_cpus():
        log.warning("num_workers %d is above the %d CPUs of this process", config.num_workers, available_cpus())
    backbone = loaded.backbone if loaded else load_backbone(config, device, resolve_cache_dir(config.cache_dir))
    for name in ("mlp_ratio", "se_ratio"):
        if getattr(config, name) > backbone.feature_dim:
            raise ConfigError(
                f"{name} {getattr(config, name)} is above the feature width {backbone.feature_dim} of {backbone.name}"
            )
    if loaded:
        fingerprints = loaded.fingerprints
    else:
        looked_at = fingerprint_splits(data, resolve_cache_dir(config.cache_dir)) if ranks.first else None
        fingerprints = ranks.share(looked_at)
    setup = Setup(config, data, backbone, fingerprints, ranks)
    return setup if config.continue_from is None else _on_top(setup)


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
