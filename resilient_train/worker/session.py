"""``@rt.elastic``: call the user's function, and call it again, in the same process, whenever the world changes."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar, overload

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from resilient_train import config
from resilient_train.errors import ConfigError, ExitCode, LinkLost, PeerFailed
from resilient_train.spec.messages import (
    Acknowledge,
    Boundaries,
    Done,
    Hello,
    Message,
    Resumed,
    Stage,
    Troubled,
    UserFailed,
)
from resilient_train.spec.world import Key, Phase, WorldRecord, node_of, slot_of
from resilient_train.worker.keepsakes import Keepsakes
from resilient_train.worker.link import AgentLink
from resilient_train.worker.operations import LongOperations
from resilient_train.worker.position import write_stacks_when_asked
from resilient_train.worker.process_group import ProcessGroups, is_communication_error, is_device_error
from resilient_train.worker.warmup import rehearse
from resilient_train.worker.world import World, check_mesh, mesh_shape

logger = logging.getLogger(__name__)

GROUP_TIMEOUT = 1800.0
"""Seconds after which a collective fails by itself: torch's own default, and the last resort if an abort is missed."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class LeaveGeneration(BaseException):
    """Leaves the user's function at a step boundary; a BaseException so that ``except Exception`` lets it pass."""


class Session:
    """One worker process's part in an elastic job."""

    def __init__(self, settings: config.Environment, mesh: Mapping[str, int]) -> None:
        """Joins the job.

        Args:
            settings: how this process was started.
            mesh: names and sizes of the mesh's dimensions.
        """
        config.prepare_nccl()
        rehearse(_device(slot_of(settings.member)))
        self.groups = ProcessGroups(GROUP_TIMEOUT)
        multiple = check_mesh(mesh)
        hello = Hello(member=settings.member, multiple=multiple, most=0 if -1 in mesh.values() else multiple)
        self.slot = slot_of(settings.member)
        write_stacks_when_asked()
        self.link = AgentLink(settings.agent, hello, self.groups, on_device=torch.cuda.is_available())
        self.operations = LongOperations(self.tell)
        self._keepsakes = Keepsakes()
        self.record: WorldRecord | None = None
        self.world: World | None = None
        self._on_leave: list[Callable[[], None]] = []
        self._stages: set[str] = set()
        self._finished = False
        # What is alive by now stays alive: later collections need not look at the hundreds of thousands of objects of
        # torch's modules.
        gc.collect()
        gc.freeze()

    # ---- what the checkpointer uses ---------------------------------------------------------------------------------

    def on_leave(self, action: Callable[[], None]) -> None:
        """Have ``action`` called when the current generation is left."""
        self._on_leave.append(action)

    def before_abort(self, action: Callable[[], None] | None) -> None:
        """Have ``action`` called, from any thread, before collectives on devices are aborted."""
        self.groups.before_abort = action

    def stage(self, name: str) -> None:
        """Report once that a stage of recovery is behind this rank."""
        if self.record is not None and name not in self._stages:
            self._stages.add(name)
            self.tell(Stage(generation=self.record.generation, stage=name, at=time.monotonic()))

    def tell(self, message: Message) -> None:
        """Say something to the agent.

        Raises:
            LinkLost: if it is gone; so is this node's part in the job.
        """
        self.link.send(message)

    def begin_steps(self, step: int, last: int) -> None:
        """The script steps through the boundaries from ``step`` to ``last`` from now on."""
        assert self.record is not None
        self.link.begin_steps(step, last)
        self.tell(Boundaries(generation=self.record.generation))

    def resumed(self, lineage: int, source: Key | None, text: str) -> None:
        """Rank 0 tells which state this generation resumes from."""
        assert self.record is not None
        message = Resumed(
            generation=self.record.generation,
            lineage=lineage,
            source=None if source is None else (source.lineage, source.step),
            text=text,
        )
        self.tell(message)

    def reach(self, step: int) -> bool:
        """At the boundary before ``step``; whether a planned change takes place here.

        Raises:
            LeaveGeneration: if the generation has ended by a loss.
        """
        self.leave_if_over()
        return self.link.reach(step)

    def leave_if_over(self) -> None:
        """Raises:
        LeaveGeneration: if the generation has ended by a loss.
        """
        if self.link.over():
            raise LeaveGeneration

    def wait_while(self, condition: Callable[[], bool]) -> None:
        """Wait for ``condition`` to end.

        Raises:
            LeaveGeneration: if the generation has ended by a loss.
            LinkLost: if the agent is gone.
        """
        if self.link.wait_while(condition):
            raise LeaveGeneration

    def leave_at_boundary(self) -> None:
        """Wait for the planned change; returns if it is taken back, leaves the user's function if it is committed."""
        if self.link.wait_at_boundary():
            raise LeaveGeneration

    def goes_on(self) -> bool:
        """Whether the job is neither finished nor failed."""
        heard = self.link.heard()
        return heard is not None and heard.phase is Phase.RUNNING

    def latest(self) -> WorldRecord | None:
        """The record as it is now, if it is still this generation's."""
        heard = self.link.heard()
        same = heard is not None and self.record is not None and heard.generation == self.record.generation
        return heard if same else self.record

    def known_as_elastic(self) -> bool:
        """Whether the record says that the script is elastic, which it does from the job's first restore on."""
        heard = self.link.heard()
        return heard is not None and heard.elastic

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self, function: Callable[[World], _R], mesh: Mapping[str, int], backend: str | None) -> _R:
        """Call ``function`` once per generation until the job is over."""
        if self._finished:
            raise ConfigError("the job has finished: a script calls one elastic function, once")
        while True:
            record = self.link.next_world()
            if record.phase is Phase.FAILED:
                self._end_failed(record)
            if record.phase is Phase.FINISHED:
                # This process was a standby when the others finished; it has no result to give.
                raise SystemExit(ExitCode.SUCCESS)
            self.record = record
            self._stages = set()
            outcome = self._generation(function, record, mesh, backend)
            self._clean_up()
            if outcome:
                self._finished = True
                return outcome[0]

    def _generation(
        self, function: Callable[[World], _R], record: WorldRecord, mesh: Mapping[str, int], backend: str | None
    ) -> tuple[_R] | None:
        """The function's result if the job finished with it; None if another generation follows."""
        try:
            self.tell(Acknowledge(generation=record.generation, at=time.monotonic()))
            self.world = self._form(record, mesh, backend)
            self.stage("formed")
            result = function(self.world)
            self.tell(Done(generation=record.generation))
            verdict = self.link.wait_until_over()
            if verdict.phase is Phase.FAILED:
                self._end_failed(verdict)
            if verdict.phase is Phase.FINISHED:
                return (result,)
            # The function returned, but the others lost a rank before they did: this one is needed again.
            del result
        except LeaveGeneration as leaving:
            _forget(leaving)
        except BaseException as error:
            self._judge(error, record)
            _forget(error)
        self.stage("aborted")
        return None

    def _form(self, record: WorldRecord, mesh: Mapping[str, int], backend: str | None) -> World:
        rank = record.members.index(self.link.member)
        local = [m for m in record.members if node_of(m) == node_of(self.link.member)]
        host, _, port = record.bootstrap.rpartition(":")
        device = _device(self.link.device)
        self.groups.form(
            generation=record.generation,
            rank=rank,
            size=record.size,
            host=host,
            port=int(port),
            backend=backend,
            hosts=self.link.hosts,
            is_over=self.link.over,
        )
        return World(
            rank=rank,
            size=record.size,
            local_rank=local.index(self.link.member),
            local_size=len(local),
            generation=record.generation,
            device=device,
            mesh=init_device_mesh(device.type, mesh_shape(mesh, record.size), mesh_dim_names=tuple(mesh)),
            reason=record.reason,
            _operations=self.operations,
            _keepsakes=self._keepsakes,
        )

    def _judge(self, error: BaseException, record: WorldRecord) -> None:
        """Return if ``error`` only says that the world changed; else tell the job about it and raise it as it is.

        Leaving the function by ``sys.exit`` or Ctrl-C ends the job like any other error: the others cannot go on
        without knowing why.
        """
        if isinstance(error, LinkLost):
            raise error
        if is_device_error(error):
            # The loss of this slot, not an error of the script: the process ends, another takes its place.
            raise error
        rank = record.members.index(self.link.member)
        if is_communication_error(error) or isinstance(error, PeerFailed):
            verdict = self.link.wait_for_verdict(self.link.verdict)
            if verdict is None:
                # Nobody was lost as far as the agents know. All form again, for as long as that helps.
                logger.warning("communication failed, and no loss is known so far", exc_info=error)
                text = f"rank {rank} could not communicate ({type(error).__name__}: {_first_line(error)})"
                self.tell(Troubled(generation=record.generation, text=text))
                verdict = self.link.wait_for_verdict(None)
            if verdict is not None and verdict.phase is Phase.FAILED:
                _forget(error)
                self._end_failed(verdict)
            if verdict is None:
                raise LinkLost("the agent on this node is gone") from None
            return
        text = "".join(traceback.format_exception_only(error)).strip()
        if isinstance(error, SystemExit):
            text = f"the elastic function was left by sys.exit({error.code!r})"
        text = f"rank {rank}: {text}"
        # Before any socket closes: the others' errors are consequences of this one.
        self.tell(UserFailed(generation=record.generation, text=text))
        get_error_handler().record_exception(error)  # torchrun's error file
        raise error

    def _end_failed(self, record: WorldRecord) -> NoReturn:
        self._clean_up()
        rank = self.record.members.index(self.link.member) if self.record else -1
        sys.excepthook = functools.partial(_one_line, rank, sys.excepthook)
        raise PeerFailed(f"the job was ended: {record.error}") from None

    def _clean_up(self) -> None:
        """Drop everything that belonged to the generation."""
        while self._on_leave:
            self._on_leave.pop()()
        self.world = None
        for name in ("last_exc", "last_value", "last_traceback"):
            vars(sys).pop(name, None)
        self.groups.dissolve()
        gc.collect()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _forget(error: BaseException) -> None:
    """Empty the frames that an error holds: they hold the model, and the model holds the old groups."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        pending += [current.__cause__, current.__context__]
        current.__traceback__ = None


def _one_line(
    rank: int, usual: Callable[..., Any], kind: type[BaseException], error: BaseException, *rest: Any
) -> None:
    """Where the error happened its traceback is shown; the other ranks' would only hide it."""
    if isinstance(error, PeerFailed):
        print(f"[rank{rank}] {error}", file=sys.stderr, flush=True)
    else:
        usual(kind, error, *rest)


def _device(slot: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = slot % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


_current: Session | None = None


def current() -> Session | None:
    """This process's session, None outside of an elastic function under an agent."""
    return _current


@overload
def elastic(fn: Callable[_P, _R]) -> Callable[..., _R]: ...
@overload
def elastic(
    fn: None = None, *, mesh: Mapping[str, int] | None = None, backend: str | None = None
) -> Callable[[Callable[_P, _R]], Callable[..., _R]]: ...
def elastic(
    fn: Callable[..., Any] | None = None, *, mesh: Mapping[str, int] | None = None, backend: str | None = None
) -> Callable[..., Any]:
    """Make a training function elastic.

    The function's first argument is a `World`; callers leave it out.  Under ``rtrun`` the function is called again, in
    the same process, whenever the world changes; everything it made must be reachable only from its own frame.  Under
    plain torchrun, srun or in a single process it is simply called once.

    Args:
        fn: ``fn(world, *args, **kwargs)``.
        mesh: names and sizes of the mesh's dimensions, at most one of them elastic (-1). Default ``{"data": -1}``.
        backend: passed to ``torch.distributed.init_process_group``; default: gloo, and NCCL where there are GPUs.

    Returns:
        A function that returns what ``fn`` returned in the generation that finished.

    Raises:
        ConfigError: if ``mesh`` is malformed.
        PeerFailed: (when called) if another rank's own error ended the job.

    Example::

        @rt.elastic
        def train(world: rt.World) -> None: ...

        if __name__ == "__main__":
            train()
    """
    if mesh is not None and not isinstance(mesh, Mapping):
        raise ConfigError(f"mesh must name its dimensions, such as {{'data': -1}}; it is {mesh!r}")
    dims = dict(mesh or {"data": -1})
    check_mesh(dims)
    if fn is None:
        return functools.partial(elastic, mesh=dims, backend=backend)

    if not callable(fn) or inspect.iscoroutinefunction(fn) or inspect.isgeneratorfunction(fn):
        raise ConfigError(f"elastic needs a plain function of a World, it got {fn!r}")

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _current
        settings = config.environment()
        bound = functools.partial(_with_arguments, fn, args, kwargs)
        if not settings.agent:
            return _run_once(bound, settings, dims, backend)
        if _current is None:
            _current = Session(settings, dims)
        return _current.run(bound, dims, backend)

    return call


def _with_arguments(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], world: World) -> Any:
    return fn(world, *args, **kwargs)


def _run_once(
    function: Callable[[World], _R], settings: config.Environment, mesh: Mapping[str, int], backend: str | None
) -> _R:
    """Without an agent: one world, as the launcher made it."""
    device = _device(settings.local_rank)
    mine = not dist.is_initialized()
    if mine and settings.world_size > 1:
        if not settings.master_addr:
            raise ConfigError("WORLD_SIZE is set, but not MASTER_ADDR and MASTER_PORT: where do the ranks meet?")
        dist.init_process_group(backend, rank=settings.rank, world_size=settings.world_size)
    elif mine:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        size = dist.get_world_size()
        world = World(
            rank=dist.get_rank(),
            size=size,
            local_rank=settings.local_rank,
            local_size=settings.local_world_size,
            generation=1,
            device=device,
            mesh=init_device_mesh(device.type, mesh_shape(mesh, size), mesh_dim_names=tuple(mesh)),
            reason="start",
        )
        return function(world)
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()
