"""A bot behind a proxy, somebody who talks to it in two rooms, and what was said there."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from aiohttp import web
from hypothesis import HealthCheck, Phase, settings

from support.bot import Bot, eventually, new_bot
from support.federation import FarPeople, FarRoom, Federation, has
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
    """What a schedule's steps and odd answers need; each step has a number as its argument.

    A room that several people speak in is there once for each: their order is not defined.
    """

    people: People
    bot: Bot
    proxy: Proxy
    chance: random.Random
    rooms: list[Room]
    said: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    numbers: "count[int]" = field(default_factory=count)
    unordered: set[str] = field(default_factory=set)  # room IDs

    async def start(self) -> None:
        """Start the bot if it was stopped."""
        if not self.bot.running:
            await self.bot.start()

    async def first_start(self) -> None:
        """Start the bot if it never was, and wait until it takes commands."""
        if not self.bot.next_batch:
            await self.start()
            await self.bot.saves(seconds=120)

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
        await self.first_start()
        room = self.chance.choice(self.rooms)
        for _ in range(commands):
            await self.say_in(room)

    async def say_everywhere(self, commands: int) -> None:
        """Send so many commands to each room."""
        for _ in range(commands):
            for room in self.rooms:
                await self.say_in(room)

    async def say_in(self, room: Room) -> str:
        """Send the next command to a room; return its event ID."""
        text = f"{SECRET} {next(self.numbers)}"
        event_id = await room.command(text)
        self.expect(room, text)
        return event_id

    def expect(self, room: Room, reply: str) -> None:
        """Note that a reply is due to who speaks in a room."""
        self.said.setdefault((room.room_id, room.user.user_id), []).append(reply)

    def due(self, room: Room) -> list[str]:
        """Return the replies that are due to who speaks in a room."""
        return self.said.get((room.room_id, room.user.user_id), [])

    async def replies(self, room: Room) -> list[str]:
        """Return the replies in a room but those that are due to others there."""
        same = [other for other in self.rooms if other.room_id == room.room_id and other != room]
        to_others = {reply for other in same for reply in self.due(other)}
        return [body for body in await room.bodies() if SECRET in body and body not in to_others]

    async def is_all_answered(self) -> bool:
        """Tell whether every room has as many replies as commands."""
        assert self.bot.running, "the bot ended by itself"
        return all([await self.is_answered(room) for room in self.rooms])

    async def is_answered(self, room: Room) -> bool:
        """Tell whether a room has as many replies as commands."""
        return len(await self.replies(room)) >= len(self.due(room))

    async def check(self, seconds: float = 15) -> None:
        """Wait for the replies to all that was said; assert that they came once and in order.

        Where the homeserver learnt of commands in another order, the replies may have that one.
        """
        await eventually(self.is_all_answered, seconds, "a reply to each command")
        for room in self.rooms:
            replies, due = await self.replies(room), self.due(room)
            if room.room_id in self.unordered:
                replies, due = sorted(replies), sorted(due)
            assert replies == due, f"{room.room_id}: {replies} instead of {due}"
        for secret in (SECRET, PASSWORD, self.bot.session["access_token"]):
            assert secret not in self.bot.log


@dataclass(kw_only=True)
class FarScene(Scene):
    """A scene with bob of another homeserver in it, and a room whose sends may hang."""

    people: FarPeople
    federation: Federation
    outage: AsyncExitStack = field(default_factory=AsyncExitStack)
    is_cut_off: bool = False
    newest: dict[str, str] = field(default_factory=dict)  # event IDs by the room's
    hanging: Room | None = None
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def say_in(self, room: Room) -> str:
        """Send the next command to a room; return its event ID."""
        self.newest[room.room_id] = event_id = await super().say_in(room)
        return event_id

    @property
    def far_rooms(self) -> list[FarRoom]:
        """The rooms that bob speaks in."""
        return [room for room in self.rooms if isinstance(room, FarRoom)]

    async def settle(self) -> None:
        """Wait for what goes on between the homeservers: of that an outage now costs Synapse much.

        Amid a join it does not read the room any more, amid an event for two minutes.
        """
        for room in [] if self.is_cut_off else self.far_rooms:
            settled = partial(self.is_settled, room)
            if self.bot.running:
                await eventually(settled, what="an end of the join")
            elif await room.is_full():
                # What was said amid the join may not come before the bot reads back.
                with suppress(AssertionError):
                    await eventually(settled, 10)

    async def is_settled(self, room: FarRoom) -> bool:
        """Tell whether the bot's homeserver has joined a room and has the newest of its events."""
        await self.federation.meet()
        event_id = self.newest.get(room.room_id)
        is_there = not event_id or await has(room.account, room.room_id, event_id)
        return is_there and await room.is_full()

    async def is_all_answered(self) -> bool:
        """Tell whether every room has as many replies as commands."""
        await self.federation.meet()
        return await super().is_all_answered()

    async def restart_homeserver(self, _: int) -> None:
        """Stop the homeserver in order and start it."""
        await self.settle()
        await super().restart_homeserver(0)

    async def crash_homeserver(self, _: int) -> None:
        """End the homeserver as a power cut would and start it."""
        await self.settle()
        await super().crash_homeserver(0)

    async def cut_off(self, _: int) -> None:
        """Have the homeservers out of each other's reach from now on.

        Unless a reply to bob is due: what was not fetched for it yet could not be any more. And he
        has had one in each room: what a bot that is killed had fetched is told by that alone.
        """
        if self.is_cut_off:
            return
        await self.first_start()
        new = [room for room in self.far_rooms if not self.due(room)]
        if new:
            await self.start()
        await self.settle()
        for room in new:
            await self.go_on(0)
            await self.say_in(room)
            await eventually(partial(self.is_answered, room), 60, "a first reply to bob")
        if not all([await self.is_answered(room) for room in self.far_rooms]):
            return
        await self.outage.enter_async_context(self.federation.cut_off())
        self.is_cut_off = True

    async def say_during_outage(self, commands: int) -> None:
        """Have the homeservers out of each other's reach while bob says so many commands."""
        await self.first_start()
        await self.cut_off(0)
        room = self.chance.choice(self.far_rooms)
        for _ in range(commands):
            await self.say_in(room)
        await self.heal(0)

    async def heal(self, _: int) -> None:
        """Have the homeservers reach each other again, also if one of them was restarted."""
        await self.outage.aclose()
        self.is_cut_off = False
        await self.federation.meet()

    async def invite_from_afar(self, _: int) -> None:
        """Invite the bot into one more room of bob, for which both homeservers are needed.

        What is said amid the join comes to the bot's homeserver in pieces, the last ones first.
        """
        await self.heal(0)
        self.rooms.append(await self.people.far_invite())
        self.unordered.add(self.rooms[-1].room_id)

    async def hang(self, milliseconds: int) -> None:
        """Have the sends to one of the rooms hang for so long, and to no other one any more."""
        await self.go_on(0)
        self.hanging, self.goes_on = self.chance.choice(self.rooms), asyncio.Event()
        asyncio.get_running_loop().call_later(milliseconds / 1000, self.goes_on.set)

    async def go_on(self, _: int) -> None:
        """Have nothing hang any more."""
        self.goes_on.set()

    async def hangs(self, request: web.Request) -> bool:
        """Hold a request while sends to its room hang; tell whether it was held."""
        if not self.hanging or f"/{self.hanging.room_id}/send/" not in request.path:
            return False
        is_held = not self.goes_on.is_set()
        await self.goes_on.wait()
        return is_held


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


@asynccontextmanager
async def new_far_scene(
    federation: Federation, speed: float = 1, seed: int = 0
) -> AsyncIterator[FarScene]:
    """Make one with a room of alice, one of bob, and one of both."""
    people = await federation.new_people()
    async with (
        running_proxy(people.homeserver.url, speed=speed) as proxy,
        new_bot(proxy.url, speed, MATRIX_USER=people.bot_id) as bot,
    ):
        shared = await people.shared_room(room_version="11")
        rooms = [await people.room(), await people.far_room(), *shared]
        scene = FarScene(
            people=people,
            bot=bot,
            proxy=proxy,
            chance=random.Random(seed),
            rooms=rooms,
            federation=federation,
        )
        async with scene.outage:
            yield scene
