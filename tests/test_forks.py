"""Three other bots, made by rewriting reply_to alone, keep the promise under bursts and kills."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from conftest import People
from support.bot import Bot, fork
from support.homeserver import User

DICE = r"""
async def reply_to(event: RoomMessageText) -> str | None:
    match = re.fullmatch(r"!roll (\S+)", event.body)
    return f"{match[1]}: {random.randint(1, 6)}" if match else None
"""

WEATHER = """
async def reply_to(event: RoomMessageText) -> str | None:
    if not event.body.startswith("!weather "):
        return None
    async with aiohttp.ClientSession() as http:
        for _ in range(20):
            async with http.get(SERVICE, params={"place": event.body[9:]}) as response:
                if response.status == 200:
                    return await response.text()
    return "The weather service is down."
"""

SECRETARY = """
async def reply_to(event: RoomMessageText) -> str | None:
    mentions = event.source["content"].get("m.mentions")
    if not isinstance(mentions, dict) or BOT not in mentions.get("user_ids", []):
        return None
    return f"Noted: {event.body}"
"""


async def say_and_kill(bot: Bot, say: list[tuple[User, str, str, dict[str, object]]]) -> None:
    """Send all messages in one burst, and kill and start the bot three times meanwhile."""

    async def burst() -> None:
        for user, room_id, body, content in say:
            await user.send(room_id, body, **content)

    sending = asyncio.create_task(burst())
    for _ in range(3):
        await asyncio.sleep(random.uniform(0.2, 1))
        await bot.kill()
        await bot.start()
    await sending


async def test_dice_are_rolled_once(people: People, alice: User, bot: Bot) -> None:
    """A bot whose replies are random gives one reply to each command, though it is asked again."""
    room_id = await people.room_with_bot(alice)
    bot.script = fork(bot.directory, DICE)
    await bot.run()
    await say_and_kill(bot, [(alice, room_id, f"!roll {n}", {}) for n in range(60)])
    replies = await people.replies(alice, room_id, 60)
    assert [reply.partition(":")[0] for reply in replies] == [str(n) for n in range(60)]
    assert all(re.fullmatch(r"\d+: [1-6]", reply) for reply in replies)


@pytest.fixture
async def weather() -> AsyncIterator[str]:
    """The URL of a slow service that refuses every third request."""
    count = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        await asyncio.sleep(0.05)
        if count % 3 == 0:
            return web.Response(status=503)
        return web.Response(text=f"Rain in {request.query['place']}")

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    await runner.cleanup()


async def test_slow_service_is_asked_for_each_command(
    people: People, alice: User, bot: Bot, weather: str
) -> None:
    """A bot that asks a slow HTTP service answers each command once and in order, in two rooms."""
    rooms = [await people.room_with_bot(alice) for _ in range(2)]
    bot.script = fork(bot.directory, WEATHER.replace("SERVICE", repr(weather)))
    await bot.run()
    say: list[tuple[User, str, str, dict[str, object]]] = [
        (alice, room_id, f"!weather {n}", {}) for n in range(25) for room_id in rooms
    ]
    await say_and_kill(bot, say)
    for room_id in rooms:
        replies = await people.replies(alice, room_id, 25)
        assert replies == [f"Rain in {n}" for n in range(25)]


async def test_mentions_are_answered_in_their_threads(
    people: People, alice: User, bot: Bot
) -> None:
    """In a room full of threads, a bot that answers when mentioned does so once, in the thread."""
    room_id = await people.room_with_bot(alice)
    bot.script = fork(bot.directory, SECRETARY.replace("BOT", repr(people.bot_id)))
    await bot.run()
    roots = [await alice.send(room_id, f"topic {n}") for n in range(4)]
    mention = {"m.mentions": {"user_ids": [people.bot_id]}}
    say: list[tuple[User, str, str, dict[str, object]]] = []
    for n in range(40):
        thread = {"m.relates_to": {"rel_type": "m.thread", "event_id": roots[n % 4]}}
        say.append((alice, room_id, f"chat {n}", {**thread}))
        say.append((alice, room_id, f"task {n}", {**thread, **mention}))
    await say_and_kill(bot, say)
    expected = [f"Noted: task {n}" for n in range(40)]
    assert await people.replies(alice, room_id, 40) == expected
    events = await alice.events(room_id)
    own = [event["content"] for event in events if event["sender"] == people.bot_id]
    assert [content["m.relates_to"]["event_id"] for content in own] == [
        roots[n % 4] for n in range(40)
    ]
