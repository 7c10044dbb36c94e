"""Every test runs with one torch thread: deterministic, and fair to the other processes of a small machine."""

import os
import secrets
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported, as `fastbp-sweep` does
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("FASTBP_FAKE_QUIET", "1")  # tests run beside others: their times mean nothing anyway

import pytest
import torch

torch.set_num_threads(1)


LONGEST = ("test_sweep_faults.py", "test_sweep_run.py", "test_ray_job.py")


def pytest_collection_modifyitems(items):
    """The longest files begin first: on several processes, none is left waiting for one of them in the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="module")
def ray():
    """A private Ray cluster, shared by the tests of a module."""
    from sweeps.cluster import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session():
            yield


@pytest.fixture(autouse=True)
def _threads_and_random_state():
    state = torch.get_rng_state()
    yield
    torch.set_num_threads(1)
    torch.set_rng_state(state)
    if "ray._raylet" in sys.modules:  # it remembers the token it read first, which a test may have replaced
        sys.modules["ray._raylet"].AuthenticationTokenLoader.instance().reset_cache()
