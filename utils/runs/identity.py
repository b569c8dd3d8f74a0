"""What makes two runs the same run."""

from typing import Any

from utils.config import Config

# keys that change where a run happens or what it prints, but not what it computes
_NOT_IDENTITY = (
    "prefix", "device", "seed", "selection", "data_path", "backbone_weights", "pretrained", "cache_dir", "precision",
    "feature_batch_size", "num_workers", "check_images", "checkpoint_dir", "log_dir", "tracker", "augment_seed",
    "train_views", "continue_from", "backbone_type",
)  # fmt: skip


def run_identity(
    config: Config, seed: int, *, weights_sha256: str, precision: str, images_sha256: dict[str, str]
) -> dict[str, Any]:
    """What makes two runs the same run: the config that matters, the data, the weights, the seed."""
    settings = {k: v for k, v in config.as_dict().items() if k not in _NOT_IDENTITY}
    augment_seed = config.view_seed(seed) if config.views else None
    return {
        **settings,
        "views": config.views,
        "augment_seed": augment_seed,
        "precision": precision,
        "seed": seed,
        "weights_sha256": weights_sha256,
        "images_sha256": images_sha256,
    }
