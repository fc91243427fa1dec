"""Losses that are averaged over tokens, of which every micro-batch has another number."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from resilient_train.errors import ConfigError
from resilient_train.worker.world import World


def mean_over_tokens(parameters: Iterable[torch.Tensor], tokens: int | torch.Tensor, world: World) -> int:
    """Turn gradients of *summed* losses into the gradient of the mean over all tokens of the step.

    To be called by all ranks, once per step, after the last backward and before gradients are clipped. A mean of
    the micro-batches' means would give tokens of short sequences a greater part, and one that depends on how the batch
    was cut.

    Args:
        parameters: whose gradients to scale; they have been averaged over the data ranks, as DDP and FSDP do.
        tokens: how many tokens this rank's losses were summed over in this step, fillers (of ``weight`` 0) left
            out; a number, or a tensor of one element.
        world: who takes part.

    Returns:
        The number of tokens of the whole step.

    Raises:
        ConfigError: if no rank has counted a token.

    Example::

        tokens = 0
        for micro in data.micro_batches(step):
            inputs, targets = corpus[micro.indices]
            real = micro.weight > 0
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
            (loss * real).backward()
            tokens += (targets != -100).sum() * real
        rt.mean_over_tokens(model.parameters(), tokens, world)
        optim.step()
    """
    total = torch.zeros((), dtype=torch.int64, device=world.device) + tokens
    if world.size > 1:
        dist.all_reduce(total)
    # Ranks that share samples have counted the same tokens.
    whole = int(total) * world.data_size // world.size
    if whole < 1:
        raise ConfigError("no rank has counted a token in this step: of what is the loss a mean?")
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(world.data_size / whole)
    return whole
