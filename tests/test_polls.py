"""Polls that fail, hurry or bring nothing cost no command, no rush and no time."""

import asyncio
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import eventually, together
from support.proxy import FIRST_SYNC, JOIN, LOGIN, MESSAGES, POLL, SEND, SYNC, Fault, Proxy
from support.scripted import DENDRITE, JSON, SYNAPSE, field_of
from test_refused_invitations import FORBIDDEN, LEAVE, NOT_FOUND, OWNER

MALFORMED = faults.answer(400, {"errcode": "M_INVALID_PARAM", "error": "Malformed since"})


async def test_restart_needs_no_sync_without_a_position() -> None:
    """It goes on from its position with all that it owes, an invitation included."""
    await together(*map(goes_on, (NOT_FOUND, faults.internal_error, faults.silence)))


async def goes_on(trouble: Fault) -> None:
    """Assert that for one kind of trouble with the sync that tells of all invitations."""
    async with field_of(speed=5) as field:
        room, owing = [field.server.room() for _ in range(2)]
        await field.bot.run()
        name = owing.room_id[1:].partition(":")[0]
        with (
            field.proxy.inject(faults.silence, JOIN) as joining,
            field.proxy.inject(faults.silence, rf"(?=.*{name}\W){SEND}") as sending,
        ):
            invited = field.server.room("invite")
            await joining.happens()
            owing.command("owed")
            await sending.happens()
            room.command("first")
            await room.answers("first")
            owed = {invited.room_id, owing.room_id}
            await eventually(lambda: owed <= field.bot.unfinished.keys())
            await field.bot.kill()
        invited.command("invited")
        room.command("second")
        with field.proxy.inject(trouble, FIRST_SYNC):
            await field.bot.start()
            await room.answers("first", "second")
            await owing.answers("owed")
            await invited.answers("invited")
            new = field.server.room("invite")
            new.command("new")
            await new.answers("new")


async def test_slow_answers_are_waited_for_longer_each_time() -> None:
    """Where everything takes 75 s, a login, syncs, a join, pages and sends come to their end."""
    async with field_of(DENDRITE, speed=120) as field:
        patterns = [LOGIN, FIRST_SYNC, POLL, JOIN, MESSAGES, SEND]
        with field.proxy.inject(faults.slow(75), "|".join(patterns)):
            await field.bot.run()
            room = field.server.room("invite")
            room.command("hello")
            await field.bot.logs("Answered", seconds=60)
            await room.answers("hello")
        for pattern in patterns[:-1]:
            assert field.proxy.count(pattern) >= 2, f"{pattern} was not cut at first"
        assert "Trouble with the reply to" in field.bot.log


async def test_watchdog_is_fed_while_a_sync_is_slow(tmp_path: Path) -> None:
    """While the first sync takes 400 s, systemd is told as often as the README's unit asks.

    That is every 300 s.
    """
    async with field_of(speed=120) as field:
        fed: list[float] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.bind(str(tmp_path / "notify"))
            loop = asyncio.get_running_loop()
            loop.add_reader(unix, lambda: fed.append(len(unix.recv(4096)) and field.now()))
            field.bot.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
            with field.proxy.inject(faults.slow(400), FIRST_SYNC) as slow:
                await field.bot.start()
                await field.bot.ready()
            loop.remove_reader(unix)
        assert slow.happened >= 4
        assert fed[-1] - fed[0] > 700
        assert max(later - earlier for earlier, later in pairwise(fed)) < 290


@pytest.mark.parametrize("seconds", [5, 30])
async def test_quiet_polls_that_are_cut_are_no_outage(seconds: int) -> None:
    """After 150 s in which a proxy cut each quiet poll, a command is answered promptly."""
    async with field_of(speed=20) as field:
        room = field.server.room()
        await field.bot.run()
        field.proxy.speed = 15  # The homeserver holds them longer than the proxy.
        with field.proxy.inject(faults.impatient(seconds), POLL) as cut:
            began = field.now()
            await eventually(lambda: field.now() - began > 150)
            assert cut.happened > 150 / (2 * seconds + 4), "polls were put off"
            said = field.now()
            room.command("hello")
            await room.answers("hello")
            assert field.now() - said < 25
            assert field.bot.log.count("Trouble with the sync: HTTP 504") > 0


async def test_failed_sync_that_is_cached_is_asked_for_otherwise() -> None:
    """Where a proxy repeats a 500 for one `since` and `timeout`, the next attempt differs."""
    failed: list[str] = []

    async def fail(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        failed.append(request.raw_path)
        if request.raw_path != failed[0]:
            return await proxy.forward(request)
        return await faults.internal_error(proxy, request)

    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(fail, POLL) as polls:
            room.say("this ends the poll before")
            await polls.happens()
            room.command("hello")
            await room.answers("hello", seconds=10)
        assert failed.count(failed[0]) < len(failed)


async def test_position_refused_for_a_moment_is_kept() -> None:
    """One 400 or 404, or minutes of them where any sync is refused, costs no command."""
    html = [faults.answer(status, "<html>Sorry</html>") for status in (400, 404)]
    await together(
        *(position_is_kept(refusal, 1) for refusal in (MALFORMED, NOT_FOUND)),
        *(position_is_kept(refusal, 12, SYNC) for refusal in (MALFORMED, NOT_FOUND)),
        *(position_is_kept(refusal, 7) for refusal in html),
        position_is_kept(faults.in_turn(MALFORMED, faults.silence, MALFORMED), 3),
    )


async def position_is_kept(refusal: Fault, times: int, pattern: str = POLL) -> None:
    """Assert that for one kind of refusal that is repeated so often."""
    async with field_of(speed=20) as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(refusal, pattern, times) as refused:
            room.say("this ends the poll before")
            await refused.happens()
            room.command(*range(3))
            await room.answers(*range(3))
            assert refused.happened == times
        assert "refused: starting from now" not in field.bot.log


async def test_position_refused_for_a_minute_is_given_up_loudly() -> None:
    """The log names the position; what is said from then on is answered."""
    await together(*map(position_is_given_up, (MALFORMED, NOT_FOUND)))


async def position_is_given_up(refusal: Fault) -> None:
    """Assert that for one kind of refusal."""
    async with field_of(speed=60) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        position = field.bot.next_batch
        with field.proxy.inject(refusal, f"{POLL}{position}(&|$)") as refused:
            room.command("lost")
            await field.bot.start()
            await refused.happens()
            began = field.now()
            await field.bot.logs("refused: starting from now")
            assert 30 < field.now() - began < 200
            assert 3 < refused.happened < 20
            await field.bot.saves(other_than=position)
            room.command("new")
            await room.answers("new")
        (line,) = [line for line in field.bot.log.splitlines() if " ERROR " in line]
        assert f"next_batch {position}" in line


@pytest.mark.parametrize("status", [401, 403, 407])
async def test_refusal_of_a_proxy_costs_no_login(status: int) -> None:
    """A poll that is refused by what is no homeserver is repeated with the same token."""
    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        refusal = faults.answer(status, "<html>Sign in to the hotel's network</html>")
        with field.proxy.inject(refusal, POLL, times=3) as refused:
            room.command("hello")
            room.say("this ends the poll before")
            await room.answers("hello")
            await refused.happens(3)
        room.command("again")
        await room.answers("hello", "again")
        assert field.proxy.count(LOGIN) == 1


async def test_polls_that_bring_the_same_at_once() -> None:
    """With the same chat line in each answer they are made at most twice a second."""
    answers: list[JSON] = []

    def repeat(answer: JSON) -> JSON:
        if not answers and not answer["rooms"]["join"]:
            return answer
        answers.append(answer)
        return answers[0]

    async with field_of(holds_polls=False) as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(faults.rewrite(repeat), POLL) as repeated:
            await repeated.happens()
            room.say("nothing to answer")
            await eventually(lambda: answers)
            began = field.now()
            await asyncio.sleep(4)  # The time in which it might rush.
            assert 4 <= len(answers) <= 2 * (field.now() - began) + 2
        room.command("after")
        await room.answers("after", seconds=5)


async def test_polls_that_return_at_once() -> None:
    """With nothing new, or for an invitation told in each: they are made at most twice a second."""
    await together(
        polls_make_no_rush("*", holds_polls=False),
        polls_make_no_rush("*", repeats_invitations=True),
        polls_make_no_rush(OWNER, repeats_invitations=True),
    )


async def polls_make_no_rush(inviters: str, **manners: bool) -> None:
    """Assert that of one reason, while an invitation can be neither accepted nor rejected."""
    async with field_of(SYNAPSE, **manners) as field:
        field.bot.environment["MATRIX_INVITERS"] = inviters
        good = field.server.room()
        await field.bot.run()
        with field.proxy.inject(FORBIDDEN, LEAVE if inviters == OWNER else JOIN) as refused:
            field.server.room("invite")
            await refused.happens()
            before, began = field.proxy.count(SYNC), field.now()
            await asyncio.sleep(5)  # The time in which it might rush.
            assert field.proxy.count(SYNC) - before <= 2 * (field.now() - began) + 2
            assert refused.happened < 10
            good.command("hello")
            await good.answers("hello", seconds=5)


async def test_busy_stream_is_not_slowed() -> None:
    """40 commands, each said when the one before was answered, take less than 15 s."""
    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        began = field.now()
        for n in range(40):
            room.command(n)
            await room.answers(*range(n + 1))
        assert field.now() - began < 15


async def test_room_joined_in_part_is_answered() -> None:
    """Of a large room of others, which the homeserver is still joining, commands are news."""
    async with field_of() as field:
        room = field.server.room("invite")
        room.is_joined_in_part = True
        await field.bot.run()
        await field.bot.logs("Joined")
        room.command("hello")
        await room.answers("hello")
