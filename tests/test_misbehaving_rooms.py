"""A room where nothing goes right costs only itself."""

from __future__ import annotations

import asyncio
import copy
import re
import time
from typing import Any

import support.proxy as faults
from conftest import People
from support.bot import Bot, eventually, fork
from support.homeserver import SERVER_NAME, User
from support.proxy import Injection, Proxy

HUGE = """
async def reply_to(event: RoomMessageText) -> str | None:
    return "x" * 70_000 if event.body == "!replybot huge" else event.body[len(COMMAND):].strip()
"""


def sends_to(room_id: str) -> str:
    """Return the pattern of the requests that send a message to a room."""
    return f"PUT .*{re.escape(room_id[1:])}.*/send/"


async def happened(fault: Injection, times: int = 1) -> None:
    """Wait until a fault has happened so many times."""

    async def often_enough() -> bool:
        return fault.happened >= times

    await eventually(often_enough, what="the fault")


async def set_level_to_send(user: User, room_id: str, level: int) -> None:
    """Set the power level that one needs to send messages to a room."""
    path = f"/rooms/{room_id}/state/m.room.power_levels"
    await user.request("PUT", path, {**await user.request("GET", path), "events_default": level})


async def answers_promptly(people: People, user: User, room_id: str, count: int) -> None:
    """Send so many commands to a room; assert that each is answered once, within 2 s."""
    before = len(await user.bodies(room_id, people.bot_id))
    for n in range(count):
        started = time.monotonic()
        await user.send(room_id, f"!replybot {n}")
        replies = await people.replies(user, room_id, before + n + 1)
        assert time.monotonic() - started < 2
        assert replies[before:] == [str(m) for m in range(n + 1)]


async def test_muted_bot_passes_over_the_command(people: People, alice: User, bot: Bot) -> None:
    """Where the bot may not speak (403) the command is logged; once it may again, it answers."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await set_level_to_send(alice, room_id, 50)
    event_id = await alice.send(room_id, "!replybot muted")
    await bot.logs(f"Passed over {event_id}")
    await set_level_to_send(alice, room_id, 0)
    await alice.send(room_id, "!replybot unmuted")
    assert await people.replies(alice, room_id, 1) == ["unmuted"]
    assert "HTTP 403 M_FORBIDDEN" in bot.log


async def test_bot_kicked_between_command_and_reply(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """The reply that came too late is logged; invited again, the bot comes back and answers."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    kicked = asyncio.Event()
    with proxy.inject(faults.hold(kicked), sends_to(room_id), times=1) as held:
        event_id = await alice.send(room_id, "!replybot too late")
        await happened(held)
        await alice.request("POST", f"/rooms/{room_id}/kick", {"user_id": people.bot_id})
        kicked.set()
    await proxied_bot.logs(f"Passed over {event_id}")
    await alice.invite(room_id, people.bot_id)
    await alice.send(room_id, "!replybot welcome back")
    assert await people.replies(alice, room_id, 1) == ["welcome back"]


async def test_reply_too_large_costs_one_reply(people: People, alice: User, bot: Bot) -> None:
    """A reply that no event can hold (413) is logged, and the next command is answered."""
    room_id = await people.room_with_bot(alice)
    bot.script = fork(bot.directory, HUGE)
    await bot.run()
    event_id = await alice.send(room_id, "!replybot huge")
    await alice.send(room_id, "!replybot fits")
    assert await people.replies(alice, room_id, 1) == ["fits"]
    assert f"Passed over {event_id} in {room_id}: HTTP 413 M_TOO_LARGE" in bot.log


async def test_lone_surrogate_holds_nothing_up(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Half a character, which no homeserver takes, is replaced in a reply and a thread's root."""
    room_id = await people.room_with_bot(alice)
    root = await alice.send(room_id, "a thread begins")

    def spoil(answer: Any) -> Any:
        for room in answer.get("rooms", {}).get("join", {}).values():
            for event in room["timeline"]["events"]:
                if event["content"].get("body") == "!replybot half":
                    event["content"]["body"] += " a character: \ud83d"
                elif "m.relates_to" in event["content"]:
                    event["content"]["m.relates_to"]["event_id"] += "\ud83d"
        return answer

    with proxy.inject(faults.rewrite(spoil), faults.SYNC):
        await proxied_bot.run()
        await alice.send(room_id, "!replybot half")
        thread = {"rel_type": "m.thread", "event_id": root}
        await alice.send(room_id, "!replybot in a thread", **{"m.relates_to": thread})
        await alice.send(room_id, "!replybot next")
        replies = await people.replies(alice, room_id, 3, seconds=15)
    assert replies == ["half a character: ?", "in a thread", "next"]


async def test_send_that_always_fails_is_given_up(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """A command that only ever gets 500 is logged with its event ID and its room goes on."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.script = fork(proxied_bot.directory, PATIENCE=2, MAX_BACKOFF=1)
    await proxied_bot.run()
    with proxy.inject(faults.internal_error, sends_to(room_id)) as failing:
        event_id = await alice.send(room_id, "!replybot hopeless")
        await proxied_bot.logs(f"Passed over {event_id}")
        assert failing.happened > 3
    await alice.send(room_id, "!replybot next")
    assert await people.replies(alice, room_id, 1) == ["next"]


async def test_time_since_a_refusal_is_no_time_of_failure(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """A room that failed, then said no, and was quiet for long, has the same patience as any."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.script = fork(proxied_bot.directory, PATIENCE=5, MAX_BACKOFF=0.25)
    await proxied_bot.run()
    forbidden = faults.answer(403, {"errcode": "M_FORBIDDEN", "error": "You can't"})
    with proxy.inject(faults.internal_error, sends_to(room_id), times=1) as failure:
        event_id = await alice.send(room_id, "!replybot refused")
        await happened(failure)
        with proxy.inject(forbidden, sends_to(room_id), times=1):
            await proxied_bot.logs(f"Passed over {event_id}")
    await asyncio.sleep(5)
    with proxy.inject(faults.internal_error, sends_to(room_id), times=12) as failure:
        await alice.send(room_id, "!replybot hello")
        assert await people.replies(alice, room_id, 1) == ["hello"]
        assert failure.happened == 12


async def test_failing_sends_are_not_given_up_while_syncs_fail_too(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """However long a sync is told to wait, it is not the room that fails."""
    room_id = await people.room_with_bot(alice)
    proxied_bot.script = fork(proxied_bot.directory, PATIENCE=2, MAX_BACKOFF=0.25)
    await proxied_bot.run()
    with (
        proxy.inject(faults.rate_limited_by_header(8), faults.POLL, times=1) as limited,
        proxy.inject(faults.internal_error, sends_to(room_id)) as failing,
    ):
        await alice.send(room_id, "!replybot hello")
        await happened(limited)
        await happened(failing, times=25)
    assert await people.replies(alice, room_id, 1) == ["hello"]


async def test_others_are_answered_promptly_while_rooms_misbehave(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """While five rooms hang, fail or are muted, 40 commands elsewhere take less than 2 s each."""
    good, hanging, failing, limited, muted, huge = [
        await people.room_with_bot(alice) for _ in range(6)
    ]
    proxied_bot.script = fork(proxied_bot.directory, HUGE, REQUEST_TIMEOUT=2, MAX_BACKOFF=2)
    await set_level_to_send(alice, muted, 50)
    await proxied_bot.run()
    with (
        proxy.inject(faults.silence, sends_to(hanging)) as silence,
        proxy.inject(faults.internal_error, sends_to(failing)) as errors,
        proxy.inject(faults.rate_limited_by_header(2), sends_to(limited)) as limits,
    ):
        for room_id in (hanging, failing, limited, muted, huge):
            await alice.send(room_id, "!replybot huge" if room_id == huge else "!replybot first")
        await answers_promptly(people, alice, good, 40)
        assert silence.happened
        assert errors.happened
        assert limits.happened
    await set_level_to_send(alice, muted, 0)
    for room_id in (hanging, failing, limited, muted, huge):
        await alice.send(room_id, "!replybot second")
    for room_id in (hanging, failing, limited):
        assert await people.replies(alice, room_id, 2) == ["first", "second"]
    for room_id in (muted, huge):
        assert await people.replies(alice, room_id, 1) == ["second"]


async def test_sends_that_hang_in_110_rooms_stop_no_other_room(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy
) -> None:
    """More requests that hang than nio's pool has connections (100) do not stop the others."""
    room_id = await people.room_with_bot(alice)
    hanging_rooms = iter([f"!hanging{n}:{SERVER_NAME}" for n in range(110)])

    def multiply(answer: Any) -> Any:
        rooms = answer.get("rooms", {}).get("join", {})
        if rooms.get(room_id, {}).get("timeline", {}).get("events"):
            rooms.update({other: copy.deepcopy(rooms[room_id]) for other in hanging_rooms})
        return answer

    with (
        proxy.inject(faults.rewrite(multiply), faults.POLL),
        proxy.inject(faults.hold(asyncio.Event()), sends_to("!hanging")) as hanging,
    ):
        await proxied_bot.run()
        await alice.send(room_id, "!replybot hello")
        await happened(hanging, times=110)
        assert await people.replies(alice, room_id, 1) == ["hello"]
        await answers_promptly(people, alice, room_id, 10)
