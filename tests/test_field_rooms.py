"""What rooms and their homeservers are seen to do in the field costs no command and no rush."""

import asyncio
import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import Bot, together
from support.people import Room
from support.proxy import JOIN, MESSAGES, SEND, SYNC, Fault, Proxy
from support.scripted import CONDUIT, DENDRITE, Manners, field_of

FORBIDDEN = faults.answer(403, {"errcode": "M_FORBIDDEN", "error": "You are not invited"})
NOT_FOUND = faults.answer(404, {"errcode": "M_NOT_FOUND", "error": "Unknown room"})
LEAVE = r"POST .*/leave"
REFUSALS = [FORBIDDEN, NOT_FOUND, faults.bad_gateway]


async def test_room_joined_in_part_is_asked_for(room: Room, proxied_bot: Bot, proxy: Proxy) -> None:
    """On Synapse: every sync that can bring commands asks for rooms that are joined in part."""
    await proxied_bot.run()
    await room.command("hello")
    assert await room.replies(1) == ["hello"]
    queries = [
        parse_qs(urlsplit(request).query) for request in proxy.requests if "/sync?" in request
    ]
    filters = [json.loads(query["filter"][0]) for query in queries]
    assert filters
    assert all(only["room"]["state"].get("lazy_load_members") is True for only in filters)


async def test_join_refused_for_a_moment() -> None:
    """Refused three times after the invitation, the join is made within seconds."""
    await together(*map(join_is_refused_for_a_moment, REFUSALS))


async def join_is_refused_for_a_moment(refusal: Fault) -> None:
    """Assert that of one way to refuse."""
    async with field_of() as field:
        await field.bot.run()
        with field.proxy.inject(refusal, JOIN, times=3) as refused:
            room = field.server.room("invite")
            room.command("hello")
            await room.answers("hello", seconds=15)
            assert refused.happened == 3


@pytest.mark.parametrize("repeats", [False, True], ids=["told once", "told in every sync"])
async def test_join_refused_for_good_is_given_up_quietly(repeats: bool) -> None:
    """Tried for a minute (ten if it is no refusal), seldom, told once; the rest goes on."""
    await together(*(join_is_given_up(refusal, repeats) for refusal in REFUSALS))


async def join_is_given_up(refusal: Fault, repeats: bool) -> None:
    """Assert that of one way to refuse."""
    async with field_of(speed=60, repeats_invitations=repeats) as field:
        good = field.server.room()
        await field.bot.run()
        with field.proxy.inject(refusal, JOIN) as refused:
            bad = field.server.room("invite")
            began = field.now()
            await field.bot.logs(f"Gave up on joining {bad.room_id}", seconds=20)
            earliest, latest = (540, 900) if refusal is faults.bad_gateway else (45, 240)
            assert earliest < field.now() - began < latest
            await asyncio.sleep(4)  # Four more minutes in which it might rush.
            assert 3 < refused.happened < 40
        good.command("hello")
        await good.answers("hello")
        assert len([line for line in field.bot.log.splitlines() if bad.room_id in line]) <= 3


@pytest.mark.parametrize("inviters", ["*", "@owner:echobot.test"], ids=["accepted", "rejected"])
async def test_invitation_in_every_sync_makes_no_rush(inviters: str) -> None:
    """One that can be neither accepted nor rejected is tried now and then, and told once."""
    await together(*(invitation_makes_no_rush(refusal, inviters) for refusal in REFUSALS))


async def invitation_makes_no_rush(refusal: Fault, inviters: str) -> None:
    """Assert that of one way to refuse."""
    async with field_of(repeats_invitations=True) as field:
        field.bot.environment["MATRIX_INVITERS"] = inviters
        good = field.server.room()
        await field.bot.run()
        with field.proxy.inject(refusal, JOIN if inviters == "*" else LEAVE) as refused:
            bad = field.server.room("invite")
            await refused.happens()
            before, began = field.proxy.count(SYNC), field.now()
            await asyncio.sleep(5)  # The time in which it might rush.
            assert field.proxy.count(SYNC) - before <= 2 * (field.now() - began) + 2
            assert refused.happened < 10
            good.command("hello")
            await good.answers("hello", seconds=5)
        assert len([line for line in field.bot.log.splitlines() if bad.room_id in line]) == 1


@pytest.mark.parametrize("times", [1, 3])
async def test_read_refused_for_a_moment(times: int) -> None:
    """What was said since the invitation is answered although the first reads are refused."""
    await together(*(read_is_refused_for_a_moment(refusal, times) for refusal in REFUSALS))


async def read_is_refused_for_a_moment(refusal: Fault, times: int) -> None:
    """Assert that of one way to refuse."""
    async with field_of(DENDRITE) as field:
        await field.bot.run()
        with field.proxy.inject(refusal, MESSAGES, times=times) as refused:
            room = field.server.room("invite")
            room.command(*range(14))
            await room.answers(*range(14))
            assert refused.happened == times


@pytest.mark.parametrize("page_limit", [1, 3, 100])
async def test_page_that_stops_early(page_limit: int) -> None:
    """Where pages stop before `to`, the newest event is taken from the timeline, each one once."""
    async with field_of(CONDUIT, page_limit=page_limit) as field:
        rooms = {count: field.server.room() for count in (11, 12, 21)}
        await field.bot.run()
        await field.bot.kill()
        for count, room in rooms.items():
            room.command(*range(count))
        await field.bot.start()
        for count, room in rooms.items():
            await room.answers(*range(count))
        assert field.proxy.count(MESSAGES) >= len(rooms)


async def test_page_without_start_or_end() -> None:
    """Pages are read whether they tell their start and the last one an end or not."""
    either = (True, False)
    await together(*(pages_are_read(start, end) for start in either for end in either))


async def pages_are_read(start: bool, end: bool) -> None:
    """Assert that of pages that tell these or not."""
    async with field_of(
        DENDRITE, page_limit=5, start_in_pages=start, end_in_last_page=end
    ) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        room.command(*range(12))
        await field.bot.start()
        await room.answers(*range(12))
        assert field.proxy.count(MESSAGES) >= 3


async def test_pages_without_end() -> None:
    """A gap whose pages never end is no rush, and ends; other rooms go on at once."""
    # Another each time, one that goes back, and the same.
    await together(*map(gap_ends, (None, "s2", "s14")))


async def gap_ends(end: str | None) -> None:
    """Assert that where pages end so."""

    def change(page: dict[str, object]) -> dict[str, object]:
        return {**page, "end": end} if end and not page["chunk"] else page

    async with field_of(DENDRITE, speed=60, pages_without_end=not end) as field:
        endless, other = field.server.room(), field.server.room()
        await field.bot.run()
        await field.bot.kill()
        position = field.bot.next_batch
        endless.command(*range(12))
        with field.proxy.inject(faults.rewrite(change), MESSAGES) as changed:
            await field.bot.start()
            await changed.happens()
            other.command("hello")
            await other.answers("hello")
            await field.bot.saves(position, seconds=20)
            # Where it goes round at once, else at most one for each of 600 s.
            assert changed.happened <= (3 if end else 700)
            await endless.answers(*range(12))
        endless.command("after")
        await endless.answers(*range(12), "after")


async def test_room_limited_for_ever_holds_up_no_other() -> None:
    """While one room gets 429 each time, four others that met one 429 go on within seconds."""
    await together(*map(limited_room_holds_up_no_other, (SEND, JOIN)))


async def limited_room_holds_up_no_other(request_limited: str) -> None:
    """Assert that where its sends or its joins are limited."""
    async with field_of() as field:
        await field.bot.run()
        membership = "join" if request_limited == SEND else "invite"
        rooms = [field.server.room(membership) for _ in range(5)]
        if request_limited == SEND:
            await field.bot.saves()
        limit = faults.rate_limited(1000)
        with (
            field.proxy.inject(limit, request_limited_to(rooms[0].room_id, request_limited)) as one,
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


def request_limited_to(room_id: str, pattern: str) -> str:
    """Return the pattern of the requests of a kind that are about a room."""
    return f"(?=.*{re.escape(room_id[1:].partition(':')[0])}[^0-9])" + pattern


@pytest.mark.parametrize("manners", [DENDRITE, CONDUIT], ids=["dendrite", "conduit"])
async def test_transaction_id_behind_a_proxy_that_decodes_paths(manners: Manners) -> None:
    """Event IDs of room version 3, with / and +, lose no reply where %2F is taken for a /."""
    async with field_of(manners, decodes_paths=True, room_version_3=True) as field:
        room = field.server.room()
        await field.bot.run()
        event_ids = [room.command(n) for n in range(20)]
        await room.answers(*range(20))
        assert any("/" in event_id for event_id in event_ids)


@pytest.mark.parametrize("where", [SYNC, MESSAGES], ids=["sync", "messages"])
async def test_bytes_that_are_no_utf8(where: str) -> None:
    """One event with bytes that are no UTF-8 costs at most itself."""
    odd = (b"\xff\xfe", b"\xe4", b"\xed\xa0\x80", b"\xf0\x9f\x98")
    await together(*(bytes_cost_at_most_their_event(some, where) for some in odd))


async def bytes_cost_at_most_their_event(odd: bytes, where: str) -> None:
    """Assert that of some bytes in an answer to a sync, or in a page."""

    async def spoil(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        answer = await proxy.forward(request, plain=True)
        assert isinstance(answer.body, bytes)
        spoilt.append(b"SPOILT" in answer.body)
        answer.body = answer.body.replace(b"SPOILT", odd)
        return answer

    spoilt: list[bool] = []
    async with field_of(DENDRITE) as field:
        room = field.server.room()
        with field.proxy.inject(spoil, where):
            await field.bot.run()
            if where == MESSAGES:
                await field.bot.kill()
            room.command("one")
            room.say("SPOILT")
            room.command(*range(14 if where == MESSAGES else 2))
            if where == MESSAGES:
                await field.bot.start()
            await room.answers("one", *range(14 if where == MESSAGES else 2))
            assert any(spoilt)


async def test_polls_that_return_at_once() -> None:
    """Where polls return at once with nothing new, the bot makes at most two a second."""
    async with field_of(holds_polls=False) as field:
        room = field.server.room()
        await field.bot.run()
        before, began = field.proxy.count(SYNC), field.now()
        await asyncio.sleep(5)  # The time in which it might rush.
        assert field.proxy.count(SYNC) - before <= 2 * (field.now() - began) + 2
        room.command("hello")
        await room.answers("hello", seconds=5)


async def test_busy_stream_is_not_slowed() -> None:
    """40 commands, each said when the one before was answered, take less than four seconds."""
    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        began = field.now()
        for n in range(40):
            room.command(n)
            await room.answers(*range(n + 1))
        assert field.now() - began < 4
