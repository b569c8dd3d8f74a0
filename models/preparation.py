"""From a config to a run that can begin: data, backbone and saved run, each checked before anything is written."""

import logging
from dataclasses import replace

from backbone.vit import load_backbone, resolve_device
from models.base import training_features
from utils import module
from utils.config.config import Config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.tasks import make_stream
from utils.errors import ConfigError
from utils.features.bank import resolve_cache_dir
from utils.features.rows import TEST_VIEW, View
from utils.hardware import available_cpus
from utils.ranks import Ranks
from utils.runs.setup import Setup

log = logging.getLogger(__name__)


def prepare(config: Config, ranks: Ranks, before: Setup | None = None) -> Setup:
    """Data, backbone and the saved run that is continued, cheap checks first; nothing is written.

    Args:
        before: another run's, whose data and backbone serve where they are the same.
    """
    shared = before if before is not None and config.shares_backbone_with(before.config) else None
    same_backbone = before if before is not None and config.shares_backbone_with(before.config, "data") else None
    if config.tracker != "none":
        module("utils.results.tracker").check_tracker(config)
    device = same_backbone.backbone.device if same_backbone else resolve_device(config, ranks.local_rank, ranks.count)
    data = shared.data if shared else load_dataset(config)
    if config.continue_from is None:
        make_stream(data, config, config.seed[0])  # more classes asked for than there are is known here
    elif not config.method.continual:
        raise ConfigError(f"{config.model_name} needs the data of all tasks; it cannot continue a saved run")
    if config.num_workers is not None and config.num_workers > available_cpus():
        log.warning("num_workers %d is above the %d CPUs of this process", config.num_workers, available_cpus())
    cache_dir = resolve_cache_dir(config.cache_dir)
    backbone = same_backbone.backbone if same_backbone else load_backbone(config, device, cache_dir)
    for name in ("mlp_ratio", "se_ratio"):
        if getattr(config, name) > backbone.feature_dim:
            width = f"the feature width {backbone.feature_dim} of {backbone.name}"
            raise ConfigError(f"{name} {getattr(config, name)} is above {width}")
    if shared:
        fingerprints = shared.fingerprints
    else:
        found = fingerprint_splits(data, cache_dir) if ranks.first else None
        fingerprints = ranks.share(found)
    setup = Setup(config, data, backbone, fingerprints, ranks)
    if config.continue_from is None:
        return setup
    continuing = module("utils.runs.continuing")
    base = continuing.find_saved_run(config, setup.identity(config.seed[0])) if ranks.first else None
    setup = replace(setup, base=ranks.share(base))
    continuing.tests_old(setup.base, setup.stream(config.seed[0]))
    return setup


def wanted_features(config: Config) -> list[View]:
    """Every (split, view) that a run reads."""
    return [("test", TEST_VIEW), *training_features(config)]
