"""What all seeds of a run share: config, data and backbone, checked against each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.config import Config
from utils.data.splits import Dataset
from utils.data.tasks import TaskStream, make_stream
from utils.features.bank import FeatureBank, resolve_cache_dir
from utils.features.extraction import FeatureExtractor
from utils.ranks import Ranks
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.continuing import SavedRun
from utils.runs.manifest import run_identity


@dataclass(frozen=True)
class Setup:
    """Config, data and backbone, checked against each other."""

    config: Config
    data: Dataset
    backbone: FeatureExtractor
    fingerprints: dict[str, str]  # of each split's images
    ranks: Ranks
    base: SavedRun | None = None  # the saved run that this one continues

    def stream(self, seed: int) -> TaskStream:
        return make_stream(self.data, self.config, seed, self.base.learned if self.base else None)

    def bank(self, seed: int, backbone: FeatureExtractor | None = None) -> FeatureBank:
        """The features of ``backbone``, by default the plain one."""
        c = self.config
        return FeatureBank(
            self.data,
            backbone or self.backbone,
            image_size=c.image_size,
            augment_seed=c.view_seed(seed),
            fingerprints=self.fingerprints,
            cache_dir=resolve_cache_dir(c.cache_dir),
            batch_size=c.feature_batch_size,
            num_workers=c.num_workers,
            ranks=self.ranks,
        )

    def identity(self, seed: int) -> dict[str, Any]:
        return self.identity_on(self.base.sha256 if self.base else None, seed)

    def identity_on(self, base_sha256: str | None, seed: int) -> dict[str, Any]:
        """The identity of a run on top of a saved one (or of none)."""
        identity = run_identity(
            self.config,
            seed,
            weights_sha256=self.backbone.weights_sha256,
            precision=self.backbone.precision,
            images_sha256=self.fingerprints,
        )
        identity = {**identity, **self.backbone.variant}
        return identity if base_sha256 is None else {**identity, "base": base_sha256}

    def checkpoint(self, seed: int) -> CheckpointFolder:
        return checkpoint_of(self.config, seed)


def checkpoint_of(config: Config, seed: int) -> CheckpointFolder:
    """``tosca/``, or with several seeds ``tosca/seed<seed>/``."""
    folder = Path(config.checkpoint_dir).expanduser()
    return CheckpointFolder(folder / f"seed{seed}" if len(config.seed) > 1 else folder)
