"""Several models behind one address, with made-up engines: who is loaded, who has to go, and that nobody is lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from mooli.errors import CheckpointError, ModelsInUseError, OutOfMemoryError
from mooli.server.model_set import ModelSet


class Machine:
    """Has room for so much; each model takes its size."""

    def __init__(self, room=10, sizes=None):
        self.room = room
        self.sizes = sizes or {}
        self.held = {}
        self.loads = []
        self.gate = None
        self.fails = {}

    async def load(self, name):
        self.loads.append(name)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if name in self.fails:
            raise self.fails[name]
        size = self.sizes.get(name, 1)
        if sum(self.held.values()) + size > self.room:
            raise OutOfMemoryError(f"{name} takes {size}")
        assert name not in self.held, "loaded twice"
        self.held[name] = size
        return Engine(self, name)


class Engine:
    def __init__(self, machine, name):
        self.machine, self.name, self.is_alive = machine, name, True

    async def close(self):
        self.is_alive = False
        await asyncio.sleep(0)
        self.machine.held.pop(self.name, None)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_a_model_is_loaded_once_for_all_who_come_and_whoever_leaves():
    async def scenario():
        machine = Machine()
        machine.gate = asyncio.Event()
        models = ModelSet(("a", "b"), machine.load)

        async def use():
            async with models.lease("a") as engine:
                return engine.name

        users = [asyncio.ensure_future(use()) for _ in range(5)]
        await asyncio.sleep(0)
        users[0].cancel()  # who began it leaves
        await asyncio.sleep(0)
        machine.gate.set()
        assert await asyncio.gather(*users[1:]) == ["a"] * 4
        assert machine.loads == ["a"]
        assert list(models.loaded) == ["a"] and models.num_users == 0
        with pytest.raises(KeyError):
            async with models.lease("c"):
                pass
        await models.close()
        assert not machine.held

    run(scenario())


def test_the_model_that_was_idle_for_longest_makes_room():
    async def scenario():
        machine = Machine(room=2)
        models = ModelSet(("a", "b", "c"), machine.load)
        for name in ("a", "b", "a", "c"):
            async with models.lease(name):
                pass
        assert sorted(machine.held) == ["a", "c"]
        async with models.lease("a"), models.lease("c"):
            with pytest.raises(ModelsInUseError, match=r"a, c are in use.*no memory for b"):
                async with models.lease("b"):
                    pass
        async with models.lease("b"):
            assert "b" in machine.held
        await models.close()

    run(scenario())


def test_a_model_that_fits_nowhere_and_one_that_is_broken_say_so_and_leave_the_others():
    async def scenario():
        machine = Machine(room=2, sizes={"huge": 9})
        machine.fails["broken"] = CheckpointError("no good")
        models = ModelSet(("a", "huge", "broken"), machine.load)
        async with models.lease("a"):
            pass
        for _ in range(2):
            with pytest.raises(CheckpointError, match="no good"):
                async with models.lease("broken"):
                    pass
        assert list(models.loaded) == ["a"]
        with pytest.raises(OutOfMemoryError):  # the others have made room in vain
            async with models.lease("huge"):
                pass
        async with models.lease("a"):
            pass
        await models.close()

    run(scenario())


def test_no_more_than_so_many_at_a_time():
    async def scenario():
        machine = Machine()
        models = ModelSet(("a", "b"), machine.load, most=1)
        for name in ("a", "b", "a"):
            async with models.lease(name):
                assert list(machine.held) == [name]
        assert machine.loads == ["a", "b", "a"]
        await models.close()

    run(scenario())


def test_an_engine_that_died_is_loaded_anew():
    async def scenario():
        machine = Machine()
        models = ModelSet(("a",), machine.load)
        async with models.lease("a") as engine:
            engine.is_alive = False
            assert models.loaded == {}
        async with models.lease("a") as engine:
            assert engine.is_alive
        assert machine.loads == ["a", "a"]
        await models.close()

    run(scenario())


def test_idle_ones_are_ended_and_used_ones_are_not():
    async def scenario():
        machine = Machine()
        models = ModelSet(("a", "b"), machine.load, idle_s=0.01)
        ending = asyncio.ensure_future(models.end_idle_ones())
        async with models.lease("a"):
            async with models.lease("b"):
                pass
            while "b" in machine.held:
                await asyncio.sleep(0.005)
            assert list(machine.held) == ["a"]
        while machine.held:
            await asyncio.sleep(0.005)
        ending.cancel()
        await models.close()

    run(scenario())


def test_closing_ends_what_is_being_loaded():
    async def scenario():
        machine = Machine()
        machine.gate = asyncio.Event()
        models = ModelSet(("a",), machine.load)

        async def use():
            async with models.lease("a"):
                pass

        user = asyncio.ensure_future(use())
        await asyncio.sleep(0.001)
        await models.close()
        with pytest.raises(asyncio.CancelledError):
            await user
        assert not machine.held

    run(scenario())


@pytest.mark.parametrize("seed", range(20))
def test_at_random_memory_is_kept_to_and_everybody_is_answered(seed):
    async def scenario():
        rng = random.Random(seed)
        names = tuple("abcde")
        machine = Machine(room=rng.randrange(2, 6), sizes={name: rng.randrange(1, 3) for name in names})
        models = ModelSet(names, machine.load, idle_s=rng.choice([None, 0.002]), most=rng.choice([None, 2]))
        ending = asyncio.ensure_future(models.end_idle_ones())
        served = refused = 0

        async def use(name):
            nonlocal served, refused
            await asyncio.sleep(rng.random() * 0.02)
            try:
                async with models.lease(name) as engine:
                    assert engine.name == name and machine.held.get(name)
                    assert sum(machine.held.values()) <= machine.room
                    await asyncio.sleep(rng.random() * 0.002)
                    if rng.random() < 0.1:
                        engine.is_alive = False  # dies in use
                    elif rng.random() < 0.1:
                        raise asyncio.CancelledError  # the client leaves
                    served += 1
            except ModelsInUseError:
                refused += 1

        await asyncio.gather(*(use(rng.choice(names)) for _ in range(60)), return_exceptions=True)
        assert served > 0 and models.num_users == 0
        ending.cancel()
        await models.close()
        assert not machine.held

    run(scenario())
