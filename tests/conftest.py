"""What the tests share: one homeserver for all, and for each a bot and people of its own."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from support.bot import Bot, eventually, new_bot
from support.homeserver import Homeserver, User, running_homeserver
from support.proxy import Proxy, running_proxy

NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
async def homeserver() -> AsyncIterator[Homeserver]:
    """A homeserver without rate limits."""
    async with running_homeserver() as running:
        yield running


@dataclass
class People:
    """The bot's account, and users to talk to it, all new on a homeserver."""

    homeserver: Homeserver
    account: User
    number: int

    @property
    def bot_id(self) -> str:
        """The bot's user ID."""
        return self.account.user_id

    async def user(self, name: str = "alice") -> User:
        """Register one more user."""
        return await self.homeserver.register(f"{name}{self.number}")

    async def room_with_bot(self, user: User, *others: User) -> str:
        """Create a room that the bot's account and others are in already; return its ID."""
        room_id = await user.create_room(self.bot_id, *(other.user_id for other in others))
        for member in (self.account, *others):
            await member.join(room_id)
        return room_id

    async def replies(self, user: User, room_id: str, count: int, seconds: float = 90) -> list[str]:
        """Wait for so many messages of the bot in a room, return the bodies of all there are."""

        async def arrived() -> bool:
            return len(await user.bodies(room_id, self.bot_id)) >= count

        await eventually(arrived, seconds, f"{count} replies")
        return await user.bodies(room_id, self.bot_id)


async def new_people(homeserver: Homeserver) -> People:
    """Register the account of a bot that nobody has used yet."""
    number = next(NUMBERS)
    return People(homeserver, await homeserver.register(f"bot{number}"), number)


@pytest.fixture
async def people(homeserver: Homeserver) -> People:
    """An account for the bot and a way to register people."""
    return await new_people(homeserver)


@pytest.fixture
async def alice(people: People) -> User:
    """Somebody who talks to the bot."""
    return await people.user("alice")


@pytest.fixture
async def bot(people: People) -> AsyncIterator[Bot]:
    """A bot for the account that was never started, speaking to the homeserver directly."""
    async with new_bot(people.homeserver.url, MATRIX_USER=people.bot_id) as new:
        yield new


@pytest.fixture
async def proxy(homeserver: Homeserver) -> AsyncIterator[Proxy]:
    """A proxy in front of the homeserver that passes everything on until told to hurt."""
    async with running_proxy(homeserver.url) as running:
        yield running


@pytest.fixture
async def proxied_bot(people: People, proxy: Proxy) -> AsyncIterator[Bot]:
    """A bot for the account that was never started, behind the proxy."""
    async with new_bot(proxy.url, MATRIX_USER=people.bot_id) as new:
        yield new
