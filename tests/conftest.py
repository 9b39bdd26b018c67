"""What the tests share: one homeserver for all, and for each a bot and people of its own."""

import os
from collections.abc import AsyncIterator

import pytest
from support.bot import Bot, new_bot
from support.federation import Federation, running_federation
from support.homeserver import Homeserver, running_homeserver
from support.people import People, Room, new_people
from support.proxy import Proxy, running_proxy


def pytest_xdist_auto_num_workers() -> int:
    """Two for each core, as the tests wait about as long as they work; each has a Synapse."""
    return min(2 * (os.cpu_count() or 1), 16)


@pytest.fixture(scope="session")
async def homeserver() -> AsyncIterator[Homeserver]:
    """A homeserver without rate limits."""
    async with running_homeserver() as running:
        yield running


@pytest.fixture(scope="session")
async def federation() -> AsyncIterator[Federation]:
    """Two homeservers that federate, besides the other one, for the tests that need them."""
    async with running_federation() as running:
        yield running


@pytest.fixture
async def people(homeserver: Homeserver) -> People:
    """An account for the bot and a way to register people."""
    return await new_people(homeserver)


@pytest.fixture
async def room(people: People) -> Room:
    """A room of alice that the bot's account is in already."""
    return await people.room()


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


@pytest.fixture
async def quick_bot(proxied_bot: Bot, proxy: Proxy, request: pytest.FixtureRequest) -> Bot:
    """The same with a clock 20 times as fast, or as @pytest.mark.speed says."""
    mark = request.node.get_closest_marker("speed")
    proxied_bot.speed = proxy.speed = mark.args[0] if mark else 20
    return proxied_bot
