"""The function to rewrite: it may be slow, silent or broken, and other rooms go on."""

from __future__ import annotations

from conftest import People
from support.bot import Bot, fork
from support.homeserver import User

SLOW = """
async def reply_to(event: RoomMessageText) -> str | None:
    if event.body == "slow":
        await asyncio.sleep(5)
    return event.body.upper()
"""

BROKEN = """
async def reply_to(event: RoomMessageText) -> str | None:
    if event.body == "secret":
        raise ValueError(f"can't cope with {event.body}")
    if event.body == "number":
        return 42
    if event.body == "usage":
        sys.exit(2)
    if event.body == "cancel":
        asyncio.current_task().cancel()
        await asyncio.sleep(1)
    if event.body == "quiet":
        return None
    return event.body.upper()
"""

BUGS = ("secret", "number", "usage", "cancel")

HANGING = """
async def reply_to(event: RoomMessageText) -> str | None:
    if event.body == "hang":
        await asyncio.Event().wait()
    return event.body.upper()
"""


async def test_slow_reply_to_holds_up_no_other_room(people: People, alice: User, bot: Bot) -> None:
    """While it works on one room's message, another room is answered; order stays in the first."""
    slow, quick = [await people.room_with_bot(alice) for _ in range(2)]
    bot.script = fork(bot.directory, SLOW)
    await bot.run()
    await alice.send(slow, "slow")
    await alice.send(slow, "behind it")
    for n in range(5):
        await alice.send(quick, f"quick {n}")
    assert await people.replies(alice, quick, 5) == [f"QUICK {n}" for n in range(5)]
    assert await alice.bodies(slow, people.bot_id) == []
    assert await people.replies(alice, slow, 2) == ["SLOW", "BEHIND IT"]


async def test_bug_in_reply_to_costs_one_reply(people: People, alice: User, bot: Bot) -> None:
    """Whatever it raises or returns is logged with the event ID, without the message."""
    room_id = await people.room_with_bot(alice)
    bot.script = fork(bot.directory, BROKEN)
    await bot.run()
    failed = [await alice.send(room_id, body) for body in BUGS]
    await alice.send(room_id, "quiet")
    await alice.send(room_id, "fine")
    assert await people.replies(alice, room_id, 1) == ["FINE"]
    for event_id in failed:
        assert event_id in bot.log
    assert "ValueError" in bot.log
    assert "secret" not in bot.log
    assert bot.running


async def test_reply_to_that_never_ends_is_given_up(people: People, alice: User, bot: Bot) -> None:
    """After the time that one event may take, its room goes on."""
    room_id = await people.room_with_bot(alice)
    bot.script = fork(bot.directory, HANGING, PATIENCE=2)
    await bot.run()
    event_id = await alice.send(room_id, "hang")
    await alice.send(room_id, "next")
    assert await people.replies(alice, room_id, 1) == ["NEXT"]
    assert event_id in bot.log
