"""Random generators as state: what is no state of one is refused, and changes none."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from resilient_train.errors import FormatError
from resilient_train.worker.capture import Capture
from resilient_train.worker.rng import capture_rng, rng_setters


def test_generators_go_on_where_they_were() -> None:
    """Python's, numpy's and torch's."""
    document = capture_rng(0, Capture())
    states = {"torch": torch.get_rng_state()}
    drawn = (random.random(), np.random.random(), torch.rand(3).tolist())
    for put_back in rng_setters(document, states):
        put_back()
    assert (random.random(), np.random.random(), torch.rand(3).tolist()) == drawn


@pytest.mark.parametrize(
    ("which", "value"),
    [
        ("numpy", ["", 0, 0, 0.0]),
        ("numpy", ["00000000", 0, 0, 0.0]),
        ("numpy", ["zz", 0, 0, 0.0]),
        ("numpy", []),
        ("numpy", None),
        ("python", [3, "", None]),
        ("python", [3, "00000000", None]),
        ("python", [2, "", None]),
        ("python", [3]),
    ],
)
def test_what_is_no_state_of_a_generator_is_refused(which: str, value: Any) -> None:
    """As a malformed checkpoint, whatever numpy and Python call it."""
    document = capture_rng(0, Capture()) | {which: value}
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(FormatError, match="malformed states of random generators"):
        rng_setters(document, {"torch": torch.get_rng_state()})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
