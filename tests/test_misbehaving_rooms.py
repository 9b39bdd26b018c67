"""A room where nothing goes right costs only itself."""

import asyncio
import re
import time

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import Bot, eventually, fork, together
from support.people import People, Room
from support.proxy import POLL, SEND, Proxy
from support.scripted import Field, field_of

HUGE = """
async def reply_to(event: RoomMessageText) -> str | None:
    return "x" * 70_000 if event.body == "!replybot huge" else event.body[len("!replybot "):]
"""
FORBIDDEN = faults.answer(403, {"errcode": "M_FORBIDDEN", "error": "You can't"})


def sends_to(room_id: str) -> str:
    """Return the pattern of the requests that send a message to a room."""
    return f"PUT .*{re.escape(room_id[1:])}.*/send/"


async def mute(room: Room, is_mute: bool = True) -> None:
    """Have a power level needed to send messages to the room, or none."""
    path = f"/rooms/{room.room_id}/state/m.room.power_levels"
    levels = await room.user.request("GET", path)
    await room.user.request("PUT", path, {**levels, "events_default": 50 if is_mute else 0})


@pytest.mark.others
async def test_bot_kicked_between_command_and_reply(
    people: People, room: Room, quick_bot: Bot, proxy: Proxy
) -> None:
    """The reply that came too late is tried on; invited again, the bot comes back and sends it."""
    await quick_bot.run()
    kicked = asyncio.Event()
    with proxy.inject(faults.hold(kicked.wait), sends_to(room.room_id), times=1) as held:
        event_id = await room.command("too late")
        await held.happens()
        path = f"/rooms/{room.room_id}/kick"
        await room.user.request("POST", path, {"user_id": people.bot_id})
        kicked.set()
        await quick_bot.logs(f"Trouble with the reply to {event_id}")
    await room.user.invite(room.room_id, people.bot_id)
    await room.command("welcome back")
    assert await room.replies(2) == ["too late", "welcome back"]


@pytest.mark.others
async def test_nobody_else_can_claim_to_have_answered(room: Room, bot: Bot) -> None:
    """Another one's message that names a command as what it answers keeps no reply back."""
    await bot.run()
    await bot.kill()
    event_id = await room.command("hello")
    await room.say("hello", **{"echobot.answers": event_id})
    await bot.start()
    assert await room.replies(1) == ["hello"]


async def test_lone_surrogate_holds_nothing_up() -> None:
    """Half a character, which no homeserver takes, is replaced in a reply, and is in no thread."""
    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        room.command("half a character: \ud83d")
        thread = {"rel_type": "m.thread", "event_id": "$root\ud83d"}
        room.say("!replybot in a thread", **{"m.relates_to": thread})
        room.command("next")
        await room.answers("half a character: ?", "in a thread", "next")
        assert not [event for _, event in room.events[-3:] if "m.relates_to" in event["content"]]


async def test_patience_is_for_one_room_and_one_trouble() -> None:
    """A reply is given up after ten minutes; trouble before a quiet time does not count."""
    async with field_of(speed=120) as field:
        await field.bot.run()
        courses = (always_fails, fails_after_quiet, fails_long_after_refusal)
        await together(*(course(field) for course in courses))


async def always_fails(field: Field) -> None:
    """Assert that a command that only ever gets 500 is given up, and that its room goes on."""
    room = field.server.room()
    with field.proxy.inject(faults.internal_error, sends_to(room.room_id)) as failing:
        began = field.now()
        event_id = room.command("hopeless")
        await field.bot.logs(f"Gave up on the reply to {event_id} in {room.room_id}: HTTP 500")
        assert failing.happened > 3
        # The more work this machine has, the less of the time a sync is waited for.
        assert 580 < field.now() - began < 1500, "it was to be tried for ten minutes"
    room.command("next")
    await room.answers("next")


async def fails_long_after_refusal(field: Field) -> None:
    """Assert that a room whose last reply failed and was refused then has the patience of any."""
    room = field.server.room()
    too_large = faults.answer(413, {"errcode": "M_TOO_LARGE", "error": "event too large"})
    course = faults.in_turn(faults.internal_error, too_large)
    with field.proxy.inject(course, sends_to(room.room_id), times=2):
        event_id = room.command("too large")
        await field.bot.logs(f"Gave up on the reply to {event_id}")
    await stays_quiet(field)
    with field.proxy.inject(faults.internal_error, sends_to(room.room_id), times=1) as failure:
        room.command("hello")
        await room.answers("hello")
        assert failure.happened


async def stays_quiet(field: Field) -> None:
    """Wait until more time has passed than the patience with a room."""
    began = field.now()
    await eventually(lambda: field.now() - began > 660, what="the quiet time")


async def fails_after_quiet(field: Field) -> None:
    """Assert that a room that failed and was quiet has the patience of any."""
    room = field.server.room()
    sends = sends_to(room.room_id)
    with field.proxy.inject(faults.internal_error, sends, times=1) as failure:
        event_id = room.command("first")
        await failure.happens()
        await field.bot.logs(f"Answered {event_id}")
    await stays_quiet(field)
    with field.proxy.inject(faults.internal_error, sends, times=5) as failure:
        room.command("hello")
        await room.answers("first", "hello")
        assert failure.happened == 5


async def test_failing_sends_are_not_given_up_while_syncs_fail_too() -> None:
    """However long the homeserver is away, it is not the room that fails."""
    async with field_of(speed=120) as field:
        room = field.server.room()
        await field.bot.run()
        failures: list[float] = []

        async def fail(proxy: Proxy, request: web.Request) -> web.StreamResponse:
            failures.append(field.now())
            return await faults.internal_error(proxy, request)

        with field.proxy.inject(fail, SEND) as failing:
            room.command("hello")
            await failing.happens()
            with field.proxy.inject(faults.internal_error, POLL) as down:
                await down.happens()
                # How many attempts that takes is up to chance, and to how fast they are answered.
                what = "an attempt twelve minutes after the first one"
                await eventually(lambda: failures[-1] - failures[0] > 720, what=what)
                assert down.happened > 10
        await room.answers("hello")
        assert "Gave up" not in field.bot.log


@pytest.mark.long
@pytest.mark.speed(40)
async def test_others_are_answered_promptly_while_rooms_misbehave(
    people: People, quick_bot: Bot, proxy: Proxy
) -> None:
    """While five rooms hang, fail or are muted, 20 commands elsewhere take less than 2 s each."""
    good, hanging, failing, limited, muted, huge = [await people.room() for _ in range(6)]
    quick_bot.script = fork(quick_bot.directory, HUGE)
    await mute(muted)
    await quick_bot.run()
    until = asyncio.Event()

    async def hang(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        await until.wait()
        return faults.cut(request)

    with (
        proxy.inject(hang, sends_to(hanging.room_id)) as silence,
        proxy.inject(faults.internal_error, sends_to(failing.room_id)) as errors,
        proxy.inject(faults.rate_limited_by_header(40), sends_to(limited.room_id)) as limits,
    ):
        for room in (hanging, failing, limited):
            await room.command("first")
        lost = {await muted.command("first"): muted, await huge.command("huge"): huge}
        for n in range(20):
            started = time.monotonic()
            await good.command(n)
            assert await good.replies(n + 1) == [str(m) for m in range(n + 1)]
            assert time.monotonic() - started < 2
        for fault in (silence, errors, limits):
            await fault.happens(2)
    until.set()  # What hangs now would do so for minutes.
    for event_id, room in lost.items():
        reason = "HTTP 403 M_FORBIDDEN" if room is muted else "HTTP 413 M_TOO_LARGE"
        await quick_bot.logs(f"Gave up on the reply to {event_id} in {room.room_id}: {reason}")
    # Once more at most, if it took a busy machine so long to refuse it.
    assert proxy.count(sends_to(huge.room_id)) <= 2, "what is too large stays so"
    await mute(muted, False)
    for room in (hanging, failing, limited, muted, huge):
        await room.command("second")
    for room in (hanging, failing, limited):
        assert await room.replies(2) == ["first", "second"]
    for room in (muted, huge):
        assert await room.replies(1) == ["second"]


async def test_sends_that_hang_in_110_rooms_stop_no_other_room() -> None:
    """More requests that hang than nio's pool has connections (100) do not stop the others."""
    async with field_of() as field:
        *hanging_rooms, good = [field.server.room() for _ in range(111)]
        await field.bot.run()
        with field.proxy.inject(faults.silence, SEND, times=110) as hanging:
            for room in hanging_rooms:
                room.command("hello")
            await hanging.happens(times=110, seconds=30)
            for n in range(10):
                good.command(n)
                await good.answers(*range(n + 1), seconds=2)


async def test_room_is_given_up_though_polls_blip() -> None:
    """A poll that fails every ten minutes does not count for the room; others wait for nothing.

    After it was given up each of its commands gets one attempt, until one succeeds.
    """
    async with field_of(speed=120) as field:
        bad, good = [field.server.room() for _ in range(2)]
        await field.bot.run()
        blips = [field.now()]

        async def blip(proxy: Proxy, request: web.Request) -> web.StreamResponse:
            if field.now() - blips[-1] < 580:
                return await proxy.forward(request)
            blips.append(field.now())
            return faults.cut(request)

        with (
            field.proxy.inject(blip, POLL),
            field.proxy.inject(faults.internal_error, sends_to(bad.room_id)) as failing,
        ):
            began = field.now()
            bad.command("hopeless")
            await field.bot.logs("Gave up on the reply")
            assert 580 < field.now() - began < 1500
            assert len(blips) > 1
            for n in range(3):
                tried = failing.happened
                bad.command(f"hopeless {n}")
                await field.bot.logs("Gave up on the reply", times=n + 2)
                assert failing.happened == tried + 1
            good.command("hello")
            await good.answers("hello")
        bad.command("good again")
        await bad.answers("good again")
        with field.proxy.inject(faults.internal_error, sends_to(bad.room_id), times=4) as failing:
            bad.command("and patient")
            await bad.answers("good again", "and patient")
            assert failing.happened == 4
