"""What the tests share: homeservers for all, and for each a bot and people of its own."""

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from support.bot import Bot, new_bot
from support.conduit import CONDUIT, Conduit
from support.dendrite import DENDRITE, Dendrite
from support.federation import Federation, running_federation
from support.homeserver import Homeserver, running, running_homeserver
from support.people import People, Room, new_people
from support.prefork import preforking
from support.proxy import Proxy, running_proxy
from xdist.scheduler import LoadScopeScheduling


def pytest_xdist_auto_num_workers() -> int:
    """Three for each core, as the tests wait longer than they work; each has a Synapse."""
    return min(3 * (os.cpu_count() or 1), 16)


class Scheduling(LoadScopeScheduling):
    """Hands out tests singly, but those that need two homeservers, which start slowly, together."""

    def _split_scope(self, nodeid: str) -> str:
        """Return what the test is handed out with."""
        file, _, test = nodeid.partition("::")
        return file if file.endswith("test_federation.py") else test


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Return what decides which worker runs a test."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, lest one worker be busy with that when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked so on each homeserver."""
    if metafunc.definition.get_closest_marker("others"):
        metafunc.parametrize("homeserver", ["synapse", "dendrite", "conduit"], indirect=True)


@pytest.fixture(scope="session", autouse=True)
def quick_starts() -> Iterator[None]:
    """Bots start in no time."""
    with preforking():
        yield


@pytest.fixture(scope="session")
async def synapse() -> AsyncIterator[Homeserver]:
    """A Synapse without rate limits."""
    async with running_homeserver() as homeserver:
        yield homeserver


def other(kind: type[Homeserver], program: str) -> Any:
    """Return the fixture of a homeserver that is there only if its program is named."""

    @pytest.fixture(scope="session", name=kind.name.lower())
    async def fixture() -> AsyncIterator[Homeserver]:
        if not program:
            pytest.skip(f"ECHOBOT_{kind.name.upper()} names no {kind.name}, see tests/README.md")
        async with running(kind) as homeserver:
            yield homeserver

    return fixture


dendrite, conduit = other(Dendrite, DENDRITE), other(Conduit, CONDUIT)


@pytest.fixture
def homeserver(request: pytest.FixtureRequest) -> Homeserver:
    """The homeserver that a test runs on."""
    server: Homeserver = request.getfixturevalue(getattr(request, "param", "synapse"))
    return server


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
    async with running_proxy(homeserver.url) as proxy:
        yield proxy


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
