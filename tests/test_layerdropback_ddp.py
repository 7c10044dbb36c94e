"""LayerDropBack in DistributedDataParallel: two processes against one, on the whole batch."""

import pytest
import torch
import torch.distributed as dist

from fastbp.units import droppable_units
from ldb_ranks import RANKS, STEPS, cases, net, train
from rank_processes import results_of_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank got in every case."""
    return results_of_ranks("ldb_ranks.py", RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", cases())
def test_ranks_equal_one_process_on_the_whole_batch(ranks, name):  # I11, I14
    method, _ = cases()[name]
    want_gradients, want_masks, want_weights = train(net(), method, 1, lambda t: t)
    names = [n for n, _ in net().named_parameters()]
    dropped = sum(map(sum, want_masks))
    assert 0 < dropped < sum(map(len, want_masks)), f"{dropped} units dropped: nothing to compare"
    for rank, results in enumerate(ranks):
        gradients, masks, weights = results[name]
        assert masks == want_masks, f"rank {rank}: masks {masks}, one process has {want_masks}"
        for step in range(STEPS):
            for n, got, want in zip(names, gradients[step], want_gradients[step], strict=True):
                assert (got is None) == (want is None), f"rank {rank}, step {step}: {n} is masked otherwise"
                if got is not None:
                    where = f"rank {rank}, step {step}: {n} is not the mean over ranks"
                    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13, msg=where)
        for n, got, want in zip(names, weights, want_weights, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13, msg=f"rank {rank}: weights {n} in the end")
    for n, a, b in zip(names, *(results[name][2] for results in ranks), strict=True):
        assert torch.equal(a, b), f"the ranks' weights {n} have drifted apart"


def test_rigid_wrapping_is_refused(ranks):
    message = (
        "LayerDropBack in DistributedDataParallel: the layers without a gradient change from step to step; "
        "wrap the model with find_unused_parameters=True and without static_graph"
    )
    for rank, results in enumerate(ranks):
        assert results["refused"] == [message, message], f"rank {rank}: {results['refused']}"
        assert results["control"] == [], "the control arm drops nothing and may be wrapped in any way"
        for unit in ("tensor", "layer", "block"):
            want = [u.name for u in droppable_units(net(), unit)]
            assert results[f"units {unit}"] == want, f"rank {rank}: units {results[f'units {unit}']}"
