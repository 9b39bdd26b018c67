"""Nothing is lost when more comes at once than fits a sync answer."""

from __future__ import annotations

import asyncio

from conftest import People
from support.bot import Bot, eventually, fork
from support.homeserver import User


async def test_burst_from_four_users_is_answered_once(
    people: People, alice: User, bot: Bot
) -> None:
    """200 commands at once in one room: each is answered once, each sender's in order."""
    others = [await people.user(f"user{n}-") for n in range(3)]
    room_id = await people.room_with_bot(alice, *others)
    await bot.run()

    async def burst(user: User, name: int) -> None:
        for n in range(50):
            await user.send(room_id, f"!replybot {name} {n}")

    await asyncio.gather(*(burst(user, name) for name, user in enumerate([alice, *others])))
    replies = await people.replies(alice, room_id, 200)
    assert len(replies) == 200
    for name in range(4):
        mine = [reply for reply in replies if reply.startswith(f"{name} ")]
        assert mine == [f"{name} {n}" for n in range(50)]


async def test_limited_timeline_is_read_oldest_first(people: People, alice: User, bot: Bot) -> None:
    """250 commands sent while the bot was down are answered once and in order, as three pages."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await bot.stop()
    for n in range(250):
        await alice.send(room_id, f"!replybot {n}")
    await bot.start()
    assert await people.replies(alice, room_id, 250) == [str(n) for n in range(250)]
    await alice.send(room_id, "!replybot after")
    assert (await people.replies(alice, room_id, 251))[250:] == ["after"]


async def test_short_downtime_in_many_rooms(people: People, alice: User, bot: Bot) -> None:
    """What fits a sync answer is answered from it, in each of five rooms."""
    rooms = [await people.room_with_bot(alice) for _ in range(5)]
    await bot.run()
    await bot.kill()
    for n in range(3):
        for room_id in rooms:
            await alice.send(room_id, f"!replybot {n}")
    await bot.start()
    for room_id in rooms:
        assert await people.replies(alice, room_id, 3) == ["0", "1", "2"]


async def test_own_messages_in_a_gap_are_not_answered(
    people: People, alice: User, bot: Bot
) -> None:
    """What the bot's account said itself among more than fits a sync answer gets no reply."""
    room_id = await people.room_with_bot(alice)
    bot.script = fork(bot.directory, MESSAGES={"types": ["m.room.message"], "limit": 5})
    await bot.run()
    await bot.stop()
    for n in range(10):
        await alice.send(room_id, f"!replybot {n}")
        await people.account.send(room_id, f"!replybot own {n}")
    await bot.start()
    await alice.send(room_id, "!replybot last")

    async def last_is_answered() -> bool:
        return "last" in await alice.bodies(room_id, people.bot_id)

    await eventually(last_is_answered)
    replies = [b for b in await alice.bodies(room_id, people.bot_id) if not b.startswith("!")]
    assert replies == [*(str(n) for n in range(10)), "last"]
