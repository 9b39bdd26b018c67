"""Whatever the state directory holds, and whether it can be written or not, the bot answers."""

import errno
import json
import shutil
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import support.proxy as faults
from support.bot import Bot, eventually, new_bot, together
from support.homeserver import PASSWORD, MatrixError
from support.people import People, Room
from support.proxy import SEND, SYNC, Proxy
from support.scripted import field_of

# The wall clock goes wrong by what a file says.
WRONG_CLOCK = """
import time
right = time.time
time.time = lambda: right() + float(open({path!r}).read())
"""

# A disk that keeps only what it must: the names that a directory had when it was last fsynced, and
# in each file what it had when it was. With CUT in the environment, power fails before the
# operation of that number.
DISK = """
import os, signal, stat, tempfile, threading
one_at_a_time = threading.Lock()  # Two files may be written at the same time.
directory, disk, cut = {state!r}, {disk!r}, int(os.environ.get("CUT", "0"))
fsync, replace, names, contents, operations = os.fsync, os.replace, dict(), dict(), 0

def files():
    for entry in os.scandir(directory):
        with open(entry.path, "rb") as file:
            yield entry.name, entry.inode(), file.read()

def leave_what_is_sure():
    now = dict((inode, content) for _, inode, content in files())
    whole = tempfile.mkdtemp(dir=disk)
    for name, inode in names.items():
        content = contents.get(inode, b"")
        # What is changed in place and not yet written may be torn.
        sure = content if now.get(inode, content) == content else b""
        with open(os.path.join(whole, name), "wb") as file:
            file.write(sure)
    # All at once: it may be killed at any moment.
    os.symlink(whole, whole + ".now")
    replace(whole + ".now", os.path.join(disk, "now"))

def counted(function):
    def call(*arguments):
        global operations
        with one_at_a_time:
            operations += 1
            leave_what_is_sure()
            if operations == cut:
                os.kill(os.getpid(), signal.SIGKILL)
            function(*arguments)
            leave_what_is_sure()
    return call

def write_through(descriptor):
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        names.clear()
        names.update((name, inode) for name, inode, _ in files())
    else:
        contents.update((inode, text) for _, inode, text in files() if inode == status.st_ino)
    fsync(descriptor)

for name, inode, content in files():
    names[name], contents[inode] = inode, content
leave_what_is_sure()
os.fsync = counted(write_through)
os.replace, os.rename = counted(os.replace), counted(os.rename)
"""

# As on NFS, which locks only what is open for writing, or on a shared folder without any locks; and
# as on many of both, directories can't be fsynced.
NFS = """
import errno, fcntl, os, stat
def flock(descriptor, operation, real=fcntl.flock):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return real(descriptor, operation)
def fsync(descriptor, real=os.fsync):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    real(descriptor)
fcntl.flock, os.fsync = flock, fsync
"""
# As on a Windows share, which has another word for what is locked.
SMB = """
import errno, fcntl, os
def flock(descriptor, operation, real=fcntl.flock):
    try:
        return real(descriptor, operation)
    except BlockingIOError:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES)) from None
fcntl.flock = flock
"""
NO_LOCKS = """
def flock(descriptor, operation):
    raise OSError({number}, os.strerror({number}))
fcntl.flock = fcntl.lockf = flock
"""


async def has_run(room: Room, bot: Bot) -> None:
    """Let the bot run once and answer a command in the room, and stop it."""
    await bot.run()
    await room.command("first")
    await room.replies(1)
    assert await bot.stop() == 0


@pytest.mark.others
@pytest.mark.speed(60)
async def test_unusable_next_batch_is_replaced_by_now(
    people: People, room: Room, quick_bot: Bot
) -> None:
    """What is said from then on is answered, and nothing older.

    What the homeserver refuses is tried for a minute first, as it may not mean it, and told loudly.
    """
    bot = quick_bot
    await has_run(room, bot)
    said = ["first"]
    below = b"!nowhere:echobot.test s1\n"
    contents = [b"", b"\n" + below]
    refused = list[bytes]()
    if people.homeserver.name != "Conduit":  # It takes what is no position for the beginning.
        refused += [b"s9_bogus\n" + below, b"\xff\xfe\x00\x01 \xc3\xa9"]
    for content in contents + refused:
        await room.command("old")
        (bot.state / "next_batch").write_bytes(content)
        before = bot.next_batch
        await bot.start()
        await bot.saves(other_than=before)
        said.append(f"new after {content!r}")
        await room.command(said[-1])
        assert await room.replies(len(said)) == said
        errors = [line for line in bot.log.splitlines() if " ERROR " in line]
        assert len(errors) == max(0, len(said) - 1 - len(contents))
        assert all("refused: starting from now" in error for error in errors)
        assert await bot.stop() == 0


# All short polls are held equally long, as happens by chance.
SAME_HOLD = """
import random
random.randrange = lambda *a, real=random.randrange: 1 if a[-1] <= 1000 else real(*a)
"""


async def test_start_without_a_position_is_not_in_the_past(room: Room, bot: Bot) -> None:
    """Synapse repeats for minutes what it answered to the same first sync of an earlier life."""
    bot.customize = SAME_HOLD
    await has_run(room, bot)
    await room.command("old")
    (bot.state / "next_batch").write_text("")
    await bot.run()
    await room.command("new")
    assert await room.replies(2) == ["first", "new"]


async def test_state_of_another_account_is_not_used(
    room: Room, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Neither its session nor its next_batch, which would be a position in another's messages.

    Nor at the next start, if it is killed before there is a position of its own.
    """
    bot = proxied_bot
    await has_run(room, bot)
    session, before = bot.session, bot.next_batch
    other = "@other:echobot.test"
    (bot.state / "session.json").write_text(json.dumps({**session, "user_id": other}))
    (bot.state / "next_batch").write_text(f"{before}\n{room.room_id} {before}")
    await room.command("old")
    polls_from_there = f"since={quote(before)}"
    asked_by_itself = proxy.count(polls_from_there)
    with proxy.inject(faults.silence, SYNC) as held:
        await bot.start()
        await bot.logs(f"WARNING Not using the state of {other}")
        await held.happens()
        assert bot.session["user_id"] == room.bot_id
        await bot.kill()
    await bot.start()
    await bot.ready(times=3)
    await bot.saves(other_than=before)
    await room.command("new")
    assert await room.replies(2) == ["first", "new"]
    assert proxy.count(polls_from_there) == asked_by_itself
    assert bot.session["user_id"] == room.bot_id
    assert bot.session["access_token"] != session["access_token"]


async def test_start_as_somebody_else_costs_no_command(room: Room, bot: Bot) -> None:
    """A MATRIX_USER that is mistaken once, and cannot log in, leaves the state as it is."""
    await has_run(room, bot)
    await room.command("meanwhile")
    bot.environment["MATRIX_USER"] = "@nobody:echobot.test"
    await bot.start()
    assert await bot.wait() == 77
    bot.environment["MATRIX_USER"] = room.bot_id
    await bot.start()
    assert await room.replies(2) == ["first", "meanwhile"]


async def test_broken_session_is_replaced_and_no_command_is_lost(
    people: People, room: Room, proxied_bot: Bot, proxy: Proxy
) -> None:
    """The bot logs in anew, on its device, and goes on from where it was.

    So it does with the next_batch of the tutorial's bot, which has no session.
    """
    bot = proxied_bot
    await has_run(room, bot)
    said = ["first"]
    for content in (None, b"", b"\xff\x00", b"[]", b'{"user_id": 5}'):
        # As the tutorial writes it, or an editor.
        (bot.state / "next_batch").write_text(bot.next_batch + "\n" * bool(content))
        (bot.state / "session.json").unlink()
        if content is not None:
            (bot.state / "session.json").write_bytes(content)
        said.append(f"after {content!r}")
        await room.command(said[-1])
        await bot.start()
        assert await room.replies(len(said)) == said
        assert bot.log.count("Logged in as") == len(said)
        assert bot.session["user_id"] == room.bot_id
        assert await bot.stop() == 0
    assert "ERROR" not in bot.log
    assert not proxy.count("since=[^&]*%0A")
    assert len(await people.account.devices()) == 2


async def test_next_batch_names_the_rooms_that_owe_replies(
    people: People, proxied_bot: Bot, proxy: Proxy
) -> None:
    """With the position from which each has to be read; it is one line where none does."""
    bot = proxied_bot
    good, hanging = [await people.room() for _ in range(2)]
    await bot.run()
    assert len(bot.saved) == 1
    with proxy.inject(faults.silence, f"PUT .*{quote(hanging.room_id)[3:]}/send/") as hung:
        before = bot.next_batch
        await hanging.command("owed")
        await hung.happens()
        await good.command("hello")
        assert await good.replies(1) == ["hello"]
        await bot.saves(other_than=before)
        await eventually(lambda: list(bot.unfinished) == [hanging.room_id])
        position = bot.unfinished[hanging.room_id]
        await good.command("hello again")
        await bot.saves(other_than=bot.next_batch)
        # The others' goes on, and its own does not.
        assert bot.unfinished == {hanging.room_id: position}
        await bot.kill()
    await bot.start()
    assert await hanging.replies(1) == ["owed"]
    await eventually(lambda: len(bot.saved) == 1)
    assert await good.bodies() == ["hello", "hello again"]


async def test_lines_that_make_no_sense_cost_nothing(people: People, bot: Bot) -> None:
    """Whatever was done to next_batch below its first line, nothing is lost and nothing doubled."""
    rooms = [await people.invite() for _ in range(5)]
    await bot.run()
    for room in rooms:
        await room.command("first")
        await room.replies(1)
    assert await bot.stop() == 0
    position = bot.next_batch
    ids = [room.room_id for room in rooms]
    lines = [position, "", "garbage", "!", "! s1", "!nowhere:echobot.test", "[]", "\0\udcff"]
    lines += [f"{ids[0]} bogus", ids[1], f"{ids[2]} {position} {position}", f"{ids[3]} {position}"]
    lines += ["!nowhere:echobot.test s1", f" {ids[3]}  {position}\r", position, f"{ids[3]} bogus"]
    (bot.state / "next_batch").write_text("\n".join(lines), errors="surrogateescape")
    for room in rooms:
        await room.command("second")
    await bot.start()
    for room in rooms:
        assert await room.replies(2) == ["first", "second"]
        await room.command("third")
    for room in rooms:
        assert await room.replies(3) == ["first", "second", "third"]
    await eventually(lambda: not bot.unfinished.keys() & set(ids), what="all done")
    assert await bot.stop() == 0


async def test_state_is_for_nobody_else_to_read(bot: Bot) -> None:
    """session.json has mode 0600, whatever the umask, and holds the token but not the password."""
    await bot.start(umask=0)
    await bot.ready()
    path = bot.state / "session.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert bot.session["access_token"]
    assert PASSWORD not in path.read_text()


def fills(path: Path) -> bool:
    """Have each write to a file fail as on a full disk; tell whether that was done."""
    with suppress(FileExistsError):  # The bot is just writing it.
        path.symlink_to("/dev/full")
    return path.is_symlink()


async def test_full_disk_costs_no_reply(room: Room, bot: Bot) -> None:
    """It is said once; replies go on, no crash doubles them, and what can be saved is saved."""
    await bot.run()
    before = bot.next_batch
    await eventually(lambda: fills(bot.state / "next_batch.tmp"))
    complaint = "ERROR Can't save next_batch: No space left on device; answering goes on"
    for n in range(3):
        await room.command(n)
        await room.replies(n + 1)
    await bot.logs(complaint)
    assert bot.next_batch == before
    await bot.kill()
    await bot.start()
    await room.command(3)
    assert await room.replies(4) == ["0", "1", "2", "3"]
    await bot.logs(complaint, times=2)
    (bot.state / "next_batch.tmp").unlink()
    await room.command(4)
    await bot.saves(other_than=before)
    assert await room.replies(5) == ["0", "1", "2", "3", "4"]
    assert bot.log.count("Can't save next_batch") == 2, "it was said more than once"


async def test_disk_full_from_the_start_costs_no_reply(room: Room, bot: Bot) -> None:
    """Where not even the session can be saved, the bot says so and answers all the same."""
    assert all(fills(bot.state / name) for name in ("session.json.tmp", "next_batch.tmp"))
    await bot.start()
    await bot.logs("Can't save session.json")
    await bot.logs("Can't save next_batch")

    async def is_answered() -> bool:
        await room.command("hello")  # What is said before its first sync is history.
        return bool(await room.bodies())

    await eventually(is_answered)
    await room.command("after")

    async def is_done() -> bool:
        return (await room.bodies())[-1] == "after"

    await eventually(is_done)


async def test_second_copy_on_the_same_directory_is_refused(
    room: Room, bot: Bot, tmp_path: Path
) -> None:
    """It ends with 75 and one line, whatever it calls the directory; the first does not notice."""
    await bot.run()
    assert (bot.state / "echobot.lock").exists()
    second = Bot("", tmp_path)
    second.environment = {**bot.environment, "STATE_DIRECTORY": f"{bot.state}/../{bot.state.name}"}
    for _ in range(2):  # The first refusal does not let go of the lock.
        second.log_path.unlink(missing_ok=True)
        status, line = await (await second.start()).refused()
        assert status == 75
        assert "another copy is running" in line
    await room.command("hello")
    assert await room.replies(1) == ["hello"]


async def test_directory_of_another_machine_is_used(tmp_path: Path) -> None:
    """On NFS or SMB are locks and no complaints; where there are no locks, one warning says so."""

    async def runs(customize: str, warnings: int) -> None:
        async with field_of() as field, new_bot(field.proxy.url) as second:
            room = field.server.room()
            field.bot.customize = second.customize = customize
            second.environment = field.bot.environment
            await field.bot.run()
            if not warnings:
                assert (await (await second.start()).refused())[0] == 75
            for life in range(1, 3):
                before = field.bot.next_batch
                room.command(life)
                await room.answers(*range(1, life + 1))
                await field.bot.saves(other_than=before)
                await field.bot.kill()
                assert field.bot.log.count(" WARNING ") == warnings * life, field.bot.log
                await field.bot.start()
            assert "lock" in field.bot.log or not warnings
            assert "Can't save" not in field.bot.log
            assert " ERROR " not in field.bot.log
            await field.bot.ready(times=3)
            assert await field.bot.stop() == 0

    without_locks = [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF]
    await together(
        *(runs(customize, 0) for customize in (NFS, SMB)),
        *(runs(NFS + NO_LOCKS.format(number=number), 1) for number in without_locks),
    )


async def test_clock_set_wrong_changes_nothing(
    room: Room, proxied_bot: Bot, proxy: Proxy, tmp_path: Path
) -> None:
    """It jumps by days while a send is in trouble: that is neither given up nor put off."""
    offset = tmp_path / "offset"
    offset.write_text("0")
    proxied_bot.customize = WRONG_CLOCK.format(path=str(offset))
    await proxied_bot.run()
    for count, seconds in enumerate((86_400, -86_400), 1):
        with proxy.inject(faults.bad_gateway, SEND, times=4) as errors:
            await room.command("hello")
            await proxied_bot.logs("HTTP 502", times=count)
            offset.write_text(str(seconds))
            assert await room.replies(count, seconds=15) == ["hello"] * count
            assert errors.happened == 4
    days = {line[:10] for line in proxied_bot.log.splitlines()}
    assert len(days) == 3, "the clock was not set"


@pytest.mark.long
async def test_power_cut_at_any_moment_leaves_the_files_whole(
    people: People, room: Room, bot: Bot, tmp_path: Path
) -> None:
    """With a disk that keeps only what was fsynced: after the first start, then amid each write."""
    bot.customize = DISK.format(state=str(bot.state), disk=str(tmp_path))
    disk = tmp_path / "now"

    def cut_power() -> None:
        shutil.rmtree(bot.state)
        shutil.copytree(disk, bot.state)
        assert bot.next_batch
        assert bot.session

    await bot.run()
    await eventually(lambda: all((disk / n).read_bytes() for n in ("next_batch", "session.json")))
    await bot.kill()
    cut_power()
    # The session, twice, and the position are each written, renamed, entered in the directory.
    for cut in range(1, 10):
        with suppress(MatrixError):  # Power may have failed before there was another token.
            await people.homeserver.revoke(bot.session["access_token"])
        await room.command(cut)
        bot.environment["CUT"] = str(cut)
        await bot.start()
        assert await bot.wait() == -9
        cut_power()
    bot.environment["CUT"] = "0"
    await bot.start()
    assert await room.replies(9) == [str(n) for n in range(1, 10)]
    assert "ERROR" not in bot.log
