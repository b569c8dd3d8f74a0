"""The names of what a run costs (``models.cost`` measures it), for its log, JSON and tables."""

from collections.abc import Mapping

TRAIN_MINUTES = "Train Time (min)"
EVAL_MS = "Eval (ms/smp)"
INFERENCE = "Inference (GFLOPs)"
TRAIN = "Train (GFLOPs)"
PEAK_MB = "Peak Train Mem. (MB)"
PARAMS = "Params (M)"
TRAINABLE = "Trainable Params (M)"
COLUMNS = (TRAIN_MINUTES, EVAL_MS, INFERENCE, TRAIN, PEAK_MB, PARAMS, TRAINABLE)
AS_PUBLISHED = " as published"
PUBLISHED_COLUMNS = tuple(name + AS_PUBLISHED for name in (EVAL_MS, INFERENCE, TRAIN))
LEARNER = "Learner (GFLOPs)"  # of training, without the backbone


def cost_summary(cost: Mapping[str, float]) -> dict[str, float]:
    """Return the columns in their order, rounded to four significant digits, for the log's ``Cost summary`` line."""
    return {name: float(f"{cost[name]:.4g}") for name in (*COLUMNS, *PUBLISHED_COLUMNS) if name in cost}
