"""What rooms and their homeservers are seen to do in the field costs no command and no rush."""

import asyncio

import pytest
import support.proxy as faults
from aiohttp import web
from support.bot import together
from support.proxy import JOIN, MESSAGES, SEND, SYNC, Fault, Proxy
from support.scripted import ALICE, CONDUIT, DENDRITE, JSON, SYNAPSE, Manners, field_of

FORBIDDEN = faults.answer(403, {"errcode": "M_FORBIDDEN", "error": "You are not invited"})
NOT_FOUND = faults.answer(404, {"errcode": "M_NOT_FOUND", "error": "Unknown room"})
LEAVE = r"POST .*/leave"
OWNER = "@owner:echobot.test"  # who invites nobody
REFUSALS = [FORBIDDEN, NOT_FOUND, faults.bad_gateway]


async def test_room_joined_in_part_is_answered() -> None:
    """Of a large room of others, which the homeserver is still joining, commands are news."""
    async with field_of() as field:
        room = field.server.room("invite")
        room.is_joined_in_part = True
        await field.bot.run()
        await field.bot.logs("Joined")
        room.command("hello")
        await room.answers("hello")


@pytest.mark.parametrize(
    ("pattern", "times"), [(JOIN, 3), (MESSAGES, 1), (MESSAGES, 3)], ids=["join", "read", "reads"]
)
async def test_join_or_read_refused_for_a_moment(pattern: str, times: int) -> None:
    """Refused just after the invitation, it is made within seconds: all since is answered."""
    await together(*(request_is_refused(refusal, pattern, times) for refusal in REFUSALS))


async def request_is_refused(refusal: Fault, pattern: str, times: int) -> None:
    """Assert that of one way to refuse."""
    async with field_of(DENDRITE) as field:
        await field.bot.run()
        with field.proxy.inject(refusal, pattern, times=times) as refused:
            room = field.server.room("invite")
            room.command(*range(14))
            await room.answers(*range(14), seconds=15)
            assert refused.happened == times


@pytest.mark.parametrize("repeats", [False, True], ids=["told once", "told in every sync"])
async def test_invitation_refused_for_good_is_given_up_quietly(repeats: bool) -> None:
    """Tried for ten minutes of syncs that work, seldom, told once; the rest goes on."""
    cases = [(refusal, "*") for refusal in REFUSALS] + [(FORBIDDEN, OWNER)]
    await together(*(invitation_is_given_up(*case, repeats) for case in cases))


async def invitation_is_given_up(refusal: Fault, inviters: str, repeats: bool) -> None:
    """Assert that of one way to refuse that it is accepted, or that it is rejected."""
    async with field_of(speed=60, repeats_invitations=repeats) as field:
        field.bot.environment["MATRIX_INVITERS"] = inviters
        good = field.server.room()
        await field.bot.run()
        with field.proxy.inject(refusal, LEAVE if inviters == OWNER else JOIN) as refused:
            bad = field.server.room("invite")
            began = field.now()
            await field.bot.logs("Gave up on", seconds=20)
            assert 540 < field.now() - began < 900
            await asyncio.sleep(4)  # Four more minutes in which it might rush.
            assert 3 < refused.happened < 40
        good.command("hello")
        await good.answers("hello")
        assert len([line for line in field.bot.log.splitlines() if bad.room_id in line]) <= 3


# What pages may do: hold as few events as one; tell no start; tell an end where there is no more,
# the same, another each time, or that of the newest one; say null for an empty list.
PAGES: list[tuple[Manners, JSON]] = [(CONDUIT, {"page_limit": limit}) for limit in (1, 3, 100)]
PAGES += [
    (manners, {"page_limit": 5, "last_end": end})
    for manners in (DENDRITE, CONDUIT)
    for end in ("", "t0", "round", "other")
]
PAGES += [(CONDUIT, {"empty": "null", "last_end": "t0", "page_limit": limit}) for limit in (1, 7)]


async def test_pages_of_any_kind_are_read() -> None:
    """Of gaps of 11, 12 and 21 commands all are answered once, whatever the pages are like."""
    await together(*(gaps_are_read(*pages) for pages in PAGES))


async def gaps_are_read(manners: Manners, changes: JSON) -> None:
    """Assert that of one kind of pages, where events are known at the position of before or not."""
    async with field_of(manners, **changes) as field:
        old = {count: field.server.room() for count in (11, 12, 21)}
        new = {count: field.server.room("leave") for count in (11, 12, 21)}
        for room in old.values():
            room.say("known")
        await field.bot.run()
        await field.bot.kill()
        for count in old:
            new[count].command("history")
            new[count].set_membership("invite", ALICE)
            old[count].command(*range(count))
            new[count].command(*range(count))
        await field.bot.start()
        for count in old:
            await old[count].answers(*range(count))
            await new[count].answers(*range(count))
        assert field.proxy.count(MESSAGES) >= 6


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


@pytest.mark.parametrize("manners", [DENDRITE, CONDUIT], ids=["dendrite", "conduit"])
async def test_transaction_id_behind_a_proxy_that_decodes_paths(manners: Manners) -> None:
    """Event IDs of room version 3, with / and +, lose no reply where %2F is taken for a /."""
    async with field_of(manners, decodes_paths=True, room_version_3=True) as field:
        room = field.server.room()
        await field.bot.run()
        event_ids = [room.command(n) for n in range(20)]
        await room.answers(*range(20))
        assert any("/" in event_id for event_id in event_ids)


async def test_bytes_that_are_no_utf8() -> None:
    """In an event of a sync response, and of a page, they cost at most that event."""
    odd = (b"\xff\xfe", b"\xe4", b"\xed\xa0\x80", b"\xf0\x9f\x98")
    await together(*map(bytes_cost_at_most_their_event, odd))


async def bytes_cost_at_most_their_event(odd: bytes) -> None:
    """Assert that of some bytes."""

    async def spoil(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        answer = await proxy.forward(request, plain=True)
        assert isinstance(answer.body, bytes)
        spoilt.append(b"SPOILT" in answer.body)
        answer.body = answer.body.replace(b"SPOILT", odd)
        return answer

    spoilt: list[bool] = []
    async with field_of(DENDRITE) as field:
        room = field.server.room()
        with field.proxy.inject(spoil, f"{SYNC}|{MESSAGES}"):
            await field.bot.run()
            room.say("SPOILT", "!replybot live")
            await room.answers("live")
            await field.bot.kill()
            room.say("SPOILT")
            room.command(*range(14))
            await field.bot.start()
            await room.answers("live", *range(14))
            assert sum(spoilt) >= 2


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
    """40 commands, each said when the one before was answered, take less than four seconds."""
    async with field_of() as field:
        room = field.server.room()
        await field.bot.run()
        began = field.now()
        for n in range(40):
            room.command(n)
            await room.answers(*range(n + 1))
        assert field.now() - began < 4
