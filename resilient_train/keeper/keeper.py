"""The keeper's event loop: who is connected, which slots there are, and what to let go.

Every method runs on one thread, which waits neither for storage nor for other nodes.  Writing happens in
`resilient_train.keeper.persist`, what concerns other nodes in `resilient_train.keeper.job`.
"""

from __future__ import annotations

import os
import queue
import selectors
import shutil
from collections.abc import Callable, Collection

from resilient_train.clock import Clock
from resilient_train.errors import FormatError, LinkLost
from resilient_train.image.arena import Board
from resilient_train.ipc.channel import Listener
from resilient_train.keeper.backing import Backed, Backing
from resilient_train.keeper.clients import Client
from resilient_train.keeper.job import JobWide
from resilient_train.keeper.saving import Saving
from resilient_train.keeper.shelf import Shelf, is_parity, source_of
from resilient_train.keeper.word import Word
from resilient_train.plan.last import Last
from resilient_train.plan.recovery import Found, complete_keys
from resilient_train.spec.messages import (
    Adopt,
    Allocate,
    Allocated,
    Attach,
    Attached,
    Deposit,
    Discard,
    Flush,
    Flushed,
    Gone,
    Goodbye,
    Images,
    ListImages,
    Message,
    Notice,
    Opened,
    OpenImages,
    Peers,
    Ping,
    Policy,
    Pong,
    Published,
    Refused,
    Save,
    Serve,
    Standing,
    Withdraw,
)
from resilient_train.spec.world import Key

_TICK = 0.25
_FIRST_TIMEOUT = 60.0
"""Seconds to wait for whoever started this keeper."""
_KILLED = (60.0, 20.0)
"""Seconds that a keeper serves other nodes after its agent was killed, and the same while none of them asks."""
_LEFT = (20.0, 3.0)
"""The same after its node has left the job in good order."""
_NOBODY = "nobody"
"""The owner of a slot that its worker gave back while it was still being read."""


class Keeper:
    """Owns the images of a node."""

    def __init__(
        self, listener: Listener, lines: int, linger: float | None, clock: Clock, starter: int | None = None
    ) -> None:
        """Args:
        listener: where workers and the agent connect.
        lines: number of worker slots of the node.
        linger: seconds to live on without workers; None: an agent will come first, and this keeper ends after it.
        clock: the node's clock.
        starter: process id of the agent that will come.
        """
        self._listener = listener
        self._starter = starter
        self._linger = 0.0 if linger is None else linger
        self._had_client = False
        self._scratch = ""
        self._leaves: list[str] = []
        self._early: list[tuple[Client, Message, list[int]]] | None = [] if linger is None else None
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._board_fd = Board.create(lines)
        self.board = Board(self._board_fd)
        self.shelf = Shelf()
        self._inherited: set[str] = set()
        self._clients: list[Client] = []
        self._agent: Client | None = None
        self._had_agent = False
        self._successor = False
        self._flushing: list[Client] = []
        self._flushed = False
        self._alone_since = clock.now()
        self._backing = Backing(self._wake)
        self._word = Word(lambda: self.board.vouched(), clock)
        self._saving = Saving(self.shelf, clock, self._wake, self, self._word)
        self._job = JobWide(self.shelf, lambda: self.board, clock, self)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until nobody needs this keeper any more."""
        while not self._over():
            for key, _ in self._selector.select(_TICK):
                key.data()
            self._tick()
        for folder in [self._scratch] if self._flushed else [self._scratch, *self._leaves]:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _over(self) -> bool:
        if self._clients or self._agent or self._saving.running or self._job.rebuilding:
            return False
        now = self._clock.now()
        if self._had_agent:
            # The agent's end is the job's end if its Flush was answered.  If it was killed, or its node has left,
            # others may be about to restore what is here.
            others = self._job.left_behind if self._flushed else self._job.involved
            longest, unasked = _LEFT if self._flushed else _KILLED
            asked = max(self._alone_since, self._job.asked_at)
            return not others or now >= min(self._alone_since + longest, asked + unasked)
        if self._starter is not None and os.getppid() != self._starter:
            return True  # It died before it came.
        linger = self._linger if self._had_client else _FIRST_TIMEOUT
        return now >= self._alone_since + linger

    def _tick(self) -> None:
        for client in (*self._clients, *([self._agent] if self._agent is not None else [])):
            client.channel.push()
        self._saving.tick()
        self._job.tick(self._saving.busy)
        self._drop_superseded()

    def _wake(self) -> None:
        """From any thread: have the loop look at what is finished."""
        os.write(self._wake_write, b"x")

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: have the loop do something."""
        self._posted.put(action)
        self._wake()

    def _woken(self) -> None:
        os.read(self._wake_read, 4096)
        while not self._posted.empty():
            self._posted.get()()
        for backed in self._backing.finished():
            self._allocated(backed)
        tried = self._saving.outcomes()
        if tried is not None and self._everything_is_here():
            if self._job.together:
                self._job.settled()
            else:
                newest = self._newest_complete()
                if newest is not None and newest > tried:
                    self._persist_newest()
                self._answer_flushes(newest)

    # ---- connections ------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        channel = self._listener.accept()
        if channel is None:
            return
        client = Client(channel)
        self._had_client = True
        self._clients.append(client)
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._read(client))

    def _read(self, client: Client) -> None:
        try:
            for message, descriptors in client.channel.pending():
                self._handle(client, message, descriptors)
        except (LinkLost, FormatError):
            self._forget(client)

    def _forget(self, client: Client) -> None:
        if client is self._agent:
            self._agent = None
            self._word.last = True
            # Nobody is left to ask for it, so make the last state durable unasked.
            self._persist_newest()
        elif client in self._clients:
            self._clients.remove(client)
            self._backing.forget(client.member)
        else:
            return
        self._selector.unregister(client.channel)
        client.channel.close()
        self._flushing = [waiting for waiting in self._flushing if waiting is not client]
        self._flush()
        if not self._clients:
            self._alone_since = self._clock.now()
            if self._agent is None:
                # Workers live on for a moment after their agent; what they finished in it counts too.
                self._persist_newest()
            if not self._had_agent:
                self._linger = 0.0 if client.polite else self._linger

    def answer(self, client: Client, message: Message, descriptors: Collection[int] = ()) -> None:
        """Tell a client."""
        try:
            if client is self._agent and not descriptors:
                # An agent that is stopped (Ctrl-Z) must not stop the workers too.
                client.channel.post(message)
            else:
                client.channel.send(message, list(descriptors))
        except LinkLost:
            self._forget(client)

    def tell_agent(self, message: Message, descriptors: Collection[int] = ()) -> None:
        """Tell the agent, if there is one."""
        if self._agent is not None:
            self.answer(self._agent, message, descriptors)

    def notice(self, kind: str, text: str, *, workers: bool = False) -> None:
        """Say something worth an event; with ``workers``, to them where there is no agent."""
        message = Notice(kind=kind, text=text, at=self._clock.now())
        self.tell_agent(message)
        if workers and self._agent is None:
            for client in list(self._clients):
                try:
                    # A worker that is busy with something else for long must not stop the keeper.
                    client.channel.post(message)
                except LinkLost:
                    self._forget(client)

    def standing_changed(self) -> None:
        """Tell the agent what another keeper would have to know."""
        self.tell_agent(self._saving.standing())

    def attached(self, client: Client) -> bool:
        """Whether a worker is still connected."""
        return client in self._clients

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _handle(self, client: Client, message: Message, descriptors: list[int]) -> None:
        if self._early is not None and not isinstance(message, Adopt):
            # The agent may still hand over an earlier keeper's memory; nobody is served before that.
            self._early.append((client, message, descriptors))
            return
        match message:
            case Attach(member=member, slot=index):
                self._attach(client, member, index)
            case Allocate(size=size, ahead=ahead):
                self._backing.order(client.member, size, ahead)
            case Discard(slot=slot):
                if self._saving.holds(slot):
                    self.shelf[slot].owner = _NOBODY
                else:
                    self.drop(slot)
            case Policy():
                self._saving.set_policy(message)
            case Published():
                self._saving.published(client, message)
            case ListImages(everywhere=everywhere):
                self._list(client, everywhere)
            case OpenImages(slots=wanted):
                there = [slot for slot in wanted if slot in self.shelf][:60]
                self.answer(client, Opened(slots=there), [self.shelf[slot].memory.fd for slot in there])
            case Goodbye():
                client.polite = True
            case Adopt():
                self._adopt(client, message, descriptors)
            case Serve(host=host, secret=secret):
                self.answer(client, self._job.serve(host, secret))
            case Peers():
                self._job.follow(message)
            case Gone(member=member):
                self._inherited.discard(member)
            case Save():
                self._persist_newest()
            case Ping():
                self.answer(client, Pong())
            case Flush():
                self._word.last = True
                self._flushing.append(client)
                self._flush()
            case _:
                pass

    def _attach(self, client: Client, member: str, index: int) -> None:
        client.member = member
        self._inherited.discard(member)
        if index >= self.board.lines:
            self.answer(client, Refused(reason=f"slot {index} of {self.board.lines}"))
            return
        client.index = index
        self.answer(client, Attached(), [self._board_fd])

    def _list(self, client: Client, everywhere: bool) -> None:
        if not everywhere or not self._job.together:
            self.answer(client, Images(images=self.shelf.rows(), peers=[], secret=""))
            return

        def say(peers: list[list[object]], parities: list[list[object]], secret: str) -> None:
            if client in self._clients:
                here = ["", [parity.row() for parity in self.shelf.parities()]]
                images = self.shelf.rows()
                self.answer(client, Images(images=images, peers=peers, secret=secret, parities=[here, *parities]))

        self._job.list(say)

    def _adopt(self, client: Client, message: Adopt, descriptors: list[int]) -> None:
        """The agent introduces itself, with whatever an earlier keeper had left with it."""
        if client in self._clients:
            self._clients.remove(client)
            self._agent = client
            self._had_agent = True
            self._scratch, self._leaves = message.scratch, message.leaves
            self._successor = bool(descriptors)
            if descriptors:
                self.board.close()
                os.close(self._board_fd)
                self._board_fd = descriptors.pop(0)
                self.board = Board(self._board_fd)
            else:
                self.answer(client, Deposit(slot=-1, owner=""), [self._board_fd])
        for (slot, owner), fd in zip(message.slots, descriptors, strict=True):
            self.shelf.add(fd, owner, slot)
            os.close(fd)
            if not source_of(owner) and not is_parity(owner):
                # It may live and be in the middle of a step; it attaches at its next boundary.
                self._inherited.add(owner)
        if message.more:
            return
        if message.standing is not None:
            self._saving.inherit(Standing(**message.standing))
        early, self._early = self._early or [], None
        for item in early:
            self._handle(*item)
        if self._successor:
            # Whatever the keeper before was writing is not written, and the workers will not hand it over again.
            standing = message.standing or {}
            running, ranks = standing.get("running"), standing.get("ranks")
            if running is None or not self._persist_kept(Key(*running), ranks):
                self._persist_newest()

    # ---- slots ------------------------------------------------------------------------------------------------------

    def _allocated(self, backed: Backed) -> None:
        """Memory that was ordered is there, or is not to be had."""
        client = next((client for client in self._clients if client.member == backed.member), None)
        if backed.descriptor < 0:
            if client is not None:
                self.answer(client, Refused(reason=backed.error))
            return
        try:
            slot = self.shelf.add(backed.descriptor, backed.member)
        except OSError as error:
            if client is not None:
                self.answer(client, Refused(reason=f"no shared memory: {error}"))
            return
        finally:
            os.close(backed.descriptor)
        self.deposit(slot)
        memory = self.shelf[slot].memory
        if client is not None:
            self.answer(client, Allocated(slot=slot), [memory.fd])
        if client not in self._clients:
            self.drop(slot)  # The asker never heard of it.

    def deposit(self, slot: int) -> None:
        """Leave a slot with the agent as well."""
        if slot in self.shelf:
            kept = self.shelf[slot]
            self.tell_agent(Deposit(slot=slot, owner=kept.owner), [kept.memory.fd])

    def drop(self, slot: int) -> None:
        """Let go of a slot."""
        if not self._saving.holds(slot) and self.shelf.remove(slot):
            self.tell_agent(Withdraw(slot=slot))

    def _drop_superseded(self) -> None:
        """Images of workers that are gone live until a newer state is complete."""
        living = {client.member for client in self._clients} | self._inherited
        owners = self.shelf.owners()
        orphans = {slot for slot, owner in owners.items() if owner not in living and not self._job.keeps(owner)}
        if not orphans:
            return
        newest = self._job.kept if self._job.shared else self._newest_complete()
        if newest is None:
            return
        keys = self.shelf.keys()
        for slot in orphans:
            if keys[slot] < newest if slot in keys else not self.shelf.locked(slot):
                self.drop(slot)

    def _newest_complete(self) -> Key | None:
        """The newest state of which every rank's image is on this node."""
        found = [
            Found(key=image.stamp.key, rank=image.stamp.rank, world=image.stamp.world) for image in self.shelf.images()
        ]
        keys = complete_keys(found, {})
        return keys[0] if keys else None

    # ---- making the last state durable ------------------------------------------------------------------------------

    def _lines(self) -> set[int]:
        """The board's lines of the workers that are attached."""
        return {client.index for client in self._clients if client.index >= 0}

    def published(self) -> list[Key | None]:
        """The newest state that each attached worker has published."""
        return [self.board.published(line) for line in self._lines()]

    def time_to_persist(self) -> None:
        """Name a step shortly ahead at which all workers hand over their images."""
        if self._job.shared:
            self._job.time_to_persist()
            return
        furthest = max((self.board.progress(line)[1] for line in self._lines()), default=0)
        asked = self.board.persist_at()
        # A step that was passed just now may still be on its way here: its copy ends during the step behind it.
        if asked + 3 < furthest or asked > furthest + 2:
            self.board.ask_to_persist(furthest + 2)

    def _persist_newest(self) -> None:
        """Persist the newest complete state unless that is already durable."""
        if self._saving.policy is None or self._job.left_behind:
            return
        if self._job.together:
            self._job.decide_last(self._decided)
            return
        newest, persisted = self._newest_complete(), self._saving.persisted
        if newest is not None and (persisted is None or newest > persisted) and self._saving.running != newest:
            self._persist_kept(newest)

    def _persist_kept(self, key: Key, ranks: Collection[int] | None = None) -> bool:
        """Persist a state from the images of ``ranks``, or of all if that is not said; whether they are here."""
        images = [image for image in self.shelf.images() if image.stamp.key == key]
        world = max((image.stamp.world for image in images), default=0)
        here = {image.stamp.rank: image.slot for image in images if image.stamp.world == world}
        wanted = ranks or range(world)
        if not set(wanted) <= here.keys():
            return False
        return self._saving.take(key, {rank: here[rank] for rank in wanted}, world)

    def _decided(self, last: Last) -> None:
        """The nodes have agreed on the last state: write this one's part of it."""
        key, persisted = last.key, self._saving.persisted
        wanted = key is not None and (persisted is None or key > persisted) and key != self._saving.running
        begun = wanted and key is not None and self._saving.take(key, last.images, last.world)
        if not begun and key != self._saving.running:
            self._job.settled()

    def settled(self, newest: Key | None) -> None:
        """Every node has decided, and this one has written what it could."""
        if self._flushing and self._everything_is_here():
            self._answer_flushes(newest)

    def _flush(self) -> None:
        """Persist the newest state: at once for an agent; without one, when every worker has nothing more to give."""
        if self._everything_is_here():
            self._persist_newest()
            if self._job.left_behind:
                self._answer_flushes(None)  # The last state is for those to save who go on.
            elif not self._job.together or self._saving.policy is None:
                self._answer_flushes(self._newest_complete())

    def _everything_is_here(self) -> bool:
        """Whether somebody waits for the last state, and it cannot become a newer one."""
        waiting = [client for client in self._clients if client.index >= 0 and client not in self._flushing]
        return bool(self._flushing) and (self._agent in self._flushing or not waiting)

    def _answer_flushes(self, newest: Key | None) -> None:
        if self._saving.running is not None or newest in self._saving.awaited:
            return
        policy, persisted = self._saving.policy, self._saving.persisted
        behind = newest is not None and (persisted is None or persisted < newest)
        text = ""
        if policy is not None and behind:
            durable = f"the newest durable one is {persisted}" if persisted else "none of this job is"
            why = f" ({self._saving.why_not})" if self._saving.why_not else ""
            text = f"the last state ({newest}) could not be made durable in {policy.url}{why}; {durable}"
        images = self.shelf.images()
        if policy is not None and newest is None and not self._job.involved and len({i.stamp.key for i in images}) > 1:
            ranks = sorted({image.stamp.rank for image in images})
            text = f"nothing is durable: of {images[0].stamp.world} ranks only {ranks} have given images to this keeper"
        for client in self._flushing:
            self._flushed = self._flushed or client is self._agent
            self.answer(client, Flushed(text=text))
        self._flushing = []
