"""What an operator sees: log lines and systemd's notifications."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import support.proxy as faults
from support.bot import ECHOBOT, Bot, eventually, fork, new_bot, together
from support.people import People
from support.proxy import POLL, SEND, SYNC, Proxy
from support.scripted import field_of


async def test_log_has_a_line_for_each_thing_that_happened(people: People, bot: Bot) -> None:
    """One for the login, one for each room joined, one for each command answered; no bodies."""
    await bot.run()
    room = await people.invite()
    await bot.logs("Joined")
    first = await room.command("private matter")
    await room.say("no command")
    second = await room.command("other matter")
    await bot.logs("Answered", times=2)
    assert await bot.stop() == 0
    lines = [re.sub(r"^\d[\d-]+ [\d:]+,\d{3} INFO ", "", line) for line in bot.log.splitlines()]
    assert lines == [
        f"Logged in as {people.bot_id}, device id: ECHOBOT.",
        f"Joined {room.room_id}, invited by {people.alice.user_id}",
        f"Answered {first} in {room.room_id}",
        f"Answered {second} in {room.room_id}",
        "echobot: stopped",
    ]


async def test_trouble_is_logged_when_it_starts_and_when_it_ends(
    people: People, quick_bot: Bot, proxy: Proxy
) -> None:
    """A request that fails takes a line for each new cause and one for its end, not one a try."""
    rooms = [await people.room() for _ in range(5)]
    await quick_bot.run()
    with proxy.inject(faults.bad_gateway, SEND) as gateway:
        for room in rooms:
            await room.command(0, 1, 2)
        await gateway.happens(times=25)
    with (
        proxy.inject(faults.cut_before, SYNC) as sync,
        proxy.inject(faults.cut_before) as connection,
    ):
        await connection.happens(times=15)
        # The first one may have been on an old connection: then aiohttp itself repeats it.
        await sync.happens(times=2)
    for room in rooms:
        assert await room.replies(3) == ["0", "1", "2"]
    await quick_bot.logs("Answered", times=15)
    await quick_bot.logs("No more trouble with the sync")
    told = [re.sub(r"\$\S+", "it", s) for s in quick_bot.log.splitlines() if "rouble with" in s]
    for what in ("the sync", *(f"the reply to it in {room.room_id}" for room in rooms)):
        *begins, end = [line for line in told if what in line]
        # One event of a room is in trouble at a time, for a 502 and then for a cut connection.
        begins = [line for line in begins if "WARNING" in line]
        assert 0 < len(begins) <= 2 * 3
        assert all(line.endswith("; trying again") for line in begins)
        assert "No more trouble" in end


@pytest.fixture(params=["path", "abstract"])
async def messages(
    quick_bot: Bot, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[list[str]]:
    """What comes in where the bot finds systemd, at a path or (@) in Linux's abstract namespace."""
    name = {"path": str(tmp_path / "notify"), "abstract": f"@echobot-{os.getpid()}"}[request.param]
    quick_bot.environment["NOTIFY_SOCKET"] = name
    messages: list[str] = []
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
        unix.bind(re.sub("^@", "\0", name))
        loop.add_reader(unix, lambda: messages.extend(unix.recv(4096).decode().splitlines()))
        yield messages
        loop.remove_reader(unix)


@pytest.mark.speed(60)
async def test_systemd_is_told_what_the_bot_does(
    quick_bot: Bot, proxy: Proxy, messages: list[str]
) -> None:
    """WATCHDOG=1 before each poll, READY=1 once after the first sync that works, STOPPING=1."""
    with proxy.inject(faults.internal_error, SYNC) as failing:
        await quick_bot.start()
        await failing.happens(times=3)
        # Waiting is being alive: it need not be restarted for a homeserver that is down.
        await eventually(lambda: messages.count("WATCHDOG=1") >= 4)
        assert "READY=1" not in messages
    await eventually(lambda: "READY=1" in messages)
    polls = proxy.count(POLL)
    await eventually(lambda: messages.count("WATCHDOG=1") >= polls + 2)
    assert await quick_bot.stop() == 0
    await eventually(lambda: messages[-1] == "STOPPING=1")
    assert messages.count("READY=1") == 1


# Which takes longer to save a position than the homeserver holds a poll.
SLOW_DISK = """
import os, time
def fsync(descriptor, real=os.fsync, sleep=time.sleep):
    sleep(1)
    real(descriptor)
os.fsync = fsync
"""


@pytest.mark.speed(60)
async def test_watchdog_is_fed_though_saves_take_longer_than_polls(
    quick_bot: Bot, messages: list[str]
) -> None:
    """Where each poll is over before the position is saved, systemd is told of each one too."""
    quick_bot.customize = SLOW_DISK
    await quick_bot.run()
    await eventually(lambda: messages.count("WATCHDOG=1") >= 4)


async def test_notifications_that_nobody_reads_hold_nothing_up(tmp_path: Path) -> None:
    """Whether the socket is full, gone or never was there: it answers, and ends when it is told."""

    async def answers(address: str) -> None:
        async with field_of() as field:
            room = field.server.room()
            field.bot.environment["NOTIFY_SOCKET"] = address
            await field.bot.run()
            for n in range(3):
                room.command(n)
                await room.answers(*range(n + 1))
            assert await field.bot.stop() == 0
            assert "WARNING" not in field.bot.log

    full, gone, abstract = tmp_path / "full", tmp_path / "gone", f"@echobot-full-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as at_path,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as in_namespace,
    ):
        for unix, address in ((at_path, str(full)), (in_namespace, re.sub("^@", "\0", abstract))):
            unix.bind(address)
            fill(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.bind(str(gone))
        absent, too_long = tmp_path / "absent", tmp_path / ("x" * 200)
        addresses = (full, abstract, gone, absent, too_long, tmp_path)
        await together(*(answers(str(address)) for address in addresses))


def fill(address: str) -> None:
    """Send messages to a socket until it takes no more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
        unix.setblocking(False)
        while True:
            try:
                unix.sendto(b"full", address)
            except BlockingIOError:
                return


async def test_signals_end_it_at_once_though_nobody_takes_its_log() -> None:
    """The reader of its stderr is gone, the disk that it is on is full, or it was never open.

    Until then commands are answered and positions saved, and the exit status is 0; that of what
    ends by itself is its own.
    """

    async def ends(kind: str, number: int) -> None:
        async with field_of() as field:
            room = field.server.room()
            await start_without_log(field.bot, kind)
            await field.bot.saves()
            before = field.bot.next_batch
            room.command("hello")
            await room.answers("hello")
            await field.bot.saves(other_than=before)
            with field.proxy.inject(faults.bad_gateway, SEND) as fault:  # Which would be logged.
                room.command("more")
                await fault.happens()
                assert await field.bot.send_signal(number) == 0

    async def ends_by_itself(kind: str) -> None:
        async with new_bot("nowhere") as bot:
            await start_without_log(bot, kind)
            assert await bot.wait() == 78

    kinds = ("reader gone", "full", "closed")
    await together(
        *(ends(kind, number) for kind in kinds for number in (signal.SIGTERM, signal.SIGINT)),
        *map(ends_by_itself, kinds),
    )


BLOCKING = """
async def reply_to(event: RoomMessageText) -> None:
    Path(os.environ["STATE_DIRECTORY"], "blocked").touch()
    time.sleep(60)
"""


async def test_signals_end_it_at_once_though_reply_to_blocks() -> None:
    """Though it does not let the loop go on."""
    async with field_of() as field:
        room = field.server.room()
        field.bot.script = fork(field.bot.directory, BLOCKING)
        await field.bot.run()
        room.say("hello")
        await eventually((field.bot.state / "blocked").exists)
        assert await field.bot.send_signal(signal.SIGTERM, seconds=10) == 0


async def start_without_log(bot: Bot, kind: str) -> None:
    """Start the process with a stderr, and stdout, that take nothing."""
    if kind == "closed":
        await bot.start(preexec_fn=partial(os.closerange, 1, 3))
        return
    here, there = os.pipe() if kind == "reader gone" else (None, os.open("/dev/full", os.O_WRONLY))
    if here is not None:
        os.close(here)
    await bot.start(stdout=there, stderr=there)
    os.close(there)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_unit_file_of_the_readme_is_valid(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about it."""
    readme = ECHOBOT.with_name("README.md").read_text()
    (unit,) = re.findall(r"```ini\n(\[Unit\].*?)```", readme, re.DOTALL)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    path = tmp_path / "echobot.service"
    path.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", unit))
    command = ["systemd-analyze", "verify", "--recursive-errors=no", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.returncode == 0
