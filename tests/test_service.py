"""What an operator sees: log lines and systemd's notifications."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import support.proxy as faults
from support.bot import ECHOBOT, Bot, eventually
from support.homeserver import User
from support.people import People
from support.proxy import POLL, SEND, SYNC, Proxy

TIMESTAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "


async def test_log_has_a_line_for_each_thing_that_happened(
    people: People, alice: User, bot: Bot
) -> None:
    """One for the login, one for each room joined, one for each command answered; no bodies."""
    await bot.run()
    room = await people.invite()
    await bot.logs("Joined")
    first = await room.command("private matter")
    await room.say("no command")
    second = await room.command("other matter")
    await bot.logs("Answered", times=2)
    assert await bot.stop() == 0
    lines = [re.sub(f"^{TIMESTAMP}INFO ", "", line) for line in bot.log.splitlines()]
    assert lines == [
        f"Logged in as {people.bot_id}, device id: ECHOBOT.",
        f"Joined {room.room_id}, invited by {alice.user_id}",
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
        await sync.happens()
    for room in rooms:
        assert await room.replies(3) == ["0", "1", "2"]
    await quick_bot.logs("Answered", times=15)
    await quick_bot.logs("No more trouble with the sync")
    told: dict[str, list[str]] = defaultdict(list)
    for line in quick_bot.log.splitlines():
        if match := re.search("(WARNING T|INFO No more t)rouble with ([^:]*)", line):
            told[re.sub(r"\$\S+", "an event", match[2])].append(line)
    replies = {f"the reply to an event in {room.room_id}" for room in rooms}
    assert set(told) == {"the sync", *replies}
    for lines in told.values():
        # One event of a room is in trouble at a time, for a 502 and then for a cut connection.
        assert len([line for line in lines if "WARNING" in line]) <= 2 * 3
        assert all(line.endswith("; trying again") for line in lines if "WARNING" in line)
        assert "No more trouble" in lines[-1]


class Systemd:
    """The socket of systemd's notify protocol, and what came in."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.messages: list[str] = []

    def read(self) -> None:
        """Take in a message."""
        self.messages += self.socket.recv(4096).decode().splitlines()

    async def gets(self, state: str, times: int = 1) -> None:
        """Wait until that message has come so often."""
        what = f"{times} {state} in {self.messages}"
        await eventually(lambda: self.messages.count(state) >= times, what=what)


@pytest.fixture(params=["path", "abstract"])
async def systemd(
    quick_bot: Bot, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Systemd]:
    """What the bot takes for systemd, at a path or (with @) in Linux's abstract namespace."""
    name = {"path": str(tmp_path / "notify"), "abstract": f"@echobot-{os.getpid()}"}[request.param]
    systemd = Systemd(re.sub("^@", "\0", name))
    asyncio.get_running_loop().add_reader(systemd.socket, systemd.read)
    quick_bot.environment["NOTIFY_SOCKET"] = name
    yield systemd
    asyncio.get_running_loop().remove_reader(systemd.socket)
    systemd.socket.close()


async def test_systemd_is_told_what_the_bot_does(
    quick_bot: Bot, proxy: Proxy, systemd: Systemd
) -> None:
    """WATCHDOG=1 before each poll, READY=1 once after the first sync that works, STOPPING=1."""
    with proxy.inject(faults.internal_error, SYNC) as failing:
        await quick_bot.start()
        await failing.happens(times=3)
        # Waiting is being alive: it need not be restarted for a homeserver that is down.
        await systemd.gets("WATCHDOG=1", times=4)
        assert "READY=1" not in systemd.messages
    await systemd.gets("READY=1")
    polls = proxy.count(POLL)
    await systemd.gets("WATCHDOG=1", times=polls + 2)
    assert await quick_bot.stop() == 0
    await systemd.gets("STOPPING=1")
    assert systemd.messages[-1] == "STOPPING=1"
    assert systemd.messages.count("READY=1") == 1


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
