"""Every command is answered once on homeservers with other manners than Synapse's, too."""

import pytest
import support.proxy as faults
from support.bot import eventually
from support.proxy import JOIN, SEND
from support.scripted import ALICE, CONDUIT, DENDRITE, Manners, field_of
from test_owed_replies import families, is_past


@families
async def test_burst(manners: Manners) -> None:
    """40 commands at once in each of three rooms, more than a timeline holds, come out in order."""
    async with field_of(manners) as field:
        rooms = [field.server.room() for _ in range(3)]
        await field.bot.run()
        for n in range(40):
            for room in rooms:
                room.command(n)
        for room in rooms:
            await room.answers(*range(40))


@families
@pytest.mark.parametrize("count", [1, 9, 10, 11, 12, 101, 250])
async def test_downtime(manners: Manners, count: int) -> None:
    """So many commands while the bot was down, what fits a timeline or not, come out in order."""
    async with field_of(manners) as field:
        room = field.server.room()
        await field.bot.run()
        await field.bot.kill()
        room.command(*range(count))
        await field.bot.start()
        await room.answers(*range(count))
        room.command("after")
        await room.answers(*range(count), "after")


@families
async def test_kills(manners: Manners) -> None:
    """Killed after the 3rd, 13th, 14th ... send of 60 to two rooms, it loses and doubles none.

    The homeserver forgets all transaction IDs meanwhile, as after a restart or a password reset.
    """
    async with field_of(manners) as field:
        rooms = [field.server.room() for _ in range(2)]
        await field.bot.run()
        for sends, n in zip((3, 13, 14, 31, 47, 60), range(0, 60, 10), strict=True):
            for room in rooms:
                room.command(*range(n, n + 10))
            await field.proxy.counts(SEND, sends)
            await field.bot.kill()
            field.server.transactions.clear()
            await field.bot.start()
        for room in rooms:
            await room.answers(*range(60))


@families
async def test_commands_from_before_the_first_start_are_not_answered(manners: Manners) -> None:
    """Neither then nor when a gap is read back to where they are."""
    async with field_of(manners, timeline_limit=10) as field:
        room = field.server.room()
        room.command("old")
        await field.bot.run()
        room.say("chat")
        await is_past(field, field.server.position)
        await field.bot.kill()
        room.command(*range(12))
        await field.bot.start()
        await room.answers(*range(12))
        room.command("after")
        await room.answers(*range(12), "after")


@families
@pytest.mark.parametrize("when", ["running", "down", "killed after the join"])
async def test_invitation(manners: Manners, when: str) -> None:
    """Of a room, all since the invitation is answered, and nothing before."""
    async with field_of(manners) as field:
        # The one's first timeline has what precedes the invitation too, the other's not even that.
        rooms = {count: field.server.room("leave") for count in (3, 14)}
        await field.bot.run()
        if when == "down":
            await field.bot.kill()
        pattern = JOIN if when == "killed after the join" else "nothing"
        with field.proxy.inject(faults.done_but_silent, pattern) as joined:
            for count, room in rooms.items():
                room.command(*[f"old {n}" for n in range(9)])
                room.set_membership("invite", ALICE)
                room.command(*range(count))
            if when == "killed after the join":
                await joined.happens(times=2)
                await field.bot.kill()
        if when != "running":
            await field.bot.start()
        for count, room in rooms.items():
            await room.answers(*range(count))
            room.command("after")
            await room.answers(*range(count), "after")


@families
@pytest.mark.parametrize("when", ["running", "down", "first start"])
async def test_room_joined_from_elsewhere(manners: Manners, when: str) -> None:
    """Where the account is joined by other means, five old commands stay history, one is news."""
    async with field_of(manners) as field:
        room = field.server.room("leave")
        if when != "first start":
            await field.bot.run()
        if when == "down":
            await field.bot.kill()
        room.command(*range(5))
        room.set_membership("join")
        if when == "first start":
            room.command("before the first start")
            await field.bot.run()
        room.command("new")
        if when == "down":
            await field.bot.start()
        await room.answers("new")
        room.command("newer")
        await room.answers("new", "newer")


@families
@pytest.mark.parametrize("count", [1, 2], ids=["one room", "two rooms"])
async def test_backlog_shrinks_however_often_the_bot_dies(manners: Manners, count: int) -> None:
    """200 commands of a downtime, and three lives of 50 replies: what was done stays done."""
    async with field_of(manners) as field:
        rooms = [field.server.room() for _ in range(count)]
        await field.bot.run()
        await field.bot.kill()
        for room in rooms:
            room.command(*range(200 // count))
        hung = 0
        for _ in range(3):
            # After 50 sends in a life all more hang until it is killed.
            with (
                field.proxy.inject(faults.delay(0), SEND, times=50),
                field.proxy.inject(faults.silence, SEND) as hanging,
            ):
                await field.bot.start()
                await hanging.happens()
                await field.bot.kill()
                hung += hanging.happened
        await field.bot.start()
        for room in rooms:
            await room.answers(*range(200 // count))
        assert field.proxy.count(SEND) == 200 + hung, "what was done before a kill was done again"


@pytest.mark.parametrize("manners", [DENDRITE, CONDUIT], ids=["dendrite", "conduit"])
async def test_transaction_id_behind_a_proxy_that_decodes_paths(manners: Manners) -> None:
    """Event IDs of room version 3, with / and +, lose no reply where %2F is taken for a /."""
    async with field_of(manners, decodes_paths=True, room_version_3=True) as field:
        room = field.server.room()
        await field.bot.run()
        event_ids = [room.command(n) for n in range(20)]
        await room.answers(*range(20))
        assert any("/" in event_id for event_id in event_ids)


@families
async def test_encrypted_room_is_told_once_what_to_do(manners: Manners) -> None:
    """One notice, however many messages there are, and starts; what is in clear counts."""
    async with field_of(manners) as field:
        room = field.server.room()
        await field.bot.run()
        for _ in range(3):
            room.add("m.room.encrypted", ALICE, {"algorithm": "m.megolm.v1.aes-sha2"})
        room.command(*range(3))
        await eventually(lambda: len(room.replies) > 3)
        await field.bot.stop()
        await field.bot.start()
        room.add("m.room.encrypted", ALICE, {"algorithm": "m.megolm.v1.aes-sha2"})
        room.command(3)
        await eventually(lambda: len(room.replies) > 4)
        assert room.replies[1:] == ["0", "1", "2", "3"]
        assert field.proxy.count(SEND) == 6


@families
async def test_first_timeline_reaches_far_into_what_precedes_the_invitation(
    manners: Manners,
) -> None:
    """Of 250 old commands, more than a page has, none is answered; what follows is, once."""
    async with field_of(manners, timeline_limit=1000) as field:
        room = field.server.room("leave")
        await field.bot.run()
        room.command(*[f"old {n}" for n in range(250)])
        room.set_membership("invite", ALICE)
        room.command(*range(3))
        await room.answers(*range(3))
        room.command("after")
        await room.answers(*range(3), "after")
