"""Imports point one way: fastbp <- trainables <- sweeps -> records -> analysis; and fastbp needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "fastbp": {"fastbp"},
    "trainables": {"fastbp", "trainables"},
    "sweeps": {"fastbp", "trainables", "sweeps"},
    "analysis": {"analysis"},
}


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """Top-level packages that a file imports: anywhere, or only when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_no_arrow_points_back(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = imported(path, everywhere=True) & set(ALLOWED) - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_fastbp_needs_torch_alone():
    free = set(sys.stdlib_module_names) | {"torch", "fastbp"}
    for path in (ROOT / "fastbp").rglob("*.py"):
        if path.name not in ("cli.py", "cards.py", "scan_triton.py"):  # what the command line prints; CUDA alone
            extra = imported(path, everywhere=False) - free
            assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)} at the top"


def test_only_tune_is_used_of_ray():
    """`ray.train` and `ray.air` break inside Tune since Ray Train v2."""
    for package in ("trainables", "sweeps"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    assert not node.module.startswith(("ray.train", "ray.air")), f"{path}: imports {node.module}"


BLOCKED = ("ray", "mlflow", "optuna", "timm", "torchvision", "pandas", "numpy", "scipy", "sklearn", "PIL", "pydantic")


def test_conformance_with_everything_else_blocked():
    """The library imports, conforms and trains a real data set with only torch importable."""
    script = f"""
import sys, warnings
for name in {BLOCKED!r}:
    sys.modules[name] = None
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*[Nn]um[Pp]y.*")
import torch
torch.set_num_threads(1)
from fastbp import METHODS
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.run import Run
from fastbp.testing import check_method
for method in METHODS.values():
    check_method(method())
run = Run(RunConfig(Task("digits", "mlp", data_args={{"limit": 200}}), Recipe(epochs=1, lr=0.05)))
run.train_epoch()
print("ok", run.end().status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "ok finished", done.stderr[-2000:]
