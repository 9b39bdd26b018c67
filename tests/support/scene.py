"""A bot behind a proxy, somebody who talks to it in two rooms, and what was said there."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from support.bot import Bot, eventually, new_bot
from support.homeserver import PASSWORD, Homeserver
from support.people import People, Room, new_people
from support.proxy import Proxy, running_proxy

SECRET = "hush-hush"  # in every command, and never in the log


def tries(few: int) -> settings:
    """Return how many examples a test tries: ECHOBOT_EXAMPLES new ones, or always the same few."""
    many = int(os.environ.get("ECHOBOT_EXAMPLES", "0"))
    return settings(
        max_examples=many or few,
        derandomize=not many,
        database=None,
        deadline=None,
        # The same example does not take the same course twice: no shrinking.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class Scene:
    """What a schedule's steps and odd answers need; each step has a number as its argument."""

    people: People
    bot: Bot
    proxy: Proxy
    chance: random.Random
    rooms: list[Room]
    said: dict[str, list[str]] = field(default_factory=dict)
    numbers: "count[int]" = field(default_factory=count)

    async def start(self) -> None:
        """Start the bot if it was stopped."""
        if not self.bot.running:
            await self.bot.start()

    async def wait(self, milliseconds: int) -> None:
        """Let the bot run for a while."""
        await self.start()
        await asyncio.sleep(milliseconds / 1000)
        assert self.bot.running, "the bot ended by itself"

    async def kill(self, milliseconds: int) -> None:
        """End the bot after a while as a power cut would."""
        await self.wait(milliseconds)
        await self.bot.kill()

    async def stop(self, milliseconds: int) -> None:
        """End the bot after a while in order."""
        await self.wait(milliseconds)
        # Amid Python's own start nobody handles the signal yet.
        assert await self.bot.stop() in (0, -signal.SIGTERM)

    async def restart_homeserver(self, _: int) -> None:
        """Stop the homeserver in order and start it."""
        await self.people.homeserver.stop()
        await self.people.homeserver.start()

    async def crash_homeserver(self, _: int) -> None:
        """End the homeserver as a power cut would and start it."""
        await self.people.homeserver.kill()
        await self.people.homeserver.start()

    async def invite(self, _: int) -> None:
        """Invite the bot into one more room."""
        self.rooms.append(await self.people.invite())

    async def say(self, commands: int) -> None:
        """Send so many commands to one of the rooms; the first ones wait for the first start."""
        if not self.bot.next_batch:
            await self.start()
            await self.bot.saves(seconds=120)
        room = self.chance.choice(self.rooms)
        for _ in range(commands):
            await self.say_in(room)

    async def say_everywhere(self, commands: int) -> None:
        """Send so many commands to each room."""
        for _ in range(commands):
            for room in self.rooms:
                await self.say_in(room)

    async def say_in(self, room: Room) -> None:
        """Send the next command to a room."""
        text = f"{SECRET} {next(self.numbers)}"
        await room.command(text)
        self.expect(room, text)

    def expect(self, room: Room, reply: str) -> None:
        """Note that a reply is due in a room."""
        self.said.setdefault(room.room_id, []).append(reply)

    async def replies(self, room: Room) -> list[str]:
        """Return the replies in a room to what was said there."""
        return [body for body in await room.bodies() if SECRET in body]

    async def is_all_answered(self) -> bool:
        """Tell whether every room has as many replies as commands."""
        assert self.bot.running, "the bot ended by itself"
        for room in self.rooms:
            if len(await self.replies(room)) < len(self.said.get(room.room_id, [])):
                return False
        return True

    async def check(self, seconds: float = 15) -> None:
        """Wait for the replies to all that was said; assert that they came once and in order."""
        await eventually(self.is_all_answered, seconds, "a reply to each command")
        for room in self.rooms:
            assert await self.replies(room) == self.said.get(room.room_id, [])
        for secret in (SECRET, PASSWORD, self.bot.session["access_token"]):
            assert secret not in self.bot.log


@asynccontextmanager
async def new_scene(
    homeserver: Homeserver, speed: float = 1, seed: int = 0, **environment: Any
) -> AsyncIterator[Scene]:
    """Make a scene with a room of each of two versions; its bot was never started."""
    people = await new_people(homeserver)
    async with (
        running_proxy(homeserver.url, speed=speed) as proxy,
        new_bot(proxy.url, speed, MATRIX_USER=people.bot_id, **environment) as bot,
    ):
        rooms = [await people.room(room_version=version) for version in homeserver.room_versions]
        yield Scene(people, bot, proxy, random.Random(seed), rooms)
