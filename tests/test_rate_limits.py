"""Rate limits are waited out: everything is answered, as fast as the homeserver allows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import support.proxy as faults
from conftest import People, new_people
from support.bot import Bot, new_bot
from support.homeserver import Homeserver, User, running_homeserver
from support.proxy import Proxy, running_proxy

# Synapse's limits for messages, but 15 times as fast.
PER_SECOND, BURST = 3, 10


@pytest.fixture(scope="module")
async def limited_homeserver() -> AsyncIterator[Homeserver]:
    """A homeserver that limits how fast messages may be sent."""
    limit = {"per_second": PER_SECOND, "burst_count": BURST}
    async with running_homeserver({"rc_message": limit}) as homeserver:
        yield homeserver


@pytest.fixture
async def limited_people(limited_homeserver: Homeserver) -> People:
    """An account for the bot, and people, on a homeserver that limits them."""
    return await new_people(limited_homeserver)


async def test_synapse_limits_cost_no_reply_and_starve_no_room(limited_people: People) -> None:
    """40 commands in a room, 10 in another: answered in order, as fast as the limit allows."""
    people = limited_people
    # Who sends is limited too: each of them uses up one burst.
    senders = [await people.user(f"user{n}-") for n in range(5)]
    rooms = [await people.room_with_bot(*senders[:4]), await people.room_with_bot(senders[4])]
    async with new_bot(people.homeserver.url, MATRIX_USER=people.bot_id) as bot:
        await bot.run()
        started = time.time()
        for n in range(BURST):
            for number, sender in enumerate(senders):
                await sender.send(rooms[number // 4], f"!replybot {n}.{number}")
        expected = [f"{n}.{number}" for n in range(BURST) for number in range(4)]
        assert await people.replies(senders[0], rooms[0], 40, 60) == expected
        assert await people.replies(senders[4], rooms[1], 10, 60) == [
            f"{n}.4" for n in range(BURST)
        ]
    first = await reply_times(people, senders[0], rooms[0])
    second = await reply_times(people, senders[4], rooms[1])
    allowed = (50 - BURST) / PER_SECOND
    assert allowed * 0.9 < max(first + second) - started < allowed * 1.25
    assert sum(moment < second[-1] for moment in first) <= 30, "the second room was starved"


async def test_limited_rooms_do_not_rush(limited_people: People) -> None:
    """Of 24 rooms that meet the limit together one asks at a time, not all for each reply."""
    people = limited_people
    async with (
        running_proxy(people.homeserver.url) as proxy,
        new_bot(proxy.url, MATRIX_USER=people.bot_id) as bot,
    ):
        senders = [await people.user(f"sender{n}-") for n in range(24)]
        await bot.run()
        rooms = [(user, await user.create_room(people.bot_id)) for user in senders]
        await bot.logs("Joined", times=len(rooms))
        await asyncio.gather(*[user.send(room_id, "!replybot hello") for user, room_id in rooms])
        for user, room_id in rooms:
            assert await people.replies(user, room_id, 1) == ["hello"]
        assert len(rooms) + 5 < proxy.count(faults.SEND) < 2.5 * len(rooms)


async def reply_times(people: People, reader: User, room_id: str) -> list[float]:
    """Return when the bot's messages in a room reached the homeserver, in s since the epoch."""
    return [
        event["origin_server_ts"] / 1000
        for event in await reader.events(room_id)
        if event["sender"] == people.bot_id
    ]


@pytest.mark.parametrize(
    "fault", [faults.rate_limited(2000), faults.rate_limited_by_header(2)], ids=["body", "header"]
)
@pytest.mark.parametrize("pattern", [faults.SEND, faults.POLL], ids=["send", "sync"])
async def test_429_is_waited_out_as_told(
    people: People, alice: User, proxied_bot: Bot, proxy: Proxy, fault: faults.Fault, pattern: str
) -> None:
    """Told to wait, in the body or only by Retry-After, the bot asks again then and not before."""
    room_id = await people.room_with_bot(alice)
    await proxied_bot.run()
    await alice.send(room_id, "!replybot warm-up")
    await people.replies(alice, room_id, 1)
    with proxy.inject(fault, pattern, times=1) as limited:
        await alice.send(room_id, "!replybot hello")
        if pattern == faults.POLL:
            # The poll that was out has brought the first; the next is refused.
            await people.replies(alice, room_id, 2)
            await alice.send(room_id, "!replybot again")
        started = time.monotonic()
        count = 2 + (pattern == faults.POLL)
        assert len(await people.replies(alice, room_id, count)) == count
        assert 1.5 < time.monotonic() - started < 4
        assert limited.happened == 1
