"""Whatever happens and in whatever order, every command is answered once and in order.

ECHOBOT_EXAMPLES=500 tries so many new schedules instead of the same few. One that fails is shown as
Schedule(...): to replay it, put @example(Schedule(...)) on the test.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import support.proxy as faults
from aiohttp import web
from conftest import People, new_people
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.bot import Bot, eventually, fork, new_bot
from support.homeserver import Homeserver, User
from support.proxy import Fault, Proxy, running_proxy

EXAMPLES = int(os.environ.get("ECHOBOT_EXAMPLES", "0"))
FAULTY = 0.35  # of all requests
QUICK: dict[str, Any] = {
    "SYNC_TIMEOUT": 2000,
    "REQUEST_TIMEOUT": 1,
    "MAX_BACKOFF": 0.1,
    "SHUTDOWN_GRACE": 2,
}
KINDS = {
    **faults.EVERY_FAULT,
    "rate_limited": faults.rate_limited(100),
    "delay": faults.delay(0.2),
}


@dataclass(frozen=True)
class Schedule:
    """What happens: methods of `Scene` with their arguments; what is left to chance is by seed."""

    seed: int
    silent_polls: int
    steps: list[tuple[str, int]]


def step(name: str, least: int = 0, most: int = 0) -> st.SearchStrategy[tuple[str, int]]:
    """Return a strategy for a step with an argument from a range."""
    return st.tuples(st.just(name), st.integers(least, most))


SCHEDULES = st.builds(
    Schedule,
    seed=st.integers(0, 2**32),
    # nio waits 15 s for any poll, so these are few.
    silent_polls=st.sampled_from([0, 0, 0, 1]),
    steps=st.lists(
        st.one_of(
            *[step("say", 1, 8), step("say", 1, 8), step("say", 11, 25), step("invite")],
            *[step("wait", 0, 1500), step("kill", 0, 1500), step("kill", 0, 200)],
            *[step("stop", 0, 1500), step("restart_homeserver"), step("crash_homeserver")],
        ),
        min_size=8,
        max_size=14,
    ),
)


class Scene:
    """A bot, somebody who talks to it in several rooms, and what was said there."""

    def __init__(self, people: People, alice: User, bot: Bot, chance: random.Random) -> None:
        self.people, self.alice, self.bot, self.chance = people, alice, bot, chance
        self.said: dict[str, list[str]] = {}
        self.down = True

    async def start(self) -> None:
        """Start the bot if it was stopped."""
        if self.down:
            await self.bot.start()
            self.down = False

    async def wait(self, milliseconds: int) -> None:
        """Let the bot run for a while."""
        await self.start()
        await asyncio.sleep(milliseconds / 1000)

    async def kill(self, milliseconds: int) -> None:
        """End the bot after a while as a power cut would."""
        await self.wait(milliseconds)
        await self.bot.kill()
        self.down = True

    async def stop(self, milliseconds: int) -> None:
        """End the bot after a while in order."""
        await self.wait(milliseconds)
        # Amid Python's own start nobody handles the signal yet.
        assert await self.bot.stop() in (0, -signal.SIGTERM)
        self.down = True

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
        self.said[await self.alice.create_room(self.people.bot_id)] = []

    async def say(self, count: int) -> None:
        """Send so many commands to one of the rooms; the first ones wait for the first start."""
        if not await self.has_position():
            await self.start()
            await eventually(self.has_position, 120, "the first start")
        room_id = self.chance.choice(list(self.said))
        for _ in range(count):
            await self.say_in(room_id)

    async def say_in(self, room_id: str) -> None:
        """Send the next command to a room."""
        body = str(len(self.said[room_id]))
        await self.alice.send(room_id, f"!replybot {body}")
        self.said[room_id].append(body)

    async def has_position(self) -> bool:
        """Tell whether the bot has saved its first position."""
        assert self.down or self.bot.running, "the bot ended by itself"
        return (self.bot.state / "next_batch").exists()

    async def is_all_answered(self) -> bool:
        """Tell whether every room has as many replies as commands."""
        assert self.bot.running, "the bot ended by itself"
        for room_id, said in self.said.items():
            if len(await self.alice.bodies(room_id, self.people.bot_id)) < len(said):
                return False
        return True

    async def check(self) -> None:
        """Assert that all is answered once and in order, and that there is one new device."""
        for room_id, said in self.said.items():
            assert await self.alice.bodies(room_id, self.people.bot_id) == said
        assert await self.people.account.devices() == {
            self.people.account.device_id,
            self.bot.session["device_id"],
        }


def any_fault(seed: int) -> Fault:
    """Return a fault that is another one each time."""
    chance = random.Random(seed)

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        name = chance.choice(list(KINDS))
        if name == "silence" and request.path.endswith("/sync"):
            name = "cut_after"
        return await KINDS[name](proxy, request)

    return fault


def fork_with_short_timelines(directory: Path) -> Path:
    """Return a copy of echobot.py with short waits, and gaps after ten messages."""
    script = fork(directory, **QUICK)
    source = script.read_text()
    shorter = source.replace('"limit": 100', '"limit": 10')
    assert shorter != source
    script.write_text(shorter)
    return script


@asynccontextmanager
async def new_scene(homeserver: Homeserver, seed: int) -> AsyncIterator[tuple[Scene, Proxy]]:
    """Make a scene with two rooms that the bot is in, and the proxy that its bot speaks through."""
    people = await new_people(homeserver)
    alice = await people.user("alice")
    async with (
        running_proxy(homeserver.url) as proxy,
        new_bot(proxy.url, MATRIX_USER=people.bot_id) as bot,
    ):
        bot.script = fork_with_short_timelines(bot.directory)
        scene = Scene(people, alice, bot, random.Random(seed))
        scene.said = {await people.room_with_bot(alice): [] for _ in range(2)}
        yield scene, proxy


@settings(
    max_examples=EXAMPLES or 5,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    # The same schedule does not take the same course twice: no shrinking.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(SCHEDULES)
async def test_any_schedule(homeserver: Homeserver, schedule: Schedule) -> None:
    """Commands in several rooms, faults on a third of all requests, kills, homeserver restarts."""
    async with new_scene(homeserver, schedule.seed) as (scene, proxy):
        try:
            with (
                proxy.inject(
                    faults.silence, faults.POLL, schedule.silent_polls, 0.1, schedule.seed
                ),
                proxy.inject(any_fault(schedule.seed), chance=FAULTY, seed=schedule.seed) as fault,
            ):
                for name, argument in schedule.steps:
                    await getattr(scene, name)(argument)
                await scene.say(1)
                await scene.start()
                await eventually(scene.is_all_answered, 100, "an answer to each command")
                # The bot polls on, so that one comes for sure.
                await eventually(fault.has_happened, 100, "a fault")
            # Answers to what comes last, after one more crash, come after all that is done twice.
            await scene.kill(0)
            await scene.start()
            for room_id in scene.said:
                await scene.say_in(room_id)
            await eventually(scene.is_all_answered, 60, "an answer to each last command")
            await scene.check()
        except BaseException:
            print(f"{schedule}\n{scene.bot.log}")
            raise
