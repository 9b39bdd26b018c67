"""The function to rewrite: it may be slow, silent or broken, and other rooms go on."""

import asyncio
import random
import re

from support.bot import Bot, fork, together
from support.people import People, Room

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

SECRETARY = """
async def reply_to(event: RoomMessageText) -> str | None:
    await asyncio.sleep(random.uniform(0, 0.1))
    mentions = event.source["content"].get("m.mentions")
    if not isinstance(mentions, dict) or BOT not in mentions.get("user_ids", []):
        return None
    return f"{event.body} is number {random.randint(1, 10**6)}"
"""


async def test_slow_reply_to_holds_up_no_other_room(people: People, bot: Bot) -> None:
    """While it works on one room's message, another room is answered; order stays in the first."""
    slow, quick = [await people.room() for _ in range(2)]
    bot.script = fork(bot.directory, SLOW)
    await bot.run()
    await slow.say("slow", "behind it")
    await quick.say(*[f"quick {n}" for n in range(5)])
    assert await quick.replies(5) == [f"QUICK {n}" for n in range(5)]
    assert await slow.bodies() == []
    assert await slow.replies(2) == ["SLOW", "BEHIND IT"]


async def test_bug_in_reply_to_costs_one_reply(room: Room, bot: Bot) -> None:
    """Whatever it raises or returns is logged with event ID and traceback, without the message."""
    bot.script = fork(bot.directory, BROKEN)
    await bot.run()
    failed = [await room.say(body) for body in ("secret", "number", "usage", "cancel")]
    await room.say("quiet", "fine")
    assert await room.replies(1) == ["FINE"]
    for event_id in failed:
        assert event_id in bot.log
    line = 1 + bot.script.read_text().splitlines().index(BROKEN.splitlines()[3])
    assert "ValueError" in bot.log
    assert re.search(rf"\b{line}\b.*reply_to", bot.log), "no traceback down to that line"
    assert "secret" not in bot.log
    assert bot.running


async def test_fork_answers_mentions_in_their_threads_once(people: People, bot: Bot) -> None:
    """Slow, silent to most and with random replies, and killed meanwhile, it doubles none."""
    bot.script = fork(bot.directory, SECRETARY.replace("BOT", repr(people.bot_id)))
    await bot.run()
    mention = {"m.mentions": {"user_ids": [people.bot_id]}}

    async def talk(room: Room) -> None:
        roots = [await room.say(f"topic {n}") for n in range(4)]
        for n in range(30):
            thread = {"m.relates_to": {"rel_type": "m.thread", "event_id": roots[n % 4]}}
            await room.say(f"chat {n}", **thread)
            await room.say(f"task {n}", **thread, **mention)
        replies = await room.replies(30)
        assert [reply.partition(" is ")[0] for reply in replies] == [f"task {n}" for n in range(30)]
        threads = [event["content"]["m.relates_to"]["event_id"] for event in await room.events()]
        assert threads == [roots[n % 4] for n in range(30)]

    async def kill() -> None:
        for _ in range(3):
            await asyncio.sleep(random.uniform(0.2, 1))
            await bot.kill()
            await bot.start()

    await together(kill(), *[talk(await people.room()) for _ in range(2)])
