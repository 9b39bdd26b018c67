"""Who talks to the bot, and where: what most tests say and look at."""

import itertools
from dataclasses import dataclass
from typing import Any

from support.bot import eventually
from support.homeserver import Homeserver, User

NUMBERS = itertools.count(1)


@dataclass
class Room:
    """A room with the bot, or with an invitation for it, as one of its members sees it."""

    room_id: str
    user: User
    bot_id: str

    async def say(self, *bodies: str, **content: Any) -> str:
        """Send text messages, with `content` over the ordinary one; return the last's event ID."""
        event_id = ""
        for body in bodies:
            event_id = await self.user.send(self.room_id, body, **content)
        return event_id

    async def command(self, *texts: object) -> str:
        """Send a command for each text; return the last one's event ID."""
        return await self.say(*(f"!replybot {text}" for text in texts))

    async def replies(self, count: int, seconds: float = 90) -> list[str]:
        """Wait for so many messages of the bot, return the bodies of all there are."""

        async def arrived() -> bool:
            return len(await self.bodies()) >= count

        await eventually(arrived, seconds, f"{count} replies")
        return await self.bodies()

    async def bodies(self) -> list[str]:
        """Return the bodies of all that the bot has said so far."""
        return [event["content"].get("body", "") for event in await self.events()]

    async def events(self) -> list[dict[str, Any]]:
        """Return the events of all that the bot has said so far."""
        events = await self.user.events(self.room_id)
        return [event for event in events if event["sender"] == self.bot_id]

    async def bot_is(self, membership: str) -> None:
        """Wait until the bot has joined ("join"), or has left or rejected ("leave")."""

        async def is_so() -> bool:
            return self.bot_id in await self.user.members(self.room_id, membership)

        await eventually(is_so, what=f"the bot's membership {membership!r}")


@dataclass
class People:
    """The bot's account, alice, and others to talk to it, all new on a homeserver."""

    homeserver: Homeserver
    account: User
    alice: User
    number: int

    @property
    def bot_id(self) -> str:
        """The bot's user ID."""
        return self.account.user_id

    async def user(self, name: str) -> User:
        """Register one more user."""
        return await self.homeserver.register(f"{name}{self.number}")

    async def invite(self, user: User | None = None, **options: Any) -> Room:
        """Create a room of a user (unless told: alice) that the bot is invited to."""
        user = user or self.alice
        return Room(await user.create_room(self.bot_id, **options), user, self.bot_id)

    async def room(self, *others: User, user: User | None = None, **options: Any) -> Room:
        """Create a room of a user (unless told: alice) with the bot's account and others in it."""
        room = await self.invite(user, **options)
        for other in others:
            await room.user.invite(room.room_id, other.user_id)
        for member in (self.account, *others):
            await member.join(room.room_id)
        return room


async def new_people(homeserver: Homeserver) -> People:
    """Register the account of a bot that nobody has used yet."""
    number = next(NUMBERS)
    account, alice = [await homeserver.register(f"{name}{number}") for name in ("bot", "alice")]
    return People(homeserver, account, alice, number)
