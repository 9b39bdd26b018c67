"""Whatever the state directory holds, and whether it can be written or not, the bot answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support.proxy as faults
from conftest import People
from support.bot import Bot, eventually, fork
from support.homeserver import User
from support.proxy import Proxy

# Runs in the bot's process before anything else: the wall clock goes wrong by what a file says.
WRONG_CLOCK = """
import time
right = time.time
time.time = lambda: right() + float(open({path!r}).read())
"""
# Notes in a file, in order, what is written through to the disk and what is renamed.
NOTE_WRITES = """
import os
def noting(name, function):
    def call(*arguments):
        what = arguments[0]
        if name == "fsync":
            empty = not os.fstat(what).st_size
            what = os.readlink(f"/proc/self/fd/{{what}}") + " (empty)" * empty
        function(*arguments)
        with open({path!r}, "a") as notes:
            print(name, os.path.basename(what), file=notes)
    return call
for name in ("fsync", "replace"):
    setattr(os, name, noting(name, getattr(os, name)))
"""


async def moved_on(bot: Bot, before: bytes) -> None:
    """Wait until the bot has saved another position."""

    async def moved() -> bool:
        return (bot.state / "next_batch").read_bytes() not in (b"", before)

    await eventually(moved, what="another next_batch")


async def has_run(people: People, alice: User, bot: Bot) -> str:
    """Let the bot run once and answer a command in a room, stop it, return the room's ID."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await alice.send(room_id, "!replybot first")
    await people.replies(alice, room_id, 1)
    assert await bot.stop() == 0
    return room_id


def customize(bot: Bot, code: str, path: Path) -> None:
    """Have the bot's process run code first, which knows of a path."""
    (bot.directory / "sitecustomize.py").write_text(code.format(path=str(path)))
    bot.environment["PYTHONPATH"] = str(bot.directory)


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"\n",
        b"no token at all",
        b"\xff\xfe\x00\x01",
        "s1_\u00e9".encode(),
        b"s999_bogus",
        b"[]",
    ],
    ids=repr,
)
async def test_unusable_next_batch_is_replaced_by_now(
    people: People, alice: User, bot: Bot, token: bytes
) -> None:
    """The log says it loudly; what is said from then on is answered, and nothing older."""
    room_id = await people.room_with_bot(alice)
    await alice.send(room_id, "!replybot old")
    (bot.state / "next_batch").write_bytes(token)
    await bot.start()
    await moved_on(bot, token)
    await alice.send(room_id, "!replybot new")
    assert await people.replies(alice, room_id, 1) == ["new"]
    errors = [line for line in bot.log.splitlines() if " ERROR " in line]
    assert len(errors) == 1
    assert "next_batch" in errors[0]
    assert "starting from now" in errors[0]


async def test_400_that_is_not_the_homeservers_does_not_cost_the_position(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """What stands before the homeserver may refuse anything: only its own M_ error is believed."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.script = fork(proxied_bot.directory, MAX_BACKOFF=0.5)
    await proxied_bot.run()
    await proxied_bot.stop()
    await alice.send(room_id, "!replybot hello")
    with proxy.inject(faults.answer(400, {}), faults.POLL, times=8) as refusals:
        await proxied_bot.start()
        assert await people.replies(alice, room_id, 1, seconds=15) == ["hello"]
        assert refusals.happened == 8


async def test_next_batch_with_a_newline_is_used(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """What an editor leaves at the end of the file does not matter, and is not sent."""
    room_id = await has_run(people, alice, proxied_bot)
    with (proxied_bot.state / "next_batch").open("a") as file:
        file.write("\n")
    await alice.send(room_id, "!replybot second")
    await proxied_bot.start()
    assert await people.replies(alice, room_id, 2) == ["first", "second"]
    assert proxy.count("since=") > proxy.count("since=[^&]*%0A") == 0
    assert "ERROR" not in proxied_bot.log


@pytest.mark.parametrize(
    ("field", "value"),
    [("user_id", "@other:echobot.test"), ("homeserver", "http://127.0.0.1:9")],
    ids=["account", "homeserver"],
)
async def test_state_of_another_account_is_not_used(
    people: People, alice: User, bot: Bot, field: str, value: str
) -> None:
    """Neither its session nor its next_batch, which would be a position in another's messages."""
    room_id = await has_run(people, alice, bot)
    session = bot.session
    (bot.state / "session.json").write_text(json.dumps({**session, field: value}))
    before = (bot.state / "next_batch").read_bytes()
    await alice.send(room_id, "!replybot old")
    await bot.start()
    await bot.logs("Not using the state of")
    await bot.ready(times=2)
    await moved_on(bot, before)
    await alice.send(room_id, "!replybot new")
    assert await people.replies(alice, room_id, 2) == ["first", "new"]
    assert bot.session[field] == session[field]
    assert bot.session["access_token"] != session["access_token"]


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"user_id": 5}'], ids=repr)
async def test_broken_session_is_replaced_and_no_command_is_lost(
    people: People, alice: User, bot: Bot, content: bytes
) -> None:
    """The bot says so, logs in anew and goes on from where it was."""
    room_id = await has_run(people, alice, bot)
    (bot.state / "session.json").write_bytes(content)
    await alice.send(room_id, "!replybot second")
    await bot.start()
    assert await people.replies(alice, room_id, 2) == ["first", "second"]
    assert "ERROR session.json" in bot.log
    assert bot.session["user_id"] == people.bot_id


async def test_state_is_for_nobody_else_to_read(people: People, alice: User, bot: Bot) -> None:
    """session.json has mode 0600, whatever the umask, and holds the token but not the password."""
    await bot.start(umask=0)
    await bot.ready()
    path = bot.state / "session.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert bot.session["access_token"]
    assert bot.environment["MATRIX_PASSWORD"] not in path.read_text()


async def test_given_access_token_is_not_written_to_disk(people: People, bot: Bot) -> None:
    """With MATRIX_ACCESS_TOKEN no file of the state directory has it."""
    token = bot.environment["MATRIX_ACCESS_TOKEN"] = people.account.access_token
    await bot.run()
    await bot.stop()
    contents = [path.read_text() for path in bot.state.iterdir()]
    assert any(people.bot_id in content for content in contents)
    assert not any(token in content for content in contents)


async def test_full_disk_costs_no_reply(people: People, alice: User, bot: Bot) -> None:
    """It is said once; replies go on, no crash doubles them, and what can be saved is saved."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    path = bot.state / "next_batch"
    before = path.read_bytes()
    (bot.state / "next_batch.tmp").symlink_to("/dev/full")
    for n in range(3):
        await alice.send(room_id, f"!replybot {n}")
        await people.replies(alice, room_id, n + 1)
    await bot.logs("Can't save next_batch: No space left on device")
    assert path.read_bytes() == before
    await bot.kill()
    await bot.start()
    await alice.send(room_id, "!replybot 3")
    assert await people.replies(alice, room_id, 4) == ["0", "1", "2", "3"]
    await bot.logs("Can't save next_batch: No space left on device", times=2)
    (bot.state / "next_batch.tmp").unlink()
    await alice.send(room_id, "!replybot 4")
    await moved_on(bot, before)
    assert await people.replies(alice, room_id, 5) == ["0", "1", "2", "3", "4"]
    assert bot.log.count("Can't save next_batch") == 2, "it was said more than once"


async def test_disk_full_from_the_start_costs_no_reply(
    people: People, alice: User, bot: Bot
) -> None:
    """Where not even the session can be saved, the bot says so and answers all the same."""
    room_id = await people.room_with_bot(alice)
    for name in ("session.json.tmp", "next_batch.tmp"):
        (bot.state / name).symlink_to("/dev/full")
    await bot.start()
    await bot.logs("Can't save session.json")
    await bot.logs("Can't save next_batch")
    await alice.send(room_id, "!replybot hello")
    assert await people.replies(alice, room_id, 1) == ["hello"]


async def test_second_copy_on_the_same_directory_is_refused(
    people: People, alice: User, bot: Bot, tmp_path: Path
) -> None:
    """It ends with 75 and one line; the first copy does not notice."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    second = Bot(people.homeserver.url, tmp_path, **bot.environment)
    await second.start()
    assert await second.wait() == 75
    assert len(second.log.splitlines()) == 1
    assert "another copy is running" in second.log
    await alice.send(room_id, "!replybot hello")
    assert await people.replies(alice, room_id, 1) == ["hello"]


@pytest.mark.parametrize("seconds", [-86_400, 86_400], ids=["back", "forward"])
async def test_clock_set_wrong_changes_nothing(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, tmp_path: Path, seconds: int
) -> None:
    """The clock is set by a day while a send is in trouble: it is neither given up nor put off."""
    room_id = await people.room_with_bot(alice)
    offset = tmp_path / "offset"
    offset.write_text("0")
    customize(proxied_bot, WRONG_CLOCK, offset)
    await proxied_bot.run()
    with proxy.inject(faults.bad_gateway, faults.SEND, times=4) as errors:
        await alice.send(room_id, "!replybot hello")
        await proxied_bot.logs("502")
        offset.write_text(str(seconds))
        assert await people.replies(alice, room_id, 1, seconds=15) == ["hello"]
        assert errors.happened == 4
    await alice.send(room_id, "!replybot again")
    assert await people.replies(alice, room_id, 2) == ["hello", "again"]
    days = {line[:10] for line in proxied_bot.log.splitlines()}
    assert len(days) == 2, "the clock was not set"


async def test_files_are_replaced_so_that_a_power_cut_leaves_them_whole(
    people: People, alice: User, bot: Bot, tmp_path: Path
) -> None:
    """Written through to the disk before the rename, and the directory after it, every time."""
    notes = tmp_path / "notes"
    customize(bot, NOTE_WRITES, notes)
    await has_run(people, alice, bot)
    steps = notes.read_text().splitlines()
    files = {tuple(steps[n : n + 3]) for n in range(0, len(steps), 3)}
    assert files == {
        (f"fsync {name}.tmp", f"replace {name}.tmp", "fsync state")
        for name in ("session.json", "next_batch")
    }
