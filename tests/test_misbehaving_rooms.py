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
from support.scripted import field_of

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


async def test_bot_kicked_between_command_and_reply(
    people: People, room: Room, quick_bot: Bot, proxy: Proxy
) -> None:
    """The reply that came too late is logged; invited again, the bot comes back and answers."""
    await quick_bot.run()
    kicked = asyncio.Event()
    with proxy.inject(faults.hold(kicked.wait), sends_to(room.room_id), times=1) as held:
        event_id = await room.command("too late")
        await held.happens()
        path = f"/rooms/{room.room_id}/kick"
        await room.user.request("POST", path, {"user_id": people.bot_id})
        kicked.set()
        await quick_bot.logs(f"Gave up on the reply to {event_id}")
    await room.user.invite(room.room_id, people.bot_id)
    await room.command("welcome back")
    assert await room.replies(1) == ["welcome back"]


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


@pytest.mark.speed(60)
async def test_patience_is_for_one_room_and_one_trouble(
    people: People, quick_bot: Bot, proxy: Proxy
) -> None:
    """A reply is given up after ten minutes; trouble before a quiet time does not count."""
    await quick_bot.run()
    rooms = [await people.room() for _ in range(3)]
    await together(
        always_fails(rooms[0], quick_bot, proxy),
        fails_after_quiet(rooms[1], quick_bot, proxy, "Gave up on"),
        fails_after_quiet(rooms[2], quick_bot, proxy, "Answered"),
    )


async def always_fails(room: Room, bot: Bot, proxy: Proxy) -> None:
    """Assert that a command that only ever gets 500 is given up, and that its room goes on."""
    with proxy.inject(faults.internal_error, sends_to(room.room_id)) as failing:
        event_id = await room.command("hopeless")
        started = time.monotonic()
        await bot.logs(f"Gave up on the reply to {event_id} in {room.room_id}: HTTP 500")
        assert failing.happened > 3
        assert 580 < (time.monotonic() - started) * 60 < 900, "it was to be tried for ten minutes"
    await room.command("next")
    assert await room.replies(1) == ["next"]


async def fails_after_quiet(room: Room, bot: Bot, proxy: Proxy, ends_in: str) -> None:
    """Assert that a room that failed, for good or not, and was quiet has the patience of any."""
    sends = sends_to(room.room_id)
    with (
        proxy.inject(faults.internal_error, sends, times=1) as failure,
        proxy.inject(FORBIDDEN, sends if ends_in == "Gave up on" else "nothing"),
    ):
        event_id = await room.command("first")
        await failure.happens()
        await eventually(lambda: re.search(f"{ends_in}.*{re.escape(event_id)}", bot.log))
    await asyncio.sleep(11)  # The quiet time itself: eleven minutes for the bot.
    with proxy.inject(faults.internal_error, sends, times=5) as failure:
        await room.command("hello")
        assert (await room.replies(1 + (ends_in == "Answered")))[-1] == "hello"
        assert failure.happened == 5


@pytest.mark.speed(60)
async def test_failing_sends_are_not_given_up_while_syncs_fail_too(
    room: Room, quick_bot: Bot, proxy: Proxy
) -> None:
    """However long the homeserver is away, it is not the room that fails."""
    await quick_bot.run()
    await proxy.counts(POLL, 2)
    with (
        proxy.inject(faults.internal_error, POLL) as down,
        proxy.inject(faults.internal_error, sends_to(room.room_id)) as failing,
    ):
        # The poll that was asked before it went down brings the command.
        await room.command("hello")
        await failing.happens()
        started = time.monotonic()
        await failing.happens(times=24)
        assert (time.monotonic() - started) * 60 > 660, "they were to fail for eleven minutes"
        assert down.happened > 10
    assert await room.replies(1) == ["hello"]


async def test_others_are_answered_promptly_while_rooms_misbehave(
    people: People, quick_bot: Bot, proxy: Proxy
) -> None:
    """While five rooms hang, fail or are muted, 40 commands elsewhere take less than 2 s each."""
    good, hanging, failing, limited, muted, huge = [await people.room() for _ in range(6)]
    quick_bot.script = fork(quick_bot.directory, HUGE)
    await mute(muted)
    await quick_bot.run()
    with (
        proxy.inject(faults.silence, sends_to(hanging.room_id)) as silence,
        proxy.inject(faults.internal_error, sends_to(failing.room_id)) as errors,
        proxy.inject(faults.rate_limited_by_header(40), sends_to(limited.room_id)) as limits,
    ):
        for room in (hanging, failing, limited):
            await room.command("first")
        lost = {await muted.command("first"): muted, await huge.command("huge"): huge}
        for n in range(40):
            started = time.monotonic()
            await good.command(n)
            assert await good.replies(n + 1) == [str(m) for m in range(n + 1)]
            assert time.monotonic() - started < 2
        for fault in (silence, errors, limits):
            await fault.happens(2)
    for event_id, room in lost.items():
        reason = "HTTP 403 M_FORBIDDEN" if room is muted else "HTTP 413 M_TOO_LARGE"
        await quick_bot.logs(f"Gave up on the reply to {event_id} in {room.room_id}: {reason}")
    assert proxy.count(sends_to(huge.room_id)) == 1, "what is too large stays so"
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
