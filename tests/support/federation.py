"""Two real Synapses that federate on loopback, and the link between them, which can be cut."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

import trustme

from support import proxy as faults
from support.bot import eventually
from support.homeserver import Homeserver, MatrixError, User, free_port, running_homeserver
from support.people import People, Room, new_people
from support.proxy import Injection, Proxy, running_proxy

# Once a homeserver could not reach another it waits, and if that is for more than an hour, then of
# what was said meanwhile it sends only the newest event of each room: as after a long outage. It is
# told by a request of the other one that the wait is over (`Federation.meet`).
WAIT = 3_600_001  # ms
LINK = {
    "federation_verify_certificates": False,
    "ip_range_blacklist": [],
    "federation": {
        "destination_min_retry_interval": WAIT,
        "destination_max_retry_interval": WAIT,
        "destination_retry_multiplier": 1,
        "max_short_retries": 0,
        "max_long_retries": 0,
    },
}


@dataclass
class Server:
    """A homeserver, and its front: what another homeserver asks it goes through there."""

    homeserver: Homeserver
    name: str
    front: Proxy


@dataclass
class FarRoom(Room):
    """A room as bob of the far homeserver sees it.

    What the bot said there is looked up at its own homeserver, by its account: the other one may
    miss some of it after an outage.
    """

    account: User

    async def events(self) -> list[dict[str, Any]]:
        """Return the events of all that the bot has said so far."""
        try:
            return await Room(self.room_id, self.account, self.bot_id).events()
        except MatrixError as error:
            if error.status != 403:
                raise
            return []  # It is not in the room yet.

    async def is_full(self) -> bool:
        """Tell whether the account is in the room, once both homeservers know all members."""
        await self.user.members(self.room_id)
        with suppress(MatrixError, TimeoutError):
            async with asyncio.timeout(10):  # Amid a join, Synapse may wait for its end.
                return bool(await self.account.members(self.room_id))
        return False


async def has(user: User, room_id: str, event_id: str) -> bool:
    """Tell whether an event is there at a user's homeserver."""
    with suppress(MatrixError):
        await user.request("GET", f"/rooms/{quote(room_id)}/event/{quote(event_id)}")
        return True
    return False


async def arrives(user: User, room_id: str, event_id: str) -> None:
    """Wait until an event is there at a user's homeserver."""
    await eventually(lambda: has(user, room_id, event_id), what=f"the arrival of {event_id}")


@dataclass
class FarPeople(People):
    """The bot's account and alice on the near homeserver, bob on the far one."""

    bob: User

    def far(self, room: Room) -> FarRoom:
        """Return a room as bob sees it."""
        return FarRoom(room.room_id, self.bob, self.bot_id, self.account)

    async def far_invite(self) -> FarRoom:
        """Create a room of bob that the bot is invited to."""
        return self.far(await self.invite(self.bob))

    async def far_room(self) -> FarRoom:
        """Create a room of bob with the bot's account in it."""
        room = self.far(await self.room(user=self.bob))
        assert await room.is_full()
        return room

    async def shared_room(self, **options: Any) -> tuple[Room, FarRoom]:
        """Create a room of alice with the bot's account and bob in it; as both see it."""
        room = await self.room(self.bob, **options)
        assert await self.far(room).is_full()
        return room, self.far(room)


@dataclass
class Federation:
    """The bot's homeserver is `near`."""

    near: Server
    far: Server

    @asynccontextmanager
    async def cut_off(self) -> AsyncIterator[list[Injection]]:
        """Cut each request between the two for the length of the block; then they meet again."""
        fronts = (self.near.front, self.far.front)
        with ExitStack() as stack:
            cut = [stack.enter_context(front.inject(faults.cut_before)) for front in fronts]
            yield cut
        await self.meet()

    async def meet(self) -> None:
        """Have each ask the other something, whereupon that one knows that it is back."""
        for asking, asked in ((self.near, self.far), (self.far, self.near)):
            await eventually(partial(self.is_answered, asking, asked), what="an answer")

    async def is_answered(self, asking: Server, asked: Server) -> bool:
        """Tell whether a homeserver gets an answer of another one."""
        try:
            path = f"/profile/{quote(f'@nobody:{asked.name}')}"
            await asking.homeserver.request("GET", path)
        except MatrixError as error:
            return error.status == 404  # as there is no such user; but 502 if there is no answer
        return True

    async def greet(self) -> None:
        """Have each send the other an event: after an outage Synapse goes on from the last one."""
        people = await self.new_people()
        room = await people.far_room()
        for user, other in ((people.bob, people.account), (people.account, people.bob)):
            await arrives(other, room.room_id, await user.send(room.room_id, "hello"))

    async def new_people(self) -> FarPeople:
        """Register the account of a bot that nobody has used yet, and people on both sides."""
        people = await new_people(self.near.homeserver)
        bob = await self.far.homeserver.register(f"bob{people.number}")
        return FarPeople(self.near.homeserver, people.account, people.alice, people.number, bob)


@asynccontextmanager
async def running_federation() -> AsyncIterator[Federation]:
    """Run two homeservers that federate for the length of the block."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost").configure_cert(tls)
    async with AsyncExitStack() as stack:

        async def start() -> Server:
            port = free_port()
            name = f"localhost:{port}"
            homeserver = await stack.enter_async_context(
                running_homeserver({"server_name": name, **LINK})
            )
            front = await stack.enter_async_context(running_proxy(homeserver.url, port, tls))
            return Server(homeserver, name, front)

        async with asyncio.TaskGroup() as tasks:
            near, far = [tasks.create_task(start()) for _ in range(2)]
        federation = Federation(near.result(), far.result())
        await federation.greet()
        yield federation
