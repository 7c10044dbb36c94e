"""Sweeps: one YAML file is planned, searched and measured by Ray Tune, with every run in MLflow."""
