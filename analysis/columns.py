"""The columns of records that the report reads, with their kinds; the only place that knows the schema."""

from __future__ import annotations

SCHEMA_VERSION = 1
STATUSES = ("finished", "stopped", "failed", "diverged", "running")
PHASES = ("search", "measure", "ablate", "single")
RESULTS = ("finished", "diverged", "stopped")  # ends that stand until another attempt has one
TIMED = ("measure", "ablate")  # phases of runs that are alone on their device
SHARED = "the processor is shared"  # as the reason of a run begins that was not alone on a CPU
ROLES = ("baseline", "method", "control")

SEGMENTS = (
    "train_seconds",
    "setup_seconds",
    "warmup_seconds",
    "compile_seconds",
    "eval_seconds",
    "checkpoint_seconds",
    "report_blocked_seconds",
)

_COUNTERS = ("examples", "steps", "peak_memory_bytes", "flops_executed", "energy_joules")

RUN_NUMBERS = (
    "attempt",
    "seed",
    "epochs_done",
    "parameters",
    *SEGMENTS,
    *_COUNTERS,
    "val_accuracy",
    "best_val_accuracy",
    "test_accuracy",
    "workers",  # null in records of before there were runs on several devices: one
)
RUN_TEXTS = ("run_key", "sweep", "phase", "arm", "role", "status", "reason", "git_commit")
RUN_FLAGS = ("exclusive", "resumed", "git_dirty")
RUN_MAPPINGS = ("task", "recipe", "method", "device", "software")

EPOCH_NUMBERS = ("attempt", "epoch", "train_seconds", "val_accuracy")
EPOCH_TEXTS = ("run_key",)

SWEEP_COLUMNS = ("sweep", "arms", "search_trials", "seeds", "measure_cells", "targets", "started_at")
SWEEP_COLUMNS += ("ablate_cells", "ablations")

WHOLE = ("attempt", "seed", "epoch")  # numbers that are never null

MAX_SECONDS = 1e15  # beyond it a number is no measurement but an overflow, and is read as unknown
MAX_NUMBER = 1e30

ACCURACIES = ("val_accuracy", "best_val_accuracy", "test_accuracy")

READ = {
    "run": (*RUN_NUMBERS, *RUN_TEXTS, *RUN_FLAGS, *RUN_MAPPINGS),
    "epoch": (*EPOCH_NUMBERS, *EPOCH_TEXTS),
    "sweep": SWEEP_COLUMNS,
}
"""Kind of record to the columns that are read, besides `kind` and `schema_version`."""
