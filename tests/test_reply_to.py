"""The function to rewrite: it may be slow, silent or broken, and other rooms go on."""

import asyncio
import random
import re

from support.bot import Bot, fork
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

DICE = r"""
async def reply_to(event: RoomMessageText) -> str | None:
    await asyncio.sleep(random.uniform(0, 0.1))
    roll = event.body.removeprefix("!roll ")
    return None if roll == event.body else f"{roll}: {random.randint(1, 6)}"
"""

SECRETARY = """
async def reply_to(event: RoomMessageText) -> str | None:
    mentions = event.source["content"].get("m.mentions")
    if not isinstance(mentions, dict) or BOT not in mentions.get("user_ids", []):
        return None
    return f"Noted: {event.body}"
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


async def say_and_kill(bot: Bot, burst: list[tuple[Room, str, dict[str, object]]]) -> None:
    """Send all messages in one burst, and kill and start the bot three times meanwhile."""

    async def say() -> None:
        for room, body, content in burst:
            await room.say(body, **content)

    saying = asyncio.create_task(say())
    for _ in range(3):
        await asyncio.sleep(random.uniform(0.2, 1))
        await bot.kill()
        await bot.start()
    await saying


async def test_slow_dice_are_rolled_once(people: People, bot: Bot) -> None:
    """A bot that takes its time and whose replies are random gives each command one, in order."""
    rooms = [await people.room() for _ in range(2)]
    bot.script = fork(bot.directory, DICE)
    await bot.run()
    await say_and_kill(bot, [(room, f"!roll {n}", {}) for n in range(30) for room in rooms])
    for room in rooms:
        replies = await room.replies(30)
        assert [reply.partition(":")[0] for reply in replies] == [str(n) for n in range(30)]
        assert all(re.fullmatch(r"\d+: [1-6]", reply) for reply in replies)


async def test_mentions_are_answered_in_their_threads(room: Room, bot: Bot) -> None:
    """In a room full of threads, a bot that answers when mentioned does so once, in the thread."""
    bot.script = fork(bot.directory, SECRETARY.replace("BOT", repr(room.bot_id)))
    await bot.run()
    roots = [await room.say(f"topic {n}") for n in range(4)]
    mention = {"m.mentions": {"user_ids": [room.bot_id]}}
    burst: list[tuple[Room, str, dict[str, object]]] = []
    for n in range(40):
        thread = {"m.relates_to": {"rel_type": "m.thread", "event_id": roots[n % 4]}}
        burst += [(room, f"chat {n}", {**thread}), (room, f"task {n}", {**thread, **mention})]
    await say_and_kill(bot, burst)
    assert await room.replies(40) == [f"Noted: task {n}" for n in range(40)]
    threads = [event["content"]["m.relates_to"]["event_id"] for event in await room.events()]
    assert threads == [roots[n % 4] for n in range(40)]
