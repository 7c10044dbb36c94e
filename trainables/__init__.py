"""Ray Tune's view of a training run."""
