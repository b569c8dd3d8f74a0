"""Where a run's log, JSON and pictures go."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from utils.config.config import Config
from utils.errors import UserError
from utils.files import free_name

WRITTEN_WHOLE = (".json", ".png", ".npz")  # by a temporary file, which a kill may leave
SUFFIXES = (".log", *WRITTEN_WHOLE, ".tensorboard", ".wandb")


@dataclass(frozen=True)
class RunPaths:
    """Where one seed's log, JSON and pictures go: files that share a stem, in PILOT's folders."""

    folder: Path
    stem: str

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}{suffix}"

    def move_aside(self) -> list[Path]:
        """Rename another run's files at this stem; return their new names."""
        stamp, moved = time.strftime("%Y%m%d-%H%M%S"), []
        for suffix in SUFFIXES:
            path = self.file(suffix)
            if path.exists():
                new = free_name(path.with_name(f"{self.stem}.{stamp}{suffix}"))
                try:
                    path.rename(new)
                except OSError as error:
                    raise UserError(f"{path} cannot be moved aside ({error.strerror})") from error
                moved.append(new)
        return moved


def run_paths(config: Config, seed: int) -> RunPaths:
    """``logs/<model>/<dataset>/<init_cls>/<increment>/[<prefix>_]<seed>_<backbone>``; equal steps: 0.

    Domain-incremental runs have ``domain/1``: a task is one domain. What some system refuses in a file's name, such as
    the colon of ``hf-hub:user/repo``, becomes ``_``.
    """
    first, step = str(0 if config.init_cls == config.increment else config.init_cls), str(config.increment)
    if config.scenario == "domain":
        first, step = "domain", "1"
    folder = Path(config.log_dir).expanduser() / config.model_name / config.dataset / first / step
    stem = f"{config.prefix}_{seed}_{config.backbone_type}" if config.prefix else f"{seed}_{config.backbone_type}"
    return RunPaths(folder, re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", stem))
