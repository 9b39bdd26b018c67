"""Polls that fail, hurry or bring nothing cost no command, no rush and no time."""

import asyncio

from support.bot import together
from support.proxy import JOIN, SYNC
from support.scripted import SYNAPSE, field_of
from test_refused_invitations import FORBIDDEN, LEAVE, OWNER


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


async def test_room_joined_in_part_is_answered() -> None:
    """Of a large room of others, which the homeserver is still joining, commands are news."""
    async with field_of() as field:
        room = field.server.room("invite")
        room.is_joined_in_part = True
        await field.bot.run()
        await field.bot.logs("Joined")
        room.command("hello")
        await room.answers("hello")
