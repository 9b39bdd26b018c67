"""An invitation is followed as soon as that works, whatever became of an earlier one."""

import asyncio

import pytest
import support.proxy as faults
from support.bot import together
from support.proxy import JOIN, MESSAGES, Fault
from support.scripted import DENDRITE, field_of

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
