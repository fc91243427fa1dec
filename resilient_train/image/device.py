"""The CUDA devices of this process as the native engine uses them, or why it does not and torch copies instead."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from resilient_train.image.native import CudaError, Device, engine

logger = logging.getLogger(__name__)

_devices: dict[int, Device | None] = {}


def device_of(tensor: torch.Tensor) -> Device | None:
    """The engine's hold of the CUDA device that a tensor stands on; None if it is none, or torch has to copy."""
    if tensor.device.type != "cuda":
        return None
    index = tensor.device.index
    if index not in _devices:
        _devices[index] = _open(index)
    return _devices[index]


def _open(index: int) -> Device | None:
    make: Any = getattr(engine, "Device", None)
    if make is None:
        return None
    try:
        device: Device = make(index)
    except CudaError as error:
        logger.warning("snapshots of cuda:%d wait for torch's copies: %s", index, str(error))
        return None
    if not device.has_kernels:
        logger.info("snapshots of cuda:%d are made without kernels: %s", index, device.why_no_kernels)
    return device


def give_up(why: str) -> None:
    """From now on torch copies: the engine's way has failed."""
    logger.warning("snapshots wait for torch's copies from now on: %s", why)
    for index in _devices:
        _devices[index] = None


def stream_of(tensor: torch.Tensor) -> int:
    """Handle of the stream that this thread computes on, on the tensor's device."""
    handle: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return handle


def copying_threads() -> int:
    """Native threads that follow a device's copies, or feed them: a few, and few of those there are."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // 4))


class Uploads:
    """Copies into tensors, those to CUDA devices all at once through page-locked memory."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[Device, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` into ``target``; at the latest when `finish` returns, until when both are held."""
        device = device_of(target)
        plain = source.device.type == "cpu" and source.dtype == target.dtype and source.shape == target.shape
        if device is None or not (plain and target.is_contiguous() and source.is_contiguous()):
            target.copy_(source)
        elif target.numel():
            self._pending.setdefault(id(device), (device, []))[1].append((target, source))

    def finish(self) -> None:
        """Wait until everything is copied."""
        pending, self._pending = self._pending, {}
        for device, pairs in pending.values():
            copies = [
                (target.data_ptr(), source.data_ptr(), source.numel() * source.element_size())
                for target, source in pairs
            ]
            try:
                device.upload(copies, stream_of(pairs[0][0]), copying_threads()).wait()
            except CudaError as error:
                logger.warning("torch copies to the device instead: %s", str(error))
                for target, source in pairs:
                    target.copy_(source)
