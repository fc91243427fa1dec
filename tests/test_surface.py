"""What users type: pinned, so that a change is a decision."""

from __future__ import annotations

import subprocess
import sys

from torch.distributed import run as torchrun

import resilient_train
from resilient_train.launch import rtrun


def test_public_names() -> None:
    """Six names; each can be imported from the package."""
    names = ["Checkpointer", "ElasticSampler", "MicroBatch", "State", "World", "__version__", "elastic"]
    assert resilient_train.__all__ == names
    assert all(getattr(resilient_train, name) is not None for name in names)


def test_importing_the_package_does_not_import_torch() -> None:
    """The keeper and tools start fast."""
    code = "import sys, resilient_train, resilient_train.keeper.keeper; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rtrun_takes_every_flag_of_torchrun() -> None:
    """The same options with the same defaults."""
    ours = {tuple(a.option_strings): a.default for a in rtrun.parser()._actions}
    theirs = {tuple(a.option_strings): a.default for a in torchrun.get_args_parser()._actions}
    assert ours == theirs


def test_help_says_what_is_different() -> None:
    """--help works and names the exit codes."""
    text = rtrun.parser().format_help()
    assert "resilient_train.elastic" in text
    assert "exit codes" in text
