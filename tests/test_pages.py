"""What a limited timeline leaves out is read, whatever the homeserver's pages are like."""

import sys
from typing import Any

import support.proxy as faults
from aiohttp import web
from support.bot import eventually, together
from support.proxy import MESSAGES, SYNC, Proxy
from support.scripted import ALICE, CONDUIT, DENDRITE, IGNORED, JSON, SYNAPSE, Manners, field_of

# What pages may do: hold as few events as one; tell no start; tell an end where there is no more,
# the same, another each time, or that of the newest one; say null for an empty list.
PAGES: list[tuple[Manners, JSON]] = [
    *((CONDUIT, {"page_limit": limit}) for limit in (1, 3)),
    *((DENDRITE, {"page_limit": 5, "last_end": end}) for end in ("", "round", "other")),
    (CONDUIT, {"page_limit": 5, "last_end": "t0"}),
    (CONDUIT, {"page_limit": 7, "last_end": "t0", "empty": "null"}),
]


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
            await old[count].answers(*range(count), seconds=40)
            await new[count].answers(*range(count), seconds=40)
        assert field.proxy.count(MESSAGES) >= 6


async def test_pages_that_never_end() -> None:
    """Where what was known is purged while it is searched, they are not read for ever."""
    async with field_of(DENDRITE, speed=120, last_end="other") as field:
        endless, other = [field.server.room() for _ in range(2)]
        await field.bot.run()
        await field.bot.kill()
        since, position = field.bot.next_batch, field.server.position
        endless.command(*range(12))

        async def purge() -> None:
            endless.hidden_until = position

        with field.proxy.inject(faults.hold(purge), f"{MESSAGES}(?!.*from={since}&)") as read:
            await field.bot.start()
            await read.happens(2)
            other.command("hello")
            await other.answers("hello", seconds=5)
            await endless.answers(*range(12), seconds=60)
            assert read.happened < 100
        endless.command("after")
        await endless.answers(*range(12), "after")


async def test_hidden_history_is_not_read_through() -> None:
    """Where 600 pages are empty, since the bot may not see what precedes its join, it stops."""
    await together(*(hidden_history_costs_little(each) for each in (SYNAPSE, DENDRITE, CONDUIT)))


async def hidden_history_costs_little(manners: Manners) -> None:
    """Assert that of one homeserver: what it shows is answered within seconds."""
    async with field_of(manners, hides_history=True, page_limit=1) as field:
        room = field.server.room("leave")
        room.say(*["hidden"] * 600)
        await field.bot.run()
        room.set_membership("invite", ALICE)
        await field.bot.logs("Joined")
        room.command(*range(15))
        await room.answers(*range(15))
        assert field.proxy.count(MESSAGES) < 40
        await field.bot.kill()
        room.command("after")
        await field.bot.start()
        await room.answers(*range(15), "after")


async def test_timeline_that_no_page_has_is_no_hole_for_ever() -> None:
    """However long a worker for pages lags, what they have is read in the end."""
    async with field_of(CONDUIT, speed=10) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        room.command(*range(3))
        room.say(*["chat"] * 20)
        field.server.pages_up_to = field.server.position - 20
        await field.bot.start()
        await room.answers(*range(3))


async def test_reading_ends_where_only_history_precedes() -> None:
    """After 2,000 messages: at the invitation, a join without one, or the last that has a reply."""
    kinds = {"invitation": DENDRITE, "join": SYNAPSE, "reply": SYNAPSE}
    await together(*(history_is_left(kind, manners) for kind, manners in kinds.items()))


async def history_is_left(kind: str, manners: Manners) -> None:
    """Assert that it takes few pages and no old command is answered."""
    async with field_of(manners, timeline_limit=10) as field:
        room = field.server.room("join" if kind == "reply" else "leave")
        room.command("old")
        room.say(*["old"] * 1999)
        await field.bot.run()
        answered = ["known"] if kind == "reply" else []
        room.command(*answered)
        await room.answers(*answered)
        next_batch = field.bot.next_batch
        await field.bot.kill()
        if kind == "reply":  # The homeserver does not know the position any more.
            (field.bot.state / "next_batch").write_text(f"{next_batch}\n{room.room_id} garbage\n")
        else:
            room.set_membership("invite" if kind == "invitation" else "join", ALICE)
        room.command(*range(12))
        await field.bot.start()
        await room.answers(*answered, *range(12))
        room.command("after")
        await room.answers(*answered, *range(12), "after")
        assert 0 < field.proxy.count(MESSAGES) <= 10


async def test_gap_takes_few_requests() -> None:
    """A hundred events a page and a few more: 1,000 messages, some commands, take up to 15."""
    await together(*(gap_takes_few_requests(each) for each in (SYNAPSE, DENDRITE, CONDUIT)))


async def gap_takes_few_requests(manners: Manners) -> None:
    """Assert that of one homeserver."""
    async with field_of(manners, timeline_limit=10) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        for n in range(10):
            room.say(*["chat"] * 99)
            room.command(n)
        await field.bot.start()
        await room.answers(*range(10))
        assert 10 <= field.proxy.count(MESSAGES) <= 15


async def test_worker_that_lags_loses_no_command() -> None:
    """Where the first page ends before the timeline begins, the hole is noticed and filled."""
    cases = [
        (manners, kind) for manners in (SYNAPSE, DENDRITE, CONDUIT) for kind in ("gap", "join")
    ]
    await together(*(hole_is_filled(*case) for case in cases))


async def hole_is_filled(manners: Manners, kind: str) -> None:
    """Assert that for 12 commands of a downtime, or around a join."""
    async with field_of(manners, timeline_limit=10) as field:
        room = field.server.room("join" if kind == "gap" else "leave")
        room.say("history")
        await field.bot.run()
        await field.bot.kill()
        if kind == "join":
            room.set_membership("invite", ALICE)
            room.command(*range(12))
            # At last nothing of what the timeline has is there, and then not even the invitation.
            field.server.pages_up_to = field.server.position - 12
        else:
            room.command(*range(12))
            field.server.pages_up_to = field.server.position - 11
        await field.bot.start()
        await field.proxy.counts(MESSAGES, 4)
        assert not room.replies
        field.server.pages_up_to = float("inf")
        await room.answers(*range(12), seconds=60)


async def test_bytes_that_are_no_utf8() -> None:
    """In an event of a sync response, and of a page, they cost at most that event."""
    odd = (b"\xff\xfe", b"\xe4", b"\xed\xa0\x80", b"\xf0\x9f\x98")
    await together(*(costs_at_most_its_event(b'"%b"' % text) for text in odd))


async def test_lists_that_nest_deeply() -> None:
    """In an event of a sync response, and of a page, 9,000 of them cost at most that event."""
    depth = 1400 if sys.version_info[:2] == (3, 12) else 9000  # Its limit can't be set.
    await costs_at_most_its_event(depth * b"[" + depth * b"]")


async def costs_at_most_its_event(odd: bytes) -> None:
    """Assert that of some JSON."""

    async def spoil(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        answer = await proxy.forward(request, plain=True)
        assert isinstance(answer.body, bytes)
        spoilt.append(b'"SPOILT"' in answer.body)
        answer.body = answer.body.replace(b'"SPOILT"', odd)
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


async def test_newest_event_may_be_one_that_the_bot_does_not_see() -> None:
    """Where it is what an ignored user said, nothing from before the first start is answered."""
    await together(*(nothing_old_is_answered(manners) for manners in (SYNAPSE, DENDRITE, CONDUIT)))


async def nothing_old_is_answered(manners: Manners) -> None:
    """Assert that on one homeserver."""
    async with field_of(manners, timeline_limit=10) as field:
        room = field.server.room()
        room.command("old")
        await field.bot.run()
        room.add("m.room.message", IGNORED, {"msgtype": "m.text", "body": "!replybot ignored"})
        other = field.server.room()
        other.command("hello")
        await other.answers("hello")
        await eventually(lambda: int(field.bot.next_batch[1:]) >= field.server.position - 1)
        await field.bot.kill()
        room.command(*range(12))
        await field.bot.start()
        await room.answers(*range(12))


async def test_late_event_whose_place_is_below_all_that_was_known() -> None:
    """It comes with the timeline, and the page that ends with the known has it still below."""
    kinds = (SYNAPSE, DENDRITE, CONDUIT)
    await together(*(late_event_is_answered(manners) for manners in kinds))


async def late_event_is_answered(manners: Manners) -> None:
    """Assert that on one homeserver."""

    def move(page: Any) -> Any:
        if len(page["chunk"]) > 12:  # not what was known, which is a few
            late = [event for event in page["chunk"] if "late" in str(event["content"])]
            page["chunk"] = [event for event in page["chunk"] if event not in late] + late
            moved.extend(late)
        return page

    moved: list[JSON] = []
    async with field_of(manners, timeline_limit=10) as field:
        room = field.server.room()
        room.say("known")
        await field.bot.run()
        await field.bot.kill()
        room.command(*range(12), "late", "last")
        with field.proxy.inject(faults.rewrite(move), MESSAGES):
            await field.bot.start()
            await room.answers(*range(12), "late", "last")
        assert moved
