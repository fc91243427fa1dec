"""The layout is the architecture: imports point downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "resilient_train"
LAYERS = [
    {"errors"},
    {"config", "clock", "events"},
    {"spec"},
    {"plan"},
    # Runs plan under a manual clock.
    {"sim"},
    {"control", "ipc", "image", "storage"},
    {"agent", "keeper", "worker", "tools", "testing"},
    # Needs what the worker knows of names and dtypes and what the tools know of images; only a command line needs it.
    {"interop"},
    {"launch"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PURE = {"spec", "plan", "sim"}
# All that decisions may use: no clock, IO, threads, torch or hidden randomness is among it.
ALLOWED = {"__future__", "bisect", "collections", "dataclasses", "enum", "heapq", "itertools", "json", "math", "re"}
ALLOWED |= {"resilient_train", "typing"}
# A simulation is a function of its seed: of the `Random` that it is given.
ALSO = {"sim": {"random"}}
COMMANDS = {"sim/__main__.py"}
# Late at its one edge: the extension, which may not be built; what an extra installs; what needs torch, of a command
# line or a plug-in that do not.
LATE = {
    ("control", "resilient_train.control.etcd"),
    ("control", "resilient_train.control.own_etcd"),
    ("control", "resilient_train.control.torchelastic"),
    ("image", "resilient_train"),
    ("launch", "resilient_train.interop"),
    ("storage", "aiobotocore"),
    ("storage", "botocore"),
}
# Pickles that others wrote, read by unpicklers that call nothing: here, and nowhere else.
UNPICKLES = {"interop/dcp_folder.py": {"pickle"}, "interop/dcp_items.py": {"torch.load"}}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.module or "", node.lineno)] if node.module != "resilient_train" else [(n, 0) for n in names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    """A module imports from its own package and from lower layers, never sideways or up."""
    mine = package(path)
    for name, line in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "resilient_train" or len(parts) < 2 or parts[1] == "_native":
            continue
        other = parts[1]
        assert other == mine or LEVEL[other] < LEVEL[mine], f"{path}:{line} imports {name}"


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if package(p) in PURE and str(p.relative_to(ROOT)) not in COMMANDS],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_pure_layers_have_no_clock_io_threads_or_torch(path: Path) -> None:
    """Decisions can be replayed: whatever they depend on is passed in."""
    used = {name.split(".")[0] for name, _ in imports(ast.parse(path.read_text()))}
    assert used <= ALLOWED | ALSO.get(package(path), set())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_at_the_top(path: Path) -> None:
    """Only what may be missing, or not there yet, is imported inside of a function."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for name, _ in imports(function):
                assert any(package(path) == p and name.startswith(n) for p, n in LATE), f"{path}: {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    """os.environ belongs to config.py."""
    if path.name != "config.py":
        assert "os.environ" not in path.read_text()
        assert "os.getenv" not in path.read_text()


def test_no_module_is_too_long() -> None:
    """A module fits in a head."""
    assert {str(p): n for p in modules() if (n := len(p.read_text().splitlines())) > 600} == {}


def test_nothing_is_pickled() -> None:
    """Data from disk or from another process is never executed."""
    for path in modules():
        text, may = path.read_text(), UNPICKLES.get(str(path.relative_to(ROOT)), set())
        used = {name.split(".")[0] for name, _ in imports(ast.parse(text))}
        assert not used & {"pickle", "marshal", "shelve", "dill", "cloudpickle"} - may, path
        assert "pickle.load" not in text, path
        loads = [line for line in text.splitlines() if "torch.load(" in line]
        assert not loads or ("torch.load" in may and all("weights_only=True" in line for line in loads)), path
