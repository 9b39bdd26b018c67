"""Killed at any moment, the bot loses nothing and doubles nothing."""

from __future__ import annotations

import asyncio
import random

from conftest import People
from support.bot import Bot, eventually
from support.homeserver import User

KILLS = 12


async def test_kills_at_random_moments(people: People, alice: User, bot: Bot) -> None:
    """SIGKILLs under bursts in two rooms: all answered once, in order, and no new device."""
    rooms = [await people.room_with_bot(alice) for _ in range(2)]
    await bot.run()
    devices = await people.account.devices()
    sent: dict[str, list[str]] = {room_id: [] for room_id in rooms}
    done = asyncio.Event()

    async def talk(room_id: str, chance: random.Random) -> None:
        while not done.is_set():
            for _ in range(chance.choice([1, 1, 30])):
                body = str(len(sent[room_id]))
                await alice.send(room_id, f"!replybot {body}")
                sent[room_id].append(body)
            await asyncio.sleep(chance.uniform(0, 0.5))

    talkers = [
        asyncio.create_task(talk(room_id, random.Random(n))) for n, room_id in enumerate(rooms)
    ]
    chance = random.Random(7)
    for _ in range(KILLS):
        await asyncio.sleep(chance.uniform(0.3, 1.5))
        await bot.kill()
        await bot.start()
    done.set()
    await asyncio.gather(*talkers)
    for room_id in rooms:
        assert await people.replies(alice, room_id, len(sent[room_id])) == sent[room_id]
    assert await people.account.devices() == devices


async def test_crash_amid_the_first_login_makes_one_device(people: People, bot: Bot) -> None:
    """Kills at the very start never leave more than one device of the bot behind."""
    before = await people.account.devices()
    chance = random.Random(3)
    for _ in range(4):
        await bot.start()

        async def session_begun() -> bool:
            return (bot.state / "session.json").exists()

        await eventually(session_begun)
        await asyncio.sleep(chance.uniform(0, 0.1))
        await bot.kill()
    await bot.run()
    assert len(await people.account.devices() - before) == 1


async def test_homeserver_stopped_killed_and_back(people: People, alice: User, bot: Bot) -> None:
    """The bot outlives its homeserver and answers what was sent before and after."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    expected = []
    for end in (people.homeserver.stop, people.homeserver.kill):
        for n in range(20):
            await alice.send(room_id, f"!replybot {end.__name__} {n}")
            expected.append(f"{end.__name__} {n}")
        await end()
        await people.homeserver.start()
        await alice.send(room_id, "!replybot back")
        expected.append("back")
    assert await people.replies(alice, room_id, len(expected)) == expected
    assert bot.running
