"""The tracker counts what ran: bytes that are in use, FLOPs, bytes of collectives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from steerlm2.models.attention import attend_blocks, attention_blocks
from steerlm2.planning.tracker import Collective, StepTracker


@pytest.fixture
def four_ranks() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def total(tracker: StepTracker) -> int:
    return sum(tracker.at_peak().values())


def test_peak_is_of_what_lives_at_one_time() -> None:
    """a (400 bytes), then b (800) while a lives, then c (400) when both are gone: 1200."""
    with StepTracker() as tracker:
        a = torch.zeros(100)
        b = torch.zeros(200)
        del a, b
        c = torch.zeros(100)
    assert total(tracker) == 1200
    assert sum(tracker.now().values()) == c.untyped_storage().nbytes() == 400


def test_views_and_updates_in_place_are_no_memory() -> None:
    with StepTracker() as tracker:
        a = torch.zeros(10, 10)
        a.t().add_(1)
        a[3:].reshape(-1)
    assert total(tracker) == 400


def test_a_resized_storage_counts_with_its_new_size() -> None:
    """As FSDP2 frees a gathered layer: 400 bytes, 0, 400 again."""
    with StepTracker() as tracker:
        a = torch.zeros(100)
        a.untyped_storage().resize_(0)
        assert sum(tracker.now().values()) == 0
        a.untyped_storage().resize_(400)
        assert sum(tracker.now().values()) == 400
    assert total(tracker) == 400


def test_fake_tensors_count_like_real_ones() -> None:
    """Without the memory: 40 GB here."""

    def run() -> StepTracker:
        with StepTracker() as tracker:
            weight = nn.Parameter(torch.empty(size, size))
            (torch.empty(8, size) @ weight).relu().sum().backward()
        return tracker

    size = 64
    real = run()
    with FakeTensorMode():
        fake = run()
        assert fake.at_peak() == real.at_peak()
        size = 100_000
        assert total(run()) > 2 * 4 * size**2


def test_marked_tensors_have_been_that_all_along() -> None:
    with StepTracker() as tracker:
        a = torch.zeros(100)
        tracker.mark([a], "gradients")
    assert tracker.at_peak() == {"gradients": 400}


def test_the_past_can_be_forgotten() -> None:
    """800 bytes of the past are out of the peak; what still lives is in it."""
    with StepTracker() as tracker:
        a = torch.zeros(100)
        torch.zeros(200)
        tracker.forget_the_past()
        b = torch.zeros(10)
    assert total(tracker) == a.untyped_storage().nbytes() + b.untyped_storage().nbytes() == 440


def test_flops_of_products_and_attention() -> None:
    """(2 x 3) @ (3 x 4): 2 * 2 * 3 * 4 = 48. Attention of 2 heads of width 8 over 16 tokens, 136
    pairs: 2 products of 2 * 136 * 8 * 2 heads each, 8704."""
    with StepTracker(phase="forward", attention_pairs=16 * 17 // 2) as tracker:
        torch.ones(2, 3) @ torch.ones(3, 4)
        assert tracker.flops == {"forward": 48}
        q = torch.ones(1, 2, 16, 8)
        attend_blocks(q, q, q, attention_blocks([(0, 16)], []))
    assert tracker.attention_flops == {"forward": 8704}
    assert tracker.flops == {"forward": 8704 + 48}


def reduced(tensor: Tensor) -> None:
    dist.all_reduce(tensor)


def gathered(tensor: Tensor) -> None:
    dist.all_gather_into_tensor(tensor.new_empty(4 * len(tensor)), tensor)


def scattered(tensor: Tensor) -> None:
    dist.reduce_scatter_tensor(tensor.new_empty(len(tensor) // 4), tensor)


@pytest.mark.parametrize(
    ("collective", "operation", "nbytes", "sent"),
    [
        # 400 bytes in a ring of 4: each rank sends 3/4 of the whole, twice to reduce and spread
        (reduced, "all_reduce", 400, 600),
        (gathered, "all_gather", 1600, 1200),
        (scattered, "reduce_scatter", 400, 300),
    ],
    ids=["all_reduce", "all_gather", "reduce_scatter"],
)
def test_bytes_of_collectives(
    four_ranks: dist.ProcessGroup, collective: object, operation: str, nbytes: int, sent: int
) -> None:
    assert callable(collective)
    dimensions = {str(four_ranks.group_name): ("tp", 4)}
    with FakeTensorMode(), StepTracker(dimensions=dimensions, phase="forward") as tracker:
        collective(torch.empty(100))
    ((found, traffic),) = tracker.traffic.items()
    assert found == Collective("forward", operation, "tp")  # type: ignore[arg-type]
    assert (traffic.count, traffic.nbytes, traffic.sent) == (1, nbytes, sent)
