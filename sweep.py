"""The runs of a grid, one after the other on one feature bank: python main.py --sweep key=v1,v2 ..."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import trainer
from utils import report
from utils.config import Config
from utils.distributed import Ranks, joined_ranks
from utils.errors import NumericError
from utils.render import as_text
from utils.runs import Run
from utils.sweep import Cell
from utils.tables import make_sections

log = logging.getLogger(__name__)

# cells that differ in nothing else share data and backbone
_LEARNER_KEYS = (
    *("init_cls", "increment", "shuffle", "seed", "model_name", "mlp_ratio", "se_ratio", "l1", "flow"),
    *("epochs", "batch_size", "optimizer", "scheduler", "lr", "weight_decay", "milestones", "train_views"),
    *("augment_seed", "new_rows", "old_rows", "sigma", "continue_from", "log_dir", "checkpoint_dir"),
)


def run_sweep(cells: Sequence[Cell], *, fresh: bool = False) -> list[dict[str, Any]]:
    """Run every cell under every seed; what an earlier start finished is kept. Return what the runs' JSONs hold.

    A cell whose training diverges is told at the end; the others go on.

    Raises:
        UserError: as in ``trainer.run``. NumericError: some cells diverged.
    """
    runs, failed, setup, done = [], [], None, 0
    with joined_ranks() as ranks:
        if cells[0].config.cache_dir == "none":
            log.warning("cache_dir=none: every run of the sweep computes its features anew")
        for number, cell in enumerate(cells, start=1):
            setup = _prepare(cell.config, ranks, setup)
            for seed in cell.config.seed:
                kept = None if fresh else _finished(setup, seed)
                if kept is None:
                    log.info("Sweep: %s, seed %d (cell %d of %d)", cell.name, seed, number, len(cells))
                    try:
                        kept = trainer.run_seed(setup, seed, fresh=fresh)
                    except NumericError as error:
                        if ranks.count > 1:  # the other ranks wait in a barrier that this one would never reach
                            raise
                        failed.append(f"{cell.name}, seed {seed}: {error}")
                        log.error("Sweep: %s", failed[-1])
                else:
                    done += 1
                runs.append(kept)
    runs = [run for run in runs if run is not None]
    if ranks.first:
        _close(cells, runs, done)
    if failed:
        raise NumericError(f"{len(failed)} of {len(runs) + len(failed)} runs diverged: {'; '.join(failed)}")
    return runs


def _prepare(config: Config, ranks: Ranks, before: trainer.Setup | None) -> trainer.Setup:
    """The setup of a cell, with data and backbone of the cell before it where they are the same."""
    if before is not None:
        same = replace(before.config, **{key: getattr(config, key) for key in _LEARNER_KEYS}) == config
        return trainer.prepare(config, ranks, loaded=before if same else None)
    return trainer.prepare(config, ranks)


def _finished(setup: trainer.Setup, seed: int) -> dict[str, Any] | None:
    """What the JSON of a finished run holds; None if there is something left to do."""
    manifest = None
    if setup.ranks.first and report.run_paths(setup.config, seed).file(".json").exists():
        manifest = setup.checkpoint(seed).read_manifest()
        if manifest and (manifest["status"] != "finished" or manifest["identity"] != setup.identity(seed)):
            manifest = None
    manifest = setup.ranks.share(manifest)
    return report.run_json(manifest) if manifest else None


def _close(cells: Sequence[Cell], runs: Sequence[dict[str, Any]], done: int) -> None:
    """The closing table: the selection asked for beside ``sample`` and ``oracle``."""
    selection = cells[0].config.selection
    sections, _ = make_sections([Run(run) for run in runs])
    for line in as_text(sections, [selection, "sample", "oracle"]).splitlines():
        log.info("%s", line)
    if done == len(runs) and runs:
        log.info("Sweep: all %d runs were finished already: nothing to do; --fresh starts them over", done)
    else:
        log.info("Sweep: %d runs, %d of them finished earlier", len(runs), done)
    log.info("Every selection, and pictures: python report.py %s", Path(cells[0].config.log_dir).parent)
