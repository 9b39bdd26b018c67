"""Rate limits are waited out: everything is answered, as fast as the homeserver allows."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import support.proxy as faults
from support.bot import Bot, together
from support.homeserver import Homeserver, running_homeserver
from support.people import People
from support.proxy import JOIN, SEND, Proxy
from support.scripted import field_of

# Synapse's limits for messages, but 15 times as fast.
PER_SECOND, BURST = 3, 10


@pytest.fixture
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
    expected = [f"{n}.{number}" for n in range(BURST) for number in range(4)]
    assert await rooms[0].replies(40) == expected
    assert await rooms[1].replies(10) == [f"{n}.4" for n in range(BURST)]
    first, second = [
        [event["origin_server_ts"] / 1000 for event in await room.events()] for room in rooms
    ]
    allowed = (50 - BURST) / PER_SECOND
    assert allowed * 0.9 < max(first + second) - started < allowed * 1.25
    assert sum(moment < second[-1] for moment in first) <= 35, "the second room was starved"


async def test_limited_rooms_do_not_rush(people: People, proxied_bot: Bot, proxy: Proxy) -> None:
    """24 rooms that meet the limit together get on, but do not all ask again for each reply."""
    rooms = [await people.invite(await people.user(f"sender{n}-")) for n in range(24)]
    await proxied_bot.run()
    await proxied_bot.logs("Joined", times=len(rooms))
    await asyncio.gather(*[room.command("hello") for room in rooms])
    for room in rooms:
        assert await room.replies(1) == ["hello"]
    assert len(rooms) + 5 < proxy.count(SEND) < 2.5 * len(rooms)
    times = [(await room.events())[0]["origin_server_ts"] / 1000 for room in rooms]
    assert max(times) - min(times) < 2 * (len(rooms) - BURST) / PER_SECOND


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
        assert "WARNING" not in field.bot.log
