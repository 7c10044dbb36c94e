"""What the driver keeps of a trial that ended: its records, and little else."""

import io

from ray.tune.experiment import Trial
from rich.console import Console

from fastbp.record import RecordWriter
from sweeps.ledger import Ledger
from sweeps.progress import Progress
from sweeps.recorder import Recorder
from sweeps.stopping import Stop


def test_a_trial_that_ended_weighs_little(tmp_path):
    told = {"run": {"arm": "bp", "recipe": {f"field {i}": float(i) for i in range(100)}}, "attempt": 0}
    trial = Trial("nobody", config=told, evaluated_params=dict(told), stub=True)
    result = {"training_iteration": 3, "val_accuracy": 0.5, "record/flops_executed": 1e9, "end/status": "finished"}
    trial.update_last_result(dict(result))
    before = sum(map(len, trial.get_json_state()))
    writer, progress = RecordWriter(tmp_path / "records.jsonl"), Progress(Console(file=io.StringIO()))
    recorder = Recorder(writer, Ledger(), lambda record: None, progress, {}, Stop())
    recorder.on_trial_complete(0, [trial], trial)
    after = sum(map(len, trial.get_json_state()))
    assert after < 2500 < before, f"{before} characters became {after}"
    assert result.items() <= trial.last_result.items(), "the searchers still ask for it"
