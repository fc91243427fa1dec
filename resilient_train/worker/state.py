"""``State``: the named things that make up a training's state, as tensors with boxes and a JSON document, and back.

Reading and writing are symmetric: `capture` walks the things and yields entries; `targets` walks them again, led by the
checkpoint's document, and yields where each tensor's elements belong.  Elements are written into parameters and
optimizer state directly.  What is missing is allocated in the recorded dtype, never made by stepping an optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from resilient_train.errors import FormatError, StateMismatch, UnsupportedState
from resilient_train.image.snapshot import Part
from resilient_train.spec.shard import Entry
from resilient_train.worker import modules, names, optimizers
from resilient_train.worker.capture import Capture, Known, join
from resilient_train.worker.rng import capture_rng
from resilient_train.worker.targets import Targets, built
from resilient_train.worker.tensors import job_cuts


@runtime_checkable
class Stateful(Protocol):
    """Anything that can say and take back its state, made of tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The state at one instant: what a snapshot copies."""

    known: Known
    """The part that was found by walking, for the next frame."""
    parts: tuple[Part, ...]
    """The tensors."""
    document: bytes
    """Everything else, as JSON."""


class State:
    """The things to save, by name.

    Args:
        stateful: modules, optimizers, learning rate schedulers, anything with ``state_dict`` and ``load_state_dict``
            of tensors and JSON values.  RNG states come along by themselves.

    A tensor that is no DTensor is taken as the whole tensor, and one name for the same tensor on all ranks.  Parameters
    and optimizer state of one name must be equal on the ranks of a node, else nothing is made durable, and the error
    names them; where those of different nodes differ it is said, and each node's are saved.  What is a rank's own needs
    a name of its own, ``State(**{f"expert{rank}": expert})``, and is restored on as many ranks only.  Buffers
    (BatchNorm's statistics) and tensors of other objects may differ: each rank finds its own again, and another number
    of ranks the lowest rank's.

    Raises:
        UnsupportedState: if one has neither.

    Example::

        state = rt.State(model=model, optim=optim, schedule=schedule)
    """

    def __init__(self, **stateful: Any) -> None:
        for name, thing in stateful.items():
            if not isinstance(thing, Stateful):
                raise UnsupportedState(f"{name} is a {type(thing).__name__}, without state_dict and load_state_dict")
            if not name or "/" in name or name == "rng":
                raise UnsupportedState(f"a part of the state cannot be called {name!r}")
        if not stateful:
            raise UnsupportedState("a State needs something to save")
        names_of: dict[int, list[str]] = {}
        for name, thing in stateful.items():
            names_of.setdefault(id(thing), []).append(name)
        for same in names_of.values():
            if len(same) > 1:
                raise UnsupportedState(f"{' and '.join(same)} are the same object: save it once")
        self._things: dict[str, Stateful] = dict(stateful)

    def capture(self, rank: int, before: Frame | None = None, *, glance: bool = False) -> Frame:
        """This rank's part of the state as it is now.

        Args:
            rank: this rank.
            before: an earlier frame of the same rank, whose walk is used again if it still holds.
            glance: whether it is enough that it seems to (`Known.seems_to_hold`).

        Raises:
            UnsupportedState: naming what cannot be saved.
        """
        known = before.known if before is not None else None
        if known is None or not (known.seems_to_hold() if glance else known.holds()):
            known = Known(self._walk())
        changing = Capture()
        for name, thing in self._things.items():
            if isinstance(thing, torch.nn.Module):
                changing.document[name] = modules.fresh(thing)
            elif isinstance(thing, torch.optim.Optimizer):
                changing.document[name] = optimizers.fresh(name, thing, changing)
            else:
                changing.document[name] = {"kind": "stateful", "value": changing.encode(thing.state_dict(), name)}
        changing.document["rng"] = capture_rng(rank, changing)
        return Frame(known=known, parts=(*known.capture.parts, *changing.parts), document=join(known, changing))

    def make(self) -> bytes | None:
        """What there is to save, and how it is laid out over the ranks, without any values: equal on ranks that differ
        in nothing but the boxes that they hold; None where a layout is known to its own ranks only."""
        lines = []
        known = self._parameter_names()
        for name, thing in self._things.items():
            lines.append(f"{name} {_kind(thing)} {type(thing).__name__}")
            if isinstance(thing, torch.nn.Module):
                tensors = {**names.parameters(thing), **names.buffers(thing)}
                cuts = {path: job_cuts(path, tensor) for path, tensor in tensors.items()}
                if None in cuts.values():
                    return None
                lines += [f"{path} {list(t.shape)} {t.dtype} {cuts[path]}" for path, t in tensors.items()]
                lines += [f"{alias} = {path}" for alias, path in names.aliases(thing).items()]
            elif isinstance(thing, torch.optim.Optimizer):
                lines += optimizers.parameters(name, thing, known)
        return "\n".join(lines).encode()

    def _walk(self) -> Capture:
        walked = Capture()
        known = self._parameter_names()
        for name, thing in self._things.items():
            if isinstance(thing, torch.nn.Module):
                walked.document[name] = modules.walk(name, thing, walked)
            elif isinstance(thing, torch.optim.Optimizer):
                walked.document[name] = optimizers.walk(name, thing, known, walked)
        return walked

    def targets(self, document: Mapping[str, Any], entries: Mapping[str, Entry], *, partial: bool = False) -> Targets:
        """Where the elements of a checkpoint go, and what else to set.

        Args:
            document: the checkpoint's.
            entries: one entry of every tensor in the checkpoint, for shapes and dtypes.
            partial: whether modules and optimizers of the checkpoint have, besides, what only other ranks have here.

        Raises:
            StateMismatch: if the document describes other things than this state.
            FormatError: if it is malformed.
        """
        here, there = set(self._things), set(document) - {"rng"}
        if here != there:
            raise StateMismatch(
                f"the checkpoint holds {', '.join(sorted(there))}; this state has {', '.join(sorted(here))}"
            )
        targets = Targets()
        known = self._parameter_names()
        try:
            if document.get("rng", ...) is None:
                document = {
                    name: _taken_as(name, thing, document[name], entries) for name, thing in self._things.items()
                }
            for name, thing in self._things.items():
                _check_kind(name, thing, document[name], partial)
            for name, thing in self._things.items():
                if isinstance(thing, torch.nn.Module):
                    modules.add_targets(name, thing, document[name], entries, targets)
                elif isinstance(thing, torch.optim.Optimizer):
                    optimizers.add_targets(name, thing, known, document[name], entries, targets, partial=partial)
                else:
                    value = built(document[name]["value"], name, entries, targets)
                    targets.load(name, thing.load_state_dict, value)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise FormatError(f"malformed document in the checkpoint: {error!r:.500}") from error
        return targets

    def _parameter_names(self) -> dict[int, str]:
        known: dict[int, str] = {}
        for thing_name, thing in self._things.items():
            if isinstance(thing, torch.nn.Module):
                for name, parameter in names.parameters(thing).items():
                    known.setdefault(id(parameter), f"{thing_name}.{name}")
        return known


def _taken_as(
    name: str, thing: Stateful, document: Mapping[str, Any], entries: Mapping[str, Entry]
) -> Mapping[str, Any]:
    """A part that another library saved, of which only names tell what it is: named tensors are not always a module."""
    if _kind(thing) != "stateful" or document["kind"] != "module":
        return document
    value = {f"{where}_extra_state": extra for where, extra in document["extra"].items()}
    for entry in entries:
        if entry.startswith(f"{name}/"):
            value[entry.removeprefix(f"{name}/")] = {"$tensor": entry, "device": "cpu"}
    return {"kind": "stateful", "value": value}


def _check_kind(name: str, thing: Stateful, document: Mapping[str, Any], partial: bool) -> None:
    """The checkpoint's part of this name is of the same kind and shape as ours."""
    kind = _kind(thing)
    if document["kind"] != kind:
        raise StateMismatch(f"{name} is a {kind} here, a {document['kind']} in the checkpoint")
    if isinstance(thing, torch.nn.Module):
        modules.check(name, thing, document, partial)
    elif isinstance(thing, torch.optim.Optimizer):
        optimizers.check(name, thing, document)


def _kind(thing: Stateful) -> str:
    if isinstance(thing, torch.nn.Module):
        return "module"
    return "optimizer" if isinstance(thing, torch.optim.Optimizer) else "stateful"
