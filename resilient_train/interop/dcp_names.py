"""Which part of the state each leaf of a DCP state dict belongs to, and how its tensor is called in an image.

DCP flattens a state dict to leaves, each known by its path.  What stands at the top becomes a *part* of the state.  One
that looks like a module (named tensors) or like an optimizer (``get_optimizer_state_dict``) is called and described as
`rt.State` does it, so that `rt.Checkpointer` can restore it; anything else becomes a *stateful* part, a tree of values.
Only names decide, never values: the coordinator names everything before anybody has looked at a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from resilient_train.errors import FormatError

Path = tuple[str | int, ...]

EXTRA = "_extra_state"
FLAT = "model"
"""Name of the part that a state dict without parts (``model.state_dict()``) becomes."""
_RESERVED = ("rng", "")
_LONGEST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One value of a state dict."""

    fqn: str
    """What DCP calls it."""
    path: Path
    """The keys that lead to it within its part."""
    tensor: bool
    """Whether it is a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the state."""

    name: str
    """Its name in the image."""
    prefix: Path
    """The path of its leaves' root in the state dict."""
    kind: str
    """``module``, ``optimizer`` or ``stateful``."""
    leaves: tuple[Leaf, ...]
    """Its leaves, in the order of the state dict."""
    owner: str = ""
    """Of an optimizer: the module part whose parameters it optimises."""
    parameters: frozenset[str] = frozenset()
    """Of an optimizer: the names of that module's tensors."""


def parts_of(paths: Mapping[str, Path], tensors: set[str]) -> list[Part]:
    """The parts of a state dict.

    Args:
        paths: what DCP calls each leaf to the keys that lead to it, in the order of the state dict.
        tensors: which leaves are tensors.
    """
    if paths and all(len(path) == 1 and _in_module(fqn, path, tensors) for fqn, path in paths.items()):
        flat = tuple(Leaf(fqn=fqn, path=path, tensor=fqn in tensors) for fqn, path in paths.items())
        return [Part(name=FLAT, prefix=(), kind="module", leaves=flat)]
    groups: dict[str, list[Leaf]] = {}
    for fqn, path in paths.items():
        groups.setdefault(str(path[0]), []).append(Leaf(fqn=fqn, path=path[1:], tensor=fqn in tensors))
    names = _part_names(groups)
    modules = {
        names[top]: frozenset(str(leaf.path[0]) for leaf in leaves if leaf.tensor)
        for top, leaves in groups.items()
        if not _like_optimizer(leaves) and _like_module(leaves)
    }
    parts = []
    for top, leaves in groups.items():
        owner = _owner(leaves, modules) if _like_optimizer(leaves) else None
        kind = "module" if names[top] in modules else "stateful" if owner is None else "optimizer"
        parts.append(
            Part(
                name=names[top],
                prefix=(top,),
                kind=kind,
                leaves=tuple(leaves),
                owner=owner or "",
                parameters=modules.get(owner or "", frozenset()),
            )
        )
    return parts


def _part_names(tops: Iterable[str]) -> dict[str, str]:
    """A part's name stands before the first slash of its tensors' names, and ``rng`` is taken."""
    names: dict[str, str] = {}
    for top in tops:
        name = top.replace("/", "_")
        while name in _RESERVED or name in names.values():
            name += "_"
        names[top] = name
    return names


def _in_module(fqn: str, path: Path, tensors: set[str]) -> bool:
    name = str(path[0])
    return (fqn in tensors) != (name == EXTRA or name.endswith(f".{EXTRA}"))


def _like_module(leaves: Sequence[Leaf]) -> bool:
    """Named tensors, and perhaps extra states that hold none."""
    tensors = {leaf.fqn for leaf in leaves if leaf.tensor}
    if not tensors or any(not leaf.path or (leaf.tensor and len(leaf.path) > 1) for leaf in leaves):
        return False
    return all(_in_module(leaf.fqn, leaf.path, tensors) for leaf in leaves)


def _like_optimizer(leaves: Sequence[Leaf]) -> bool:
    """The form of ``get_optimizer_state_dict``, nested or (``flatten_optimizer_state_dict``) with joined names."""
    if not all(leaf.path for leaf in leaves):
        return False
    first = {str(leaf.path[0]) for leaf in leaves}
    if first <= {"state", "param_groups"}:
        return "param_groups" in first and all(
            len(leaf.path) > 2 and type(leaf.path[1]) is (int if leaf.path[0] == "param_groups" else str)
            for leaf in leaves
        )
    sections = {(str(leaf.path[0]).partition(".")[0], leaf.tensor) for leaf in leaves}
    may = {("state", True), ("state", False), ("param_groups", False)}
    return ("param_groups", False) in sections and sections <= may and all(joined(leaf) for leaf in leaves)


def joined(leaf: Leaf) -> bool:
    """Whether an optimizer's leaf has the form with joined names."""
    return len(leaf.path) == 1


def split(leaf: Leaf, known: frozenset[str]) -> tuple[str, str, Path] | None:
    """(``state`` or ``param_groups``, the parameter, what follows) of an optimizer's leaf that belongs to a parameter.

    Args:
        leaf: of either form.
        known: names of tensors of the module; in the joined form one of them, the longest that fits, is the parameter.

    Returns:
        None if there is no such parameter, or the leaf is an option of a group as a whole.
    """
    if not joined(leaf):
        name = str(leaf.path[1])
        return ("state", name, leaf.path[2:]) if leaf.path[0] == "state" and name in known else None
    section, _, rest = str(leaf.path[0]).partition(".")
    pieces = rest.split(".")
    for cut in range(len(pieces) - 1, 0, -1):
        name = ".".join(pieces[:cut])
        if name in known:
            return section, name, (".".join(pieces[cut:]),)
    return None


def _owner(leaves: Sequence[Leaf], modules: Mapping[str, frozenset[str]]) -> str | None:
    """The module that has all parameters which the leaves name; the one called ``model`` if there are several."""

    def fits(known: frozenset[str]) -> bool:
        return all(split(leaf, known) for leaf in leaves if joined(leaf) or leaf.path[0] == "state")

    fitting = [name for name, known in modules.items() if fits(known)]
    return FLAT if FLAT in fitting else next(iter(fitting), None)


def entry_name(part: Part, leaf: Leaf) -> str:
    """What a leaf's tensor is called in an image."""
    path = leaf.path
    if part.kind == "optimizer":
        found = split(leaf, part.parameters)
        if found is not None:
            _, parameter, rest = found
            path = (f"{part.owner}.{parameter}", *rest)
        else:
            path = (f"group{leaf.path[1]}", *leaf.path[2:])
    return "/".join(map(str, (part.name, *path)))


class _Node(dict[Any, Any]):
    """What stands between the root and the leaves."""


def nested(leaves: Iterable[tuple[Path, Any]]) -> Any:
    """The tree of dicts and lists that leaves at these paths make up; the inverse of how DCP flattens.

    Raises:
        FormatError: if a path leads through a leaf, or a list has an impossible length.
    """
    root = _Node()
    for path, value in leaves:
        at, key = root, cast("str | int", "")
        for following in path:
            at = at.setdefault(key, _Node())
            if not isinstance(at, _Node):
                raise FormatError(f"{'.'.join(map(str, path))} stands below a value")
            key = following
        at[key] = value
    return _plain(root.get(""))


def _plain(node: Any) -> Any:
    if not isinstance(node, _Node):
        return node
    if not node or not all(type(key) is int for key in node):
        return {key: _plain(value) for key, value in node.items()}
    # Flattening drops empty containers, so an index may be missing.
    if not 0 <= min(node) <= max(node) < _LONGEST:
        raise FormatError(f"a list cannot have the index {max(node)}")
    return [_plain(node.get(index)) for index in range(max(node) + 1)]
