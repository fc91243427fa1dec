"""What users type: pinned, so that a change is a decision."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

import resilient_train
from resilient_train.interop import dcp
from resilient_train.launch import rtctl, rtrun


def test_public_names() -> None:
    """Nine names; each can be imported from the package."""
    names = [
        "Checkpointer",
        "ElasticSampler",
        "ElasticStream",
        "MicroBatch",
        "State",
        "StreamBatch",
        "World",
        "__version__",
        "elastic",
        "mean_over_tokens",
    ]
    assert resilient_train.__all__ == names
    assert all(getattr(resilient_train, name) is not None for name in names)


def test_what_a_world_offers() -> None:
    """What a training function reads, and the one thing that it can say."""
    names = [name for name in dir(resilient_train.World) if not name.startswith("_")]
    assert names == [
        "data_dims",
        "data_rank",
        "data_size",
        "device",
        "generation",
        "keep",
        "local_rank",
        "local_size",
        "long_operation",
        "mesh",
        "rank",
        "reason",
        "size",
    ]
    said = str(inspect.signature(resilient_train.World.long_operation))
    assert said == "(self, name: 'str', seconds: 'float | None' = None) -> 'AbstractContextManager[None]'"


def test_what_users_of_dcp_import() -> None:
    """Two names."""
    assert dcp.__all__ == ["Reader", "Writer"]
    assert [str(inspect.signature(one)) for one in (dcp.Reader, dcp.Writer)] == [
        "(url: 'str | os.PathLike[str]', *, step: 'int | None' = None) -> 'None'",
        "(url: 'str | os.PathLike[str]', *, step: 'int') -> 'None'",
    ]


def test_importing_the_package_does_not_import_torch() -> None:
    """The keeper and tools start fast."""
    modules = "resilient_train.keeper.keeper, resilient_train.launch.rtctl"
    code = f"import sys, resilient_train, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rtrun_takes_every_flag_of_torchrun() -> None:
    """The same options with the same defaults, and a few of its own."""
    ours = {tuple(a.option_strings): a.default for a in rtrun.parser()._actions}
    theirs = {tuple(a.option_strings): a.default for a in torchrun.get_args_parser()._actions}
    own = {("--detect-within",): 5.0, ("--standby",): 0, ("--patience",): 600.0, ("--label",): []}
    assert ours == theirs | own


def test_help_says_what_is_different() -> None:
    """--help works and names the exit codes."""
    text = rtrun.parser().format_help()
    assert "resilient_train.elastic" in text
    assert "exit codes" in text
    assert "--detect-within" in text


def test_a_label_that_is_none_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started; the line says which there are."""
    with pytest.raises(SystemExit) as end:
        rtrun.main(["--label=rack=r1", "--label", "shelf=7", __file__])
    assert end.value.code == 2
    assert "'shelf=7' is no label: it has to be zone=NAME, rack=NAME, switch=NAME" in capsys.readouterr().err


def test_rtctl_commands_and_options() -> None:
    """Every command with its arguments and their defaults."""
    (commands,) = (a for a in rtctl.parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = {
        name: {" ".join(a.option_strings) or a.metavar: a.default for a in sub._actions if a.dest != "help"}
        for name, sub in commands.choices.items()
    }
    assert found == {
        "ls": {"URL[@STEP]": None, "--json": False},
        "inspect": {"URL[@STEP]": None, "--json": False},
        "verify": {"URL[@STEP]": None, "--all": False, "--json": False},
        "export": {
            "URL[@STEP]": None,
            "--to": None,
            "--part": None,
            "--max-shard-size": "5GB",
            "--force": False,
        },
        "import": {"DIR": None, "--to": None, "--step": None},
        "clean": {"URL": None, "--keep": None, "--yes": False},
        "status": {"--job": "", "--watch": False, "--json": False},
        "drain": {"--job": "", "NODE": None},
        "scale": {"--job": "", "N": None},
    }
    assert "exit codes" in rtctl.parser().format_help()


def test_rtctl_is_a_program(tmp_path: Path) -> None:
    """It runs as a module, and ends with the exit codes it names."""
    command = [sys.executable, "-m", "resilient_train.launch.rtctl"]
    assert subprocess.run([*command, "ls", str(tmp_path)], check=False, capture_output=True).returncode == 0
    assert subprocess.run([*command, "inspect", "/nowhere"], check=False, capture_output=True).returncode == 1
    assert subprocess.run(command, check=False, capture_output=True).returncode == 2
