"""By which backend ranks talk while they restore."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from resilient_train.worker.exchange import Exchange

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("backends", "there", "words", "fast"),
    [
        ("cpu:gloo,cuda:nccl", True, CPU, CUDA),
        ("cuda:nccl", True, CUDA, CUDA),
        ("cpu:gloo,cuda:gloo", True, CPU, CPU),
        ("cpu:gloo,cuda:nccl", False, CPU, CPU),
        ("cpu:gloo,cuda:gloo", False, CPU, CPU),
        ("cpu:gloo", True, CPU, CPU),
    ],
)
def test_what_is_large_goes_by_the_backend_that_gpus_have_of_their_own(
    monkeypatch: pytest.MonkeyPatch, backends: str, there: bool, words: torch.device, fast: torch.device
) -> None:
    """If there are any, whatever torch was built for; gloo says that it is theirs, too, and carries none of theirs."""
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: CUDA)
    exchange = Exchange(0, 2)
    assert (exchange._device, exchange.fast, exchange.staged) == (words, fast, fast is CUDA)
