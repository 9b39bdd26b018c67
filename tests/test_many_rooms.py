"""Thousands of rooms, and of events, cost no more than their replies."""

import asyncio
import resource
from collections.abc import Iterator

import psutil
import pytest
import support.proxy as faults
from support.bot import eventually
from support.proxy import JOIN, SEND, SYNC
from support.scripted import ALICE, field_of


@pytest.fixture
def open_files() -> Iterator[None]:
    """As many as this process may have: the bot, its proxy and the homeserver are connected."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_commands_in_many_rooms_at_once(open_files: None) -> None:
    """Of 1,200 that come with one sync, all are answered with 1,024 files; 100 rooms hang first."""
    async with field_of() as field:
        rooms = [field.server.room() for _ in range(1200)]
        await field.bot.start(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        )
        await field.bot.ready()
        assert field.bot.process is not None
        process, most = psutil.Process(field.bot.process.pid), 0
        before = process.num_fds()
        until = asyncio.Event()
        with field.proxy.inject(faults.hold(until.wait), SEND, times=100) as hanging:
            for room in rooms:
                room.command("hello")
            while sum(bool(room.replies) for room in rooms) < 1100:
                most = max(most, process.num_fds() - before)
                await asyncio.sleep(0.05)
            assert hanging.happened == 100
            until.set()
        await eventually(lambda: all(room.replies == ["hello"] for room in rooms), 30)
        assert 100 < most <= 512
        assert "Too many open files" not in field.bot.log


async def test_invitations_to_many_rooms_whose_joins_hang(open_files: None) -> None:
    """400 at once hold up no other room and take no more files; in the end all are followed."""
    async with field_of() as field:
        other, *rooms = [field.server.room("leave") for _ in range(401)]
        other.set_membership("join")
        await field.bot.start(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        )
        await field.bot.ready()
        assert field.bot.process is not None
        process, until = psutil.Process(field.bot.process.pid), asyncio.Event()
        before = process.num_fds()
        with field.proxy.inject(faults.hold(until.wait), JOIN) as hanging:
            for room in rooms:
                room.set_membership("invite", ALICE)
            await hanging.happens(times=300)
            other.command("hello")
            await other.answers("hello")
            assert 300 <= process.num_fds() - before <= 512
            until.set()
        await eventually(lambda: all(room.membership == "join" for room in rooms), 30)
        assert "Too many open files" not in field.bot.log


async def test_restart_in_many_rooms_reads_little(open_files: None) -> None:
    """Where nothing is new in 200 rooms, the first polls of a start take less than 5 kB."""
    async with field_of() as field:
        rooms = [field.server.room() for _ in range(200)]
        for _ in range(2):
            before = field.proxy.bytes_to_bot
            syncs = field.proxy.count(SYNC)
            await field.bot.run()
            await field.proxy.counts(SYNC, syncs + 2)
            assert field.proxy.bytes_to_bot - before < 5000
            await field.bot.kill()
        rooms[0].command("hello")
        await field.bot.start()
        await rooms[0].answers("hello")


async def test_events_are_not_remembered_for_ever() -> None:
    """Memory does not grow with what was said, here with event IDs of 10 kB each."""
    long = "x" * 10_000
    used: list[float] = []
    async with field_of(speed=20) as field:
        room = field.server.room()
        await field.bot.run()
        assert field.bot.process is not None
        for n in range(60):
            for _ in range(75):
                room.say("nothing to answer")
                room.events[-1][1]["event_id"] += long
            room.command(n)
            await room.answers(*range(n + 1))
            used.append(psutil.Process(field.bot.process.pid).memory_info().rss / 1e6)
    # 40 times 75 events: their IDs are 30 MB.
    assert used[-1] - used[20] < 12


async def test_room_that_hangs_is_no_memory_leak() -> None:
    """What is said in a room whose reply hangs, 60 MB here, is read again when it is due."""
    async with field_of() as field:
        room, other = [field.server.room() for _ in range(2)]
        await field.bot.run()
        assert field.bot.process is not None
        process, until = psutil.Process(field.bot.process.pid), asyncio.Event()
        with field.proxy.inject(faults.hold(until.wait), SEND, times=1) as hanging:
            room.command("first")
            await hanging.happens()
            before = process.memory_info().rss / 1e6
            for n in range(30):
                room.say(*["x" * 20_000] * 100)
                other.command(n)
                await other.answers(*range(n + 1))
            assert process.memory_info().rss / 1e6 - before < 50
            room.command("last")
            until.set()
        await room.answers("first", "last")
