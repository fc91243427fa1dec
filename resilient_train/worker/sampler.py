"""``ElasticSampler``: the same global batches in the same order, whatever the world does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from resilient_train.errors import ConfigError
from resilient_train.plan.batch import Pass, mix, passes, sample
from resilient_train.worker.rng import seed_generators
from resilient_train.worker.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward of this rank."""

    indices: torch.Tensor
    """int64, shape [n]: which samples of the data set. A filler repeats the first unit's."""
    weight: float
    """Factor for their mean loss, such that gradients summed over passes and averaged over ranks are the mean over
    the global batch; 0 for a filler."""
    last: bool
    """Whether gradients are to be synchronised after this pass (``no_sync`` before)."""


class ElasticSampler:
    """Cuts each step's global batch over the ranks there are.

    The order is a pure function of ``seed`` and step number: sample ``step * global_batch + i`` of concatenated,
    reshuffled epochs. Nothing is lost or seen twice when the world changes, and there is no state to save.

    Args:
        length: number of samples in the data set.
        global_batch: samples per step, over all ranks.
        micro_batch: samples per forward and backward.
        world: who takes part.
        seed: chooses the order and seeds the generators of every unit of work.
        shuffle: whether to shuffle each epoch.

    Raises:
        ConfigError: for sizes below 1.

    The loss of a micro-batch must be a *mean* over its samples. Where samples differ in what they count (losses
    averaged over tokens of sequences of different lengths), sum instead, and call `mean_over_tokens`.
    """

    def __init__(
        self, length: int, *, global_batch: int, micro_batch: int, world: World, seed: int, shuffle: bool = True
    ) -> None:
        if not isinstance(world, World):
            raise ConfigError(f"world must be the World that the elastic function got, it is {world!r}")
        numbers = {"length": length, "global_batch": global_batch, "micro_batch": micro_batch, "seed": seed}
        for name, value in numbers.items():
            if not isinstance(value, int):
                raise ConfigError(f"{name} must be a whole number, it is {value!r}")
        if min(length, global_batch, micro_batch) < 1:
            raise ConfigError(
                f"length, global_batch and micro_batch must be at least 1, got {length}, {global_batch}, {micro_batch}"
            )
        self._length = length
        self._global_batch = global_batch
        self._seed = seed
        self._shuffle = shuffle
        self._passes = passes(global_batch, micro_batch, world.data_rank, world.data_size)
        self._rank = world.data_rank
        self._device = world.device

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This rank's share of global batch number ``step``; equally many micro-batches on every rank.

        Before each one, torch's generators are seeded from (seed, step, unit), so that dropout does not depend on
        which rank computes a unit either.
        """
        if not isinstance(step, int) or step < 0:
            raise ConfigError(f"micro_batches() needs the number of a step, it got {step!r}")
        for each in self._passes:
            unit = each.unit if each.unit >= 0 else -1 - self._rank
            seed_generators(mix(self._seed, step, unit), self._device)
            indices = torch.tensor(self._indices(step, each), dtype=torch.int64)
            yield MicroBatch(indices=indices, weight=each.weight, last=each.last)

    def batches_from(self, step: int) -> Iterator[list[int]]:
        """A batch sampler for ``torch.utils.data.DataLoader``: the indices of every micro-batch from ``step`` on.

        It has no end; weights come from `micro_batches`' order, which is the same.
        """
        while True:
            for each in self._passes:
                yield self._indices(step, each)
            step += 1

    def _indices(self, step: int, each: Pass) -> list[int]:
        return [
            sample(
                step,
                within,
                length=self._length,
                global_batch=self._global_batch,
                seed=self._seed,
                shuffle=self._shuffle,
            )
            for within in range(each.begin, each.begin + each.count)
        ]
