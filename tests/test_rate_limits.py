"""Rate limits are waited out: everything is answered, as fast as the homeserver allows."""

import asyncio
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import Bot, eventually, together
from support.homeserver import Homeserver, running_homeserver
from support.people import People
from support.proxy import JOIN, POLL, SEND, Fault, Proxy
from support.scripted import field_of

# Synapse's limits for messages, but 15 times as fast.
PER_SECOND, BURST = 3, 10


@pytest.fixture(scope="module")
async def homeserver() -> AsyncIterator[Homeserver]:
    """A homeserver that limits how fast messages may be sent."""
    limit = {"per_second": PER_SECOND, "burst_count": BURST}
    async with running_homeserver({"rc_message": limit}) as homeserver:
        yield homeserver


async def test_synapse_limits_cost_no_reply_and_starve_no_room(people: People, bot: Bot) -> None:
    """40 commands in a room, 10 in another: answered in order, as fast as the limit allows."""
    # Who sends is limited too: each of them uses up one burst.
    senders = [people.alice, *[await people.user(f"user{n}-") for n in range(4)]]
    rooms = [await people.room(*senders[1:4]), await people.room(user=senders[4])]
    await bot.run()
    started = time.time()
    for n in range(BURST):
        for number, sender in enumerate(senders):
            await sender.send(rooms[number // 4].room_id, f"!replybot {n}.{number}")
    said = time.time()
    expected = [f"{n}.{number}" for n in range(BURST) for number in range(4)]
    assert await rooms[0].replies(40) == expected
    assert await rooms[1].replies(10) == [f"{n}.4" for n in range(BURST)]
    first, second = [
        [event["origin_server_ts"] / 1000 for event in await room.events()] for room in rooms
    ]
    allowed = (50 - BURST) / PER_SECOND
    assert max(first + second) - started > allowed * 0.9
    # Without the time that it took to say it, while the limit was not reached yet.
    assert max(first + second) - said < allowed * 2
    assert sum(moment < second[-1] for moment in first) <= 35, "the second room was starved"


async def test_limited_rooms_do_not_rush(people: People, proxied_bot: Bot, proxy: Proxy) -> None:
    """24 rooms that meet the limit together get on, but do not all ask again for each reply."""
    rooms = [await people.invite(await people.user(f"sender{n}-")) for n in range(24)]
    await proxied_bot.run()
    await proxied_bot.logs("Joined", times=len(rooms))
    # However long it takes to say it in all of them, they are answered at once.
    together = faults.hold(lambda: proxy.counts(SEND, len(rooms)))
    with proxy.inject(together, SEND, times=len(rooms)):
        await asyncio.gather(*[room.command("hello") for room in rooms])
        for room in rooms:
            assert await room.replies(1) == ["hello"]
    assert len(rooms) < proxy.count(SEND) < 4 * len(rooms)
    times = [(await room.events())[0]["origin_server_ts"] / 1000 for room in rooms]
    assert max(times) - min(times) < 3 * (len(rooms) - BURST) / PER_SECOND


async def test_room_limited_for_ever_holds_up_no_other() -> None:
    """While one room gets 429 each time, four others that met one 429 go on within seconds."""
    await together(*map(limited_room_holds_up_no_other, (SEND, JOIN)))


async def limited_room_holds_up_no_other(request_limited: str) -> None:
    """Assert that where its sends or its joins are limited."""
    async with field_of() as field:
        await field.bot.run()
        membership = "join" if request_limited == SEND else "invite"
        rooms = [field.server.room(membership) for _ in range(5)]
        limit = faults.rate_limited(1000)
        name = rooms[0].room_id[1:].removesuffix(":echobot.test")
        with (
            field.proxy.inject(limit, rf"(?=.*{name}\W){request_limited}") as one,
            field.proxy.inject(limit, request_limited, times=4) as others,
        ):
            for room in rooms:
                room.command("hello")
            for room in rooms[1:]:
                await room.answers("hello", seconds=10)
            await one.happens(times=2)
            assert others.happened == 4
            assert not rooms[0].replies
        await rooms[0].answers("hello")
        assert "Gave up" not in field.bot.log


TIMELESS: list[Fault] = [
    faults.answer(429, {"errcode": "M_LIMIT_EXCEEDED", "error": "Too many requests"}),
    faults.answer(429, "<html>429 Too Many Requests</html>"),
]


@pytest.mark.parametrize("pattern", [SEND, JOIN, POLL], ids=["send", "join", "poll"])
async def test_429_without_a_time_is_waited_out(pattern: str) -> None:
    """Told no time, the bot asks more and more seldom, for longer than any failure, told once."""
    await together(*(limit_is_waited_out(pattern, limit) for limit in TIMELESS))


async def limit_is_waited_out(pattern: str, limit: Fault) -> None:
    """Assert that of one limit."""
    times: list[float] = []

    async def refuse(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        times.append(field.now())
        return await limit(proxy, request)

    async with field_of(speed=120) as field:
        await field.bot.run()
        room = field.server.room("invite" if pattern == JOIN else "join")
        with field.proxy.inject(refuse, pattern):
            room.command("hello")
            await eventually(lambda: times and times[-1] - times[0] > 660)
            # An answer that takes longer than 5 s, as it seems if this machine is busy, is waiting
            # too: then it begins anew.
            assert 10 < len(times) < 150
            assert max(later - earlier for earlier, later in pairwise(times)) > 10
        await room.answers("hello")
        assert "Gave up" not in field.bot.log
        assert field.bot.log.count("Trouble with") == 1
        await field.bot.logs("No more trouble with")


async def test_failures_before_and_after_a_limit_are_not_one_trouble() -> None:
    """A reply that fails, is limited for twenty minutes and fails once more is not given up."""
    statuses: list[int] = []
    began = 0.0

    async def refuse(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        nonlocal began
        began = began or field.now()
        if statuses.count(500) == 2:
            return await proxy.forward(request)
        is_limited = bool(statuses) and field.now() - began < 1200
        statuses.append(429 if is_limited else 500)
        fault = faults.rate_limited(60_000) if is_limited else faults.internal_error
        return await fault(proxy, request)

    async with field_of(speed=120) as field:
        await field.bot.run()
        room = field.server.room()
        with field.proxy.inject(refuse, SEND):
            room.command("hello")
            await room.answers("hello", seconds=60)
        assert statuses.count(500) == 2
        assert statuses.count(429) > 3


YEARS = ("1994", "9" * 30)


async def test_what_retry_after_may_hold_is_understood() -> None:
    """Seconds or a date, with 429 as with 503; what is neither counts as no time told."""
    await together(
        *(retry_is_after(3, "3", status) for status in (429, 503)),
        *(retry_is_after(3, None, status) for status in (429, 503)),
        *(
            retry_is_after(0, odd, 429)
            for odd in ("soon", "-7", "nan", "", *(f"Sun, 06 Nov {y} 08:49:37 GMT" for y in YEARS))
        ),
        *(retry_is_after(0, "", 429, ms) for ms in (-(10**400), -1, True, "3000", [3000])),
        retry_is_after(120, "", 429, 10**400, speed=120),
    )


async def retry_is_after(
    seconds: int, told: str | None, status: int, ms: Any = None, speed: int = 1
) -> None:
    """Assert that a send is repeated after so many s if that is told, or (None) as a date."""
    told_at = 0.0

    async def refuse(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        nonlocal told_at
        told_at = time.time()
        # A date has no fractions: it may be up to a second less.
        date = formatdate(told_at + seconds + 0.9, usegmt=True)
        headers = {"Retry-After": date if told is None else told}
        limit = {"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": ms}
        return web.json_response(limit, status=status, headers=headers)

    async with field_of(speed=speed) as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(refuse, SEND, times=1) as refused:
            room.command("hello")
            await room.answers("hello", seconds=10)
            assert seconds - 0.2 < (time.time() - told_at) * speed < seconds + 3 * speed
            assert refused.happened == 1
