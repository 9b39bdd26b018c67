"""Thousands of rooms cost no more than their replies."""

import asyncio
import resource
from collections.abc import Iterator

import psutil
import pytest
import support.proxy as faults
from support.bot import eventually
from support.proxy import SEND, SYNC
from support.scripted import field_of


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
