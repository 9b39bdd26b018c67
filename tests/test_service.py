"""What an operator sees: log lines, systemd's notifications, and the unit file in the README."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import pytest
import support.proxy as faults
from conftest import People
from support.bot import Bot, eventually, fork, new_bot
from support.homeserver import User
from support.proxy import Proxy

README = Path(__file__).parent.parent / "README.md"
TIMESTAMP = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3})Z "


async def test_log_has_a_line_for_each_thing_that_happened(
    people: People, alice: User, bot: Bot
) -> None:
    """One for the login, one for each room joined, one for each command answered; no bodies."""
    await bot.run()
    room_id = await alice.create_room(people.bot_id)
    await bot.logs("Joined")
    first = await alice.send(room_id, "!replybot private matter")
    await alice.send(room_id, "no command")
    second = await alice.send(room_id, "!replybot other matter")
    await bot.logs("Answered", times=2)
    assert await bot.stop() == 0
    device_id = bot.session["device_id"]
    expected = [
        f"Logged in as {people.bot_id}, device id: {device_id}.",
        f"Joined {room_id}, invited by {alice.user_id}",
        f"Answered {first} in {room_id} after N ms",
        f"Answered {second} in {room_id} after N ms",
    ]
    lines = [re.sub(r"\d+ ms$", "N ms", line) for line in bot.log.splitlines()]
    assert [re.sub(f"^{TIMESTAMP}INFO ", "", line) for line in lines] == expected


async def test_trouble_is_logged_when_it_starts_and_when_it_ends(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """With replies pending in five rooms and no connection, it takes a few lines, not hundreds."""
    rooms = [await people.room_with_bot(alice) for _ in range(5)]
    proxied_bot.script = fork(proxied_bot.directory, SYNC_TIMEOUT=2000)
    await proxied_bot.run()
    before = len(proxied_bot.log.splitlines())
    with proxy.inject(faults.bad_gateway, faults.SEND) as gateway:
        for room_id in rooms:
            for n in range(3):
                await alice.send(room_id, f"!replybot {n}")
        await eventually(lambda: happened(gateway, 10))
    with proxy.inject(faults.cut_before) as connection:
        await eventually(lambda: happened(connection, 10))
    for room_id in rooms:
        assert await people.replies(alice, room_id, 3) == ["0", "1", "2"]
    await proxied_bot.logs("Answered", times=15)
    await proxied_bot.logs("No more trouble")
    lines = proxied_bot.log.splitlines()[before:]
    trouble = [line for line in lines if "Answered" not in line]
    assert f"WARNING Trouble with {proxy.url}: HTTP 502" in trouble[0]
    assert f"INFO No more trouble with {proxy.url}" in trouble[-1]
    assert "No more trouble" not in "".join(trouble[:-1])
    assert len(trouble) <= 5


async def happened(injection: faults.Injection, times: int) -> bool:
    """Tell whether a fault has happened so often."""
    return injection.happened >= times


async def test_timestamps_are_utc(bot: Bot) -> None:
    """They are, whatever the time zone of the machine, and say so with a Z."""
    bot.environment["TZ"] = "Asia/Tokyo"
    await bot.run()
    match = re.match(TIMESTAMP, bot.log)
    assert match
    logged = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc)
    assert abs(datetime.now(timezone.utc) - logged) < timedelta(minutes=5)


@pytest.mark.parametrize(("inode", "pattern"), [(0, "INFO "), (1, TIMESTAMP + "INFO ")])
async def test_timestamps_are_left_to_the_journal(bot: Bot, inode: int, pattern: str) -> None:
    """They are left out exactly if JOURNAL_STREAM names the file that stderr is."""
    bot.log_path.touch()
    stderr = bot.log_path.stat()
    bot.environment["JOURNAL_STREAM"] = f"{stderr.st_dev}:{stderr.st_ino + inode}"
    await bot.run()
    for line in bot.log.splitlines():
        assert re.match(pattern, line)


class Systemd:
    """The socket of systemd's notify protocol, and what came in, with the time of arrival."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.messages: list[tuple[float, str]] = []

    def read(self) -> None:
        """Take in a message."""
        self.messages.append((time.monotonic(), self.socket.recv(4096).decode()))

    def times(self, state: str) -> list[float]:
        """Return when messages that start so have come."""
        return [at for at, message in self.messages if message.startswith(state)]

    async def gets(self, state: str, times: int = 1) -> None:
        """Wait until messages that start so have come so often."""

        async def came() -> bool:
            return len(self.times(state)) >= times

        await eventually(came, what=f"{times} {state} in {self.messages}")


@pytest.fixture
async def systemd(proxied_bot: Bot, tmp_path: Path) -> AsyncIterator[Systemd]:
    """What the bot takes for systemd, with a watchdog that wants to hear of it every 2 s."""
    systemd = Systemd(tmp_path / "notify")
    asyncio.get_running_loop().add_reader(systemd.socket, systemd.read)
    proxied_bot.environment |= {
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "2000000",
    }
    yield systemd
    asyncio.get_running_loop().remove_reader(systemd.socket)
    systemd.socket.close()


async def test_systemd_is_told_ready_after_the_first_sync(
    proxied_bot: Bot, proxy: Proxy, systemd: Systemd
) -> None:
    """READY=1 does not come while only the login has worked, and comes once."""
    with proxy.inject(faults.internal_error, faults.SYNC) as failing:
        await proxied_bot.start()
        await eventually(lambda: happened(failing, 3))
        assert systemd.times("READY=1") == []
    await systemd.gets("READY=1")
    await systemd.gets("WATCHDOG=1", times=3)
    assert len(systemd.times("READY=1")) == 1


async def test_systemd_is_told_the_status_and_the_stop(
    people: People, alice: User, proxied_bot: Bot, systemd: Systemd
) -> None:
    """STATUS= has how many were answered and when the last sync was; STOPPING=1 is last."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    await alice.send(room_id, "!replybot one")
    await people.replies(alice, room_id, 1)
    await alice.send(room_id, "!replybot two")
    await people.replies(alice, room_id, 2)
    today = datetime.now(timezone.utc).strftime("%Y-%m")
    await systemd.gets(f"STATUS=Answered 2, last sync at {today}")
    assert await proxied_bot.stop() == 0
    await systemd.gets("STOPPING=1")
    assert systemd.messages[-1][1] == "STOPPING=1"


async def test_watchdog_is_fed_while_the_homeserver_is_away(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, systemd: Systemd
) -> None:
    """Waiting is being alive, at the start and later; no gap is longer than the watchdog allows."""
    room_id = await people.room_with_bot(alice)
    with proxy.inject(faults.cut_before) as at_the_start:
        await proxied_bot.start()
        await systemd.gets("WATCHDOG=1", times=4)
    await proxied_bot.ready()
    with proxy.inject(faults.cut_before) as later:
        await alice.send(room_id, "this ends the poll under way")
        await eventually(lambda: happened(later, 1))
        fed = len(systemd.times("WATCHDOG=1"))
        await systemd.gets("WATCHDOG=1", times=fed + 4)
    assert at_the_start.happened
    times = systemd.times("WATCHDOG=1")
    assert max(b - a for a, b in pairwise(times)) < 2


async def test_watchdog_is_not_fed_by_a_blocked_bot(
    people: People, alice: User, proxied_bot: Bot, systemd: Systemd
) -> None:
    """A reply_to that holds up the whole process is seen by systemd, which would restart it."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.script = fork(
        proxied_bot.directory,
        "async def reply_to(event: RoomMessageText) -> str | None:\n"
        "    time.sleep(5)\n"
        "    return 'awake'\n",
    )
    await proxied_bot.start()
    await systemd.gets("WATCHDOG=1", times=2)
    await alice.send(room_id, "sleep")
    assert await people.replies(alice, room_id, 1) == ["awake"]
    await systemd.gets("WATCHDOG=1", times=len(systemd.times("WATCHDOG=1")) + 1)
    times = systemd.times("WATCHDOG=1")
    assert max(b - a for a, b in pairwise(times)) > 4


async def test_abstract_notify_socket_is_reached(
    people: People, systemd: Systemd, tmp_path: Path
) -> None:
    """An address that starts with @ is one in Linux's abstract namespace."""
    name = f"echobot-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        environment = {"MATRIX_USER": people.bot_id, "NOTIFY_SOCKET": f"@{name}"}
        async with new_bot(people.homeserver.url, **environment) as bot:
            await bot.run()
            received = await asyncio.to_thread(receiver.recv, 4096)
    assert re.match(r"STATUS=|READY=1", received.decode())


def unit_file() -> str:
    """Return the unit file that the README shows."""
    (unit,) = re.findall(r"```ini\n(\[Unit\].*?)```", README.read_text(), re.DOTALL)
    assert isinstance(unit, str)
    return unit


def test_unit_file_of_the_readme_is_hardened_and_restarts() -> None:
    """It has what the bot counts on, and every exit status that a restart does not mend is left."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(unit_file())
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2 77 78"
    assert int(service["WatchdogSec"]) >= 60
    assert service["ExecStart"].endswith("/echobot.py")
    assert service["StateDirectory"] == "echobot"
    assert service["EnvironmentFile"].startswith("/etc/")
    assert service["TimeoutStartSec"] == "infinity"
    for hardening in ("DynamicUser", "NoNewPrivileges", "PrivateDevices"):
        assert service[hardening] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert "0600" in README.read_text()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_unit_file_of_the_readme_is_valid(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about it."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "echobot.service"
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", unit_file()))
    command = ["systemd-analyze", "verify", "--recursive-errors=no", str(unit)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.returncode == 0
