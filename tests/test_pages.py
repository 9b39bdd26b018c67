"""What a limited timeline leaves out is read, whatever the homeserver's pages are like."""

from aiohttp import web
from support.bot import together
from support.proxy import MESSAGES, SYNC, Proxy
from support.scripted import ALICE, CONDUIT, DENDRITE, JSON, Manners, field_of

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
