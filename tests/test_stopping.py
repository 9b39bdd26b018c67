"""SIGTERM and SIGINT end the bot at once, in order."""

import asyncio
import signal
import time

import pytest
from support.bot import Bot, new_bot
from support.people import Room


async def stops(bot: Bot, number: int = signal.SIGTERM) -> None:
    """Send the signal; assert that the bot ends within a second, with 0 and without a traceback."""
    started = time.monotonic()
    assert await bot.send_signal(number) == 0
    assert time.monotonic() - started < 1
    assert "Traceback" not in bot.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_idle_bot_stops_within_a_second(room: Room, bot: Bot, number: int) -> None:
    """The long poll is not waited for, and the exit status is 0."""
    await bot.run()
    await room.command("hello")
    await room.replies(1)
    await bot.logs("Answered")
    await stops(bot, number)


async def test_stop_amid_a_burst_loses_and_doubles_nothing(room: Room, bot: Bot) -> None:
    """Stopped five times while 150 commands come in, it answers each once and in order."""
    await bot.run()
    sending = asyncio.create_task(room.command(*range(150)))
    for n in range(5):
        await room.replies(n * 10)
        await bot.logs("Logged in as", times=n + 1)
        await stops(bot)
        await bot.start()
    await sending
    assert await room.replies(150) == [str(n) for n in range(150)]


async def test_stop_while_the_homeserver_is_away() -> None:
    """A bot that waits for its homeserver to come up stops at once too."""
    async with new_bot("http://127.0.0.1:9") as bot:
        await bot.start()
        await bot.logs("Trouble with the login at http://127.0.0.1:9")
        await stops(bot)
