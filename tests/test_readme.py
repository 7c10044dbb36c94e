"""The README's code and sweep file are what they say."""

import re
import sys
import types
from pathlib import Path

import torch
import yaml
from torch import nn

from fastbp.testing import check_method, small_batch, small_net

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_method_in_one_file_conforms():
    (code,) = [block for block in blocks("python") if "class SignGrad" in block]
    module = types.ModuleType("readme_sign")
    sys.modules["readme_sign"] = module
    try:
        exec(compile(code, "README.md", "exec"), module.__dict__)
        assert len(check_method(module.SignGrad(amount=0.1))) == 8
    finally:
        del sys.modules["readme_sign"]


def test_the_two_changed_lines_run():
    (code,) = [block for block in blocks("python") if "estimator.finalize()" in block]
    model = small_net().float()
    loader = [tuple(t.float() if t.is_floating_point() else t for t in small_batch(i, 8)) for i in range(3)]
    names = {"model": model, "loss_fn": nn.functional.cross_entropy, "loader": loader, "epochs": 3, "torch": torch}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"] is model
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_explained_sweep_is_the_quickstart():
    (text,) = blocks("yaml")
    explained, shipped = yaml.safe_load(text), yaml.safe_load((ROOT / "sweeps" / "quickstart.yaml").read_text())
    assert explained == shipped


def test_make_demo_and_make_test_are_the_first_commands():
    first = blocks("sh")[0]
    assert re.findall(r"^make (\w+)", first, flags=re.MULTILINE) == ["demo", "test"]
