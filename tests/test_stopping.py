"""SIGTERM and SIGINT end the bot at once, in order."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest
from conftest import People
from support.bot import Bot
from support.homeserver import User


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_bot_stops_within_a_second(
    people: People, alice: User, bot: Bot, number: int
) -> None:
    """The long poll is not waited for, and the exit status is 0."""
    room_id = await people.room_with_bot(alice)
    await bot.run()
    await alice.send(room_id, "!replybot hello")
    await people.replies(alice, room_id, 1)
    await bot.logs("Answered")
    started = time.monotonic()
    assert await bot.send_signal(number) == 0
    assert time.monotonic() - started < 1
    assert "Traceback" not in bot.log


async def test_stop_amid_a_burst_loses_nothing(people: People, alice: User, bot: Bot) -> None:
    """Stopped five times while 150 commands come in, it answers each once and in order."""
    room_id = await people.room_with_bot(alice)
    await bot.run()

    async def burst() -> None:
        for n in range(150):
            await alice.send(room_id, f"!replybot {n}")

    sending = asyncio.create_task(burst())
    for n in range(5):
        await people.replies(alice, room_id, n * 10)
        await bot.logs("Logged in as", times=n + 1)
        assert await bot.stop() == 0
        await bot.start()
    await sending
    assert await people.replies(alice, room_id, 150) == [str(n) for n in range(150)]


async def test_stop_while_the_homeserver_is_away(people: People) -> None:
    """A bot that waits for its homeserver to come up stops at once too."""
    from support.bot import new_bot

    async with new_bot("http://127.0.0.1:9", MATRIX_USER=people.bot_id) as bot:
        await bot.start()
        await bot.logs("Trouble with http://127.0.0.1:9")
        started = time.monotonic()
        assert await bot.stop() == 0
        assert time.monotonic() - started < 1
