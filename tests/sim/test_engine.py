"""Simulated time and the simulated network."""

from __future__ import annotations

from random import Random

import pytest

from resilient_train.sim.engine import DriftingClock, Engine
from resilient_train.sim.network import Connection, End, Network


def test_actions_run_in_order_of_time_then_of_asking() -> None:
    """The order is a function of what was asked, never of anything else."""
    engine, seen = Engine(), list[str]()
    engine.at(2.0, lambda: seen.append("later"))
    engine.at(1.0, lambda: seen.append("first"))
    engine.at(1.0, lambda: seen.append("second"))
    engine.run(1.5, lambda: False)
    assert seen == ["first", "second"]
    assert engine.now == 1.0


def test_clocks_drift_apart() -> None:
    """A timer of a slow clock fires late for the others."""
    engine, seen = Engine(), list[float]()
    slow = DriftingClock(engine, 100.0, 0.5)
    slow.at(101.0, lambda: seen.append(engine.now))
    engine.run(10.0, lambda: False)
    assert seen == [2.0]
    assert slow.now() == 101.0


def wire() -> tuple[Engine, Network, Connection, list[str]]:
    engine, heard = Engine(), list[str]()
    network = Network(engine, Random(1))
    return engine, network, Connection(network, End("a", lambda _: None), End("b", heard.append)), heard


def test_nothing_overtakes_within_a_connection() -> None:
    """However long each packet takes, words come in the order in which they were said."""
    engine, _, connection, heard = wire()
    for number in range(50):
        connection.send(0, str(number))
    engine.run(10.0, lambda: False)
    assert heard == [str(number) for number in range(50)]


@pytest.mark.parametrize("way", [("a", "b"), ("b", "a")])
def test_a_cut_in_one_direction_holds_back_that_direction_only(way: tuple[str, str]) -> None:
    """What was said across a cut arrives once it is healed."""
    engine, network, connection, heard = wire()
    network.cut(*way)
    connection.send(0, "word")
    engine.run(10.0, lambda: False)
    assert heard == ([] if way == ("a", "b") else ["word"])
    network.heal(*way)
    engine.run(20.0, lambda: False)
    assert heard == ["word"]


def test_the_dead_say_nothing_and_who_hangs_up_is_heard() -> None:
    """A host without power is silent; a process that ends is not."""
    engine, network, connection, heard = wire()
    connection.close(0)
    engine.run(1.0, lambda: False)
    assert heard == [""]
    engine, network, connection, heard = wire()
    network.dead.add("a")
    connection.close(0)
    engine.run(1.0, lambda: False)
    assert heard == []
