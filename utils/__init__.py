"""Configuration, data, tasks, the feature bank, metrics, checkpoints and reports."""
