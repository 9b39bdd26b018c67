"""An invitation is followed as soon as that works, whatever became of an earlier one."""

import asyncio

import pytest
import support.proxy as faults
from support.bot import eventually, together
from support.proxy import JOIN, MESSAGES, POLL, SEND, Fault
from support.scripted import ALICE, DENDRITE, Field, Room, field_of

FORBIDDEN = faults.answer(403, {"errcode": "M_FORBIDDEN", "error": "You are not invited"})
NOT_FOUND = faults.answer(404, {"errcode": "M_NOT_FOUND", "error": "Unknown room"})
LEAVE = r"POST .*/leave"
OWNER = "@owner:echobot.test"  # who invites nobody
REFUSALS = [FORBIDDEN, NOT_FOUND, faults.bad_gateway]


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


@pytest.mark.long
@pytest.mark.parametrize("repeats", [False, True], ids=["told once", "told in every sync"])
async def test_invitation_refused_for_good_is_given_up_quietly(repeats: bool) -> None:
    """Tried for ten minutes of syncs that work, seldom, told once; the rest goes on."""
    # Where it is told in every sync there are a thousand of them, so that two cases have to do.
    cases = [(FORBIDDEN, "*"), (FORBIDDEN, OWNER)]
    cases += [] if repeats else [(refusal, "*") for refusal in (NOT_FOUND, faults.bad_gateway)]
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
            await field.bot.logs("Gave up on", seconds=60)
            # The more work this machine has, the less of the time a sync is waited for.
            assert 540 < field.now() - began < 1500
            await asyncio.sleep(4)  # Four more minutes in which it might rush.
            assert 3 < refused.happened < 40
        good.command("hello")
        await good.answers("hello")
        assert len([line for line in field.bot.log.splitlines() if bad.room_id in line]) <= 3


@pytest.mark.parametrize("repeats", [False, True], ids=["told once", "told in every sync"])
async def test_invited_again_is_followed_within_seconds(repeats: bool) -> None:
    """Whatever became of an earlier invitation, and of a reply that the room still owes."""
    await together(
        invited_again_unseen(repeats),
        invited_again_within_one_poll(repeats),
        invited_again_within_one_poll(repeats, first=OWNER),
        invited_again_while_a_reply_is_repeated(repeats),
        *(invited_after(end, repeats) for end in ("given up", "withdrawn", "followed")),
    )


async def invited_again_unseen(repeats: bool) -> None:
    """Kicked and invited again while no sync comes through."""
    async with field_of(repeats_invitations=repeats) as field:
        room = field.server.room("invite")
        await field.bot.run()
        await field.bot.logs("Joined")
        room.command("first")
        await room.answers("first")
        with field.proxy.inject(faults.bad_gateway, POLL) as down:
            room.say("this ends the poll before")
            await down.happens()
            room.command("before the kick")
            room.set_membership("leave", ALICE)
            room.command("nobody hears this")
            room.set_membership("invite", ALICE)
            room.command("invited")
        await room.answers("first", "before the kick", "invited", seconds=10)


async def invited_again_within_one_poll(repeats: bool, first: str = ALICE) -> None:
    """Kicked, or gone, and invited again before a response without the first invitation."""
    async with field_of(repeats_invitations=repeats) as field:
        field.bot.environment["MATRIX_INVITERS"] = ALICE
        room = field.server.room("leave")
        await field.bot.run()
        await field.proxy.counts(POLL, 1)
        may_come = asyncio.Event()
        with field.proxy.inject(faults.hold(may_come.wait), POLL) as held:
            room.set_membership("invite", first)
            await field.bot.logs("Joined" if first == ALICE else "Left")
            await held.happens()
            if first == ALICE:
                room.set_membership("leave", ALICE)
            room.set_membership("invite", ALICE)
            room.command("invited")
            may_come.set()
            await room.answers("invited", seconds=10)


async def invited_again_while_a_reply_is_repeated(repeats: bool) -> None:
    """Kicked and invited again while a reply is repeated: the join does not wait behind it."""
    async with field_of(repeats_invitations=repeats) as field:
        room = field.server.room()
        await field.bot.run()
        with field.proxy.inject(faults.internal_error, SEND) as failing:
            room.command("first")
            await failing.happens(4)
            room.set_membership("leave", ALICE)
            room.set_membership("invite", ALICE)
            await eventually(lambda: room.membership == "join", seconds=5)
            room.command("second")
        await room.answers("first", "second", seconds=60)


async def invited_after(end: str, repeats: bool) -> None:
    """Invited again after an earlier invitation came to an end."""
    async with field_of(speed=60, repeats_invitations=repeats) as field:
        room = field.server.room("leave")
        await field.bot.run()
        with field.proxy.inject(FORBIDDEN, "nothing" if end == "followed" else JOIN) as refused:
            room.set_membership("invite", ALICE)
            room.command("first")
            if end == "given up":
                await field.bot.logs("Gave up on joining")
            elif end == "withdrawn":
                await refused.happens(9)
            else:
                await room.answers("first")
            room.set_membership("leave", ALICE)
        for text in ("again", "and again"):
            if repeats:  # It takes a sync without an invitation to tell two of them apart.
                await field.proxy.counts(POLL, field.proxy.count(POLL) + 2)
            await is_followed(field, room, text)
            room.set_membership("leave", ALICE)
        # Either will do for what was said when the invitation that was not followed held.
        assert room.replies in (["first", "again", "and again"], ["again", "and again"])


async def test_rejection_ends_with_the_next_invitation() -> None:
    """One that is repeated while somebody else invites the bot does not take it out of the room."""
    async with field_of(speed=60) as field:
        field.bot.environment["MATRIX_INVITERS"] = ALICE
        room = field.server.room("leave")
        await field.bot.run()
        with field.proxy.inject(faults.bad_gateway, LEAVE) as failing:
            room.set_membership("invite", OWNER)
            await failing.happens(2)
            room.set_membership("leave", OWNER)
            await field.proxy.counts(POLL, field.proxy.count(POLL) + 1)
            await is_followed(field, room, "hello")
            rejections = failing.happened
            await asyncio.sleep(2)  # Two minutes, in which it would be repeated.
            assert failing.happened == rejections


async def is_followed(field: Field, room: Room, text: str) -> None:
    """Invite the bot; assert that it comes within seconds and answers."""
    room.set_membership("invite", ALICE)
    room.command(text)
    joins, began = field.proxy.count(JOIN), field.now()
    await eventually(lambda: room.membership == "join", seconds=5)
    assert field.now() - began < 30
    assert field.proxy.count(JOIN) <= joins + 2
    await eventually(lambda: room.replies[-1:] == [text])
