"""DDP, FSDP1 and FSDP2 with two gloo processes: loss and gradients, the projection's too, of one on the whole batch."""

import itertools
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
import workers

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")

CASES = list(itertools.product(("ddp", "fsdp1", "fsdp2"), ("token", "cls", "mean"), ("teacher", "student"), (None, 1)))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every case on two ranks, in one pair of processes."""
    folder = tmp_path_factory.mktemp("gloo")
    context = mp.spawn(workers.run_cases, (CASES, str(folder)), nprocs=workers.WORLD, join=False)
    deadline = time.monotonic() + 240
    while not context.join(timeout=5):  # returns early where one rank has ended
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks hang")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(workers.WORLD)]


def single_process(pooling, projection, empty_rank):
    distiller = workers.make(pooling, projection)
    x, teacher_rows, mask = workers.global_batch(pooling, empty_rank)
    loss = distiller(x, teacher_rows, mask, workers.rows_that_count(mask, pooling).double())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in distiller.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_equals_one_process(results, case):
    _, pooling, projection, empty_rank = case
    loss, gradients = single_process(pooling, projection, empty_rank)
    for rank in range(workers.WORLD):
        total, got = results[rank][case]
        torch.testing.assert_close(total, loss, rtol=1e-6, atol=0)
        assert got.keys() == gradients.keys()
        for name, grad in gradients.items():
            # sums of up to a thousand float32 products in another order
            torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=2**-20 * grad.abs().max().item(), msg=name)
