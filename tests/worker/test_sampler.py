"""ElasticSampler: whatever happens to the world, the finished steps are those of a job to which nothing happened."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from worlds import world, worlds

from resilient_train.errors import ConfigError
from resilient_train.plan.batch import sample
from resilient_train.worker.sampler import ElasticSampler, MicroBatch
from resilient_train.worker.world import World

SMALL, TWO = st.integers(1, 3), st.integers(1, 2)
MESHES = st.one_of(
    st.fixed_dictionaries({"data": st.integers(1, 7)}),
    st.fixed_dictionaries({"replicate": SMALL, "shard": SMALL}),
    st.fixed_dictionaries({"data": SMALL, "tensor": SMALL}),
    st.fixed_dictionaries({"tp": SMALL, "dp": SMALL}),
    st.fixed_dictionaries({"pp": TWO, "dp_replicate": TWO, "dp_shard": TWO, "tp": TWO}),
)
# The mesh of a world, how many steps it finishes, and how many finished steps its end costs: -1 for a planned change at
# a boundary, 0 and more for a loss, after which the step that was running is computed again at least.
SCHEDULES = st.lists(st.tuples(MESHES, st.integers(0, 4), st.integers(-1, 2)), min_size=1, max_size=4)


class Training:
    """A linear model, trained in double precision by all ranks of one world after the other."""

    def __init__(self, length: int, batch: int, micro: int, seed: int, shuffle: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randn(length, generator=generator, dtype=torch.float64)
        self.sizes = {"length": length, "global_batch": batch, "micro_batch": micro, "seed": seed, "shuffle": shuffle}
        self.weights = [torch.zeros(3, dtype=torch.float64)]
        """After so many finished steps."""
        self.used: list[Counter[int]] = []
        """How often the finished steps have used which samples."""

    def sampler(self, world: World) -> ElasticSampler:
        sizes = dict(self.sizes)
        return ElasticSampler(sizes.pop("length"), world=world, **sizes)  # type: ignore[arg-type]

    def step(self, ranks: list[World]) -> None:
        """One step of all ranks, their gradients averaged over all of them as DDP and FSDP do."""
        now = self.weights[-1]
        shares = [list(self.sampler(rank).micro_batches(len(self.used))) for rank in ranks]
        assert len({len(share) for share in shares}) == 1, "a rank would wait for the others"
        assert all([micro.last for micro in share] == [False] * (len(share) - 1) + [True] for share in shares)
        gradients = [sum((self.gradient(now, micro) for micro in share), torch.zeros(3)) for share in shares]
        used: Counter[int] = Counter()
        for rank, share in zip(ranks, shares, strict=True):
            first = next(i for i, other in enumerate(ranks) if other.data_rank == rank.data_rank)
            same = [(micro.indices.tolist(), micro.weight) for micro in share]
            assert same == [(micro.indices.tolist(), micro.weight) for micro in shares[first]], "peers share samples"
            if ranks[first] is rank:
                used.update(i for micro in share if micro.weight for i in micro.indices.tolist())
        self.used.append(used)
        self.weights.append(now - 0.05 * torch.stack(gradients).mean(0))

    def gradient(self, weights: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        weights = weights.clone().requires_grad_()
        loss = (self.x[micro.indices] @ weights - self.y[micro.indices]).square().mean() * micro.weight
        (gradient,) = torch.autograd.grad(loss, weights)
        return gradient

    def lose(self, finished: int) -> None:
        """Go back to what was before the last ``finished`` steps."""
        keep = max(0, len(self.used) - finished)
        del self.used[keep:], self.weights[keep + 1 :]


def plain(training: Training, steps: int) -> torch.Tensor:
    """The weights after so many steps on whole global batches, without ranks or micro-batches."""
    sizes = dict(training.sizes)
    sizes.pop("micro_batch")
    weights = torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        indices = [sample(step, i, **sizes) for i in range(int(sizes["global_batch"]))]  # type: ignore[arg-type]
        weights = weights.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            (training.x[indices] @ weights - training.y[indices]).square().mean(), weights
        )
        weights = (weights - 0.05 * gradient).detach()
    return weights


@given(SCHEDULES, st.integers(1, 40), st.integers(1, 24), st.integers(1, 9), st.integers(0, 1 << 40), st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_sequence_of_worlds_trains_on_every_sample_once_an_epoch(
    schedule: list[tuple[dict[str, int], int, int]], length: int, batch: int, micro: int, seed: int, shuffle: bool
) -> None:
    """Meshes of one to four dimensions, losses that take finished steps back, planned changes: each epoch of the steps
    that remain uses every sample once, ranks make equally many passes, those that share samples get the same, and the
    weights are those of plain training on whole batches, to the last bits."""
    training = Training(length, batch, micro, seed, shuffle)
    for generation, (mesh, steps, cost) in enumerate(schedule):
        ranks = worlds(mesh, generation + 1)
        for _ in range(steps):
            training.step(ranks)
        if cost >= 0:
            training.step(ranks)
            training.lose(cost + 1)
    order = [
        sample(step, i, length=length, global_batch=batch, seed=seed, shuffle=shuffle)
        for step in range(len(training.used))
        for i in range(batch)
    ]
    for first in range(0, len(order) - length + 1, length):
        assert sorted(order[first : first + length]) == list(range(length))
    for step, used in enumerate(training.used):
        assert used == Counter(order[step * batch : (step + 1) * batch])
    torch.testing.assert_close(training.weights[-1], plain(training, len(training.used)), rtol=1e-9, atol=1e-12)


@given(MESHES, st.integers(0, 30))
@settings(deadline=None)
def test_data_ranks_are_the_places_in_the_data_dimensions(mesh: dict[str, int], step: int) -> None:
    """As many as their product, each as often as there are ranks that share its samples."""
    ranks = worlds(mesh)
    counted = Counter(rank.data_rank for rank in ranks)
    assert sorted(counted) == list(range(ranks[0].data_size))
    assert set(counted.values()) == {len(ranks) // ranks[0].data_size}


@given(MESHES, st.integers(1, 30), st.integers(1, 9), st.integers(0, 20))
@settings(deadline=None)
def test_batches_from_is_micro_batches_one_after_the_other(
    mesh: dict[str, int], batch: int, micro: int, first: int
) -> None:
    """What DataLoader loads ahead is what `micro_batches` names, from whatever step on and on every rank."""
    for rank in worlds(mesh):
        data = ElasticSampler(50, global_batch=batch, micro_batch=micro, world=rank, seed=3)
        ahead = data.batches_from(first)
        for step in range(first, first + 3):
            for each in data.micro_batches(step):
                assert next(ahead) == each.indices.tolist()


def test_a_unit_has_its_random_numbers_on_any_rank() -> None:
    """What dropout draws for a unit depends on seed, step and unit, and not on who computes it."""

    def draws(ranks: int, seed: int) -> dict[tuple[int, ...], float]:
        samplers = [
            ElasticSampler(60, global_batch=24, micro_batch=4, world=rank, seed=seed)
            for rank in worlds({"data": ranks})
        ]
        return {
            tuple(micro.indices.tolist()): torch.rand(()).item()
            for data in samplers
            for micro in data.micro_batches(7)
            if micro.weight
        }

    assert draws(1, 0) == draws(2, 0) == draws(3, 0) == draws(5, 0)
    assert not set(draws(1, 0).values()) & set(draws(1, 1).values())
    assert len(set(draws(1, 0).values())) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_loads_what_the_sampler_names(workers: int) -> None:
    """With worker processes or without, in order; and a second one goes on where a world was left, whatever the first
    had loaded ahead."""
    dataset = TensorDataset(torch.arange(50))
    seen: Counter[int] = Counter()
    for mesh, steps in (({"data": 2}, range(3)), ({"data": 3}, range(3, 8))):
        for rank in worlds(mesh):
            data = ElasticSampler(50, global_batch=12, micro_batch=5, world=rank, seed=1)
            batches = iter(DataLoader(dataset, batch_sampler=data.batches_from(steps[0]), num_workers=workers))
            for step in steps:
                for micro, (loaded,) in zip(data.micro_batches(step), batches, strict=False):
                    assert torch.equal(loaded, micro.indices)
                    seen.update(loaded.tolist() if micro.weight else ())
    expected = [sample(s, i, length=50, global_batch=12, seed=1, shuffle=True) for s in range(8) for i in range(12)]
    assert seen == Counter(expected)


def test_what_cannot_be_meant_is_refused() -> None:
    """Sizes below one, numbers that are none, a world that is none, steps that are none."""
    one = world({"data": 1}, 0)
    for wrong in ({"length": 0}, {"micro_batch": 0}, {"global_batch": 1.5}, {"seed": "x"}, {"world": None}):
        sizes = {"length": 5, "global_batch": 4, "micro_batch": 2, "world": one, "seed": 0, **wrong}
        with pytest.raises(ConfigError):
            ElasticSampler(sizes.pop("length"), **sizes)
    data = ElasticSampler(5, global_batch=4, micro_batch=2, world=one, seed=0)
    for step in (-1, 1.0):
        with pytest.raises(ConfigError, match="number of a step"):
            next(data.micro_batches(step))  # type: ignore[arg-type]
