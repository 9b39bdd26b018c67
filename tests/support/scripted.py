"""A homeserver that takes on the manners of others than Synapse; faults are the proxy's affair.

It knows one account, the bot's, and believes every password. All that happens has a place in one
line: the event at position 7 comes with the first sync after `since=s6`, whose next_batch is `s7`.
To add a manner, give it a name in Manners, whose defaults are Synapse's, and use it below.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import re
import time
from bisect import bisect_right
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from support.bot import Bot, eventually, new_bot
from support.homeserver import MatrixError
from support.proxy import Proxy, running_proxy, served

BOT = "@bot:echobot.test"
ALICE = "@alice:echobot.test"

JSON = dict[str, Any]


@dataclass(frozen=True)
class Manners:
    """What a homeserver does its own way."""

    timeline_limit: int = 1000  # events in a timeline at most, whatever the filter asks for
    page_limit: int = 1000  # events in a page of /messages at most
    stops_before_to: bool = False  # pages leave out the event at `to` itself
    tells_membership: bool = True  # `unsigned.membership` in each event
    remembers_for_token: bool = False  # transaction IDs, instead of for the device
    heeds_filter: bool = True  # else a sync has timelines whatever was asked for
    start_in_pages: bool = True
    end_in_last_page: bool = False  # `end` even where there is no more, and then always the same
    pages_without_end: bool = False  # another `end` each time, for ever
    holds_polls: bool = True  # else they return at once
    repeats_invitations: bool = False  # in every sync, not only once
    decodes_paths: bool = False  # %2F in a path separates its parts, as behind some proxies
    room_version_3: bool = False  # event IDs with / and +


SYNAPSE = Manners()
DENDRITE = Manners(timeline_limit=10, tells_membership=False, end_in_last_page=True)
CONDUIT = Manners(
    timeline_limit=10,
    page_limit=100,
    stops_before_to=True,
    tells_membership=False,
    remembers_for_token=True,
    heeds_filter=False,
    start_in_pages=False,
)
FAMILIES = {"synapse": SYNAPSE, "dendrite": DENDRITE, "conduit": CONDUIT}


@dataclass
class Room:
    """A room with alice in it: its events with their positions, and the bot's membership."""

    server: "Scripted"
    room_id: str
    membership: str = "leave"
    joined_at: int = 0
    invitation: tuple[int, JSON] = (0, {})
    events: list[tuple[int, JSON]] = field(default_factory=list)

    def add(self, kind: str, sender: str, content: JSON, **more: Any) -> str:
        """Append an event; return its event ID."""
        self.server.position += 1
        digest = hashlib.sha256(f"{self.room_id} {self.server.position}".encode()).digest()
        alphabet = b"+/" if self.server.manners.room_version_3 else b"-_"
        event = {
            "type": kind,
            "event_id": "$" + base64.b64encode(digest, alphabet).decode().rstrip("="),
            "sender": sender,
            "origin_server_ts": int(time.time() * 1000),
            "content": content,
            "unsigned": {},
            **more,
        }
        if self.server.manners.tells_membership:
            event["unsigned"]["membership"] = self.membership
        self.events.append((self.server.position, event))
        self.server.happened()
        return str(event["event_id"])

    def say(self, *bodies: str, **content: Any) -> str:
        """Have alice send text messages; return the last one's event ID."""
        event_id = ""
        for body in bodies:
            content |= {"msgtype": "m.text", "body": body}
            event_id = self.add("m.room.message", ALICE, dict(content))
        return event_id

    def command(self, *texts: object) -> str:
        """Have alice send a command for each text; return the last one's event ID."""
        return self.say(*(f"!replybot {text}" for text in texts))

    def set_membership(self, membership: str, sender: str = BOT) -> None:
        """Change the bot's membership and tell it in the room."""
        self.membership = membership
        self.add("m.room.member", sender, {"membership": membership}, state_key=BOT)
        if membership == "invite":
            self.invitation = self.events[-1]
        elif membership == "join":
            self.joined_at = self.server.position

    @property
    def replies(self) -> list[str]:
        """The bodies of what the bot has sent, repeated transactions left out."""
        own = [event for _, event in self.events if event["sender"] == BOT]
        return [event["content"]["body"] for event in own if event["type"] == "m.room.message"]

    async def answers(self, *texts: object, seconds: float = 20) -> None:
        """Wait for as many replies as texts; assert that they are these, in order, each once."""
        count = len(texts)
        await eventually(lambda: len(self.replies) >= count, seconds, f"{count} replies")
        assert self.replies == [str(text) for text in texts]


class Scripted:
    """The homeserver: its rooms, and who is logged in."""

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self.url = ""
        self.position = 0
        self.rooms: dict[str, Room] = {}
        self.devices: dict[str, str] = {}  # by access token
        self.transactions: dict[tuple[str, ...], str] = {}  # their event IDs
        self.numbers = itertools.count(1)
        self.news = asyncio.Event()
        self.is_up = True

    def room(self, membership: str = "join") -> Room:
        """Create a room in which the bot has a membership."""
        room_id = f"!room{next(self.numbers)}:echobot.test"
        room = self.rooms[room_id] = Room(self, room_id)
        if membership != "leave":
            room.set_membership(membership, sender=ALICE if membership == "invite" else BOT)
        return room

    def happened(self) -> None:
        """Wake the polls."""
        self.news.set()
        self.news = asyncio.Event()

    async def handle(self, request: web.Request) -> web.Response:
        """Answer any request."""
        path = request.raw_path.partition("?")[0].removeprefix("/_matrix/client/v3/")
        path = unquote(path) if self.manners.decodes_paths else path
        try:
            answer = await self.answer(request, [unquote(part) for part in path.split("/")])
        except MatrixError as refusal:
            error = {"errcode": refusal.errcode, "error": "Refused"}
            return web.json_response(error, status=refusal.status)
        return web.json_response(answer)

    async def answer(self, request: web.Request, path: list[str]) -> JSON:
        """Return the answer to a request; raise MatrixError."""
        if request.can_read_body and request.content_type != "application/json":
            raise MatrixError(400, {"errcode": "M_NOT_JSON"})
        if request.method != "GET" and not isinstance(await body_of(request), dict):
            raise MatrixError(400, {"errcode": "M_BAD_JSON"})
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.devices and path != ["login"]:
            raise MatrixError(401, {"errcode": "M_UNKNOWN_TOKEN"})
        match request.method, path:
            case "POST", ["login"]:
                return self.log_in(await request.json())
            case "GET", ["account", "whoami"]:
                return {"user_id": BOT, "device_id": self.devices[token]}
            case "GET", ["sync"]:
                return await self.sync(request.query)
            case "POST", ["join", room_id] | ["rooms", room_id, "join" | "leave"]:
                room = self.find(room_id, "invite", "join")
                membership = "leave" if path[-1] == "leave" else "join"
                if room.membership != membership:
                    room.set_membership(membership)
                return {"room_id": room_id}
            case "GET", ["rooms", room_id, "messages"]:
                return self.page(self.find(room_id, "join"), request.query)
            case "PUT", ["rooms", room_id, "send", kind, transaction_id]:
                who = token if self.manners.remembers_for_token else self.devices[token]
                key = (who, room_id, transaction_id)
                if key not in self.transactions:
                    room = self.find(room_id, "join")
                    self.transactions[key] = room.add(kind, BOT, await request.json())
                    # Those who sent an event see by this that it is theirs.
                    room.events[-1][1]["unsigned"]["transaction_id"] = transaction_id
                return {"event_id": self.transactions[key]}
        raise MatrixError(404, {"errcode": "M_UNRECOGNIZED"})

    def find(self, room_id: str, *memberships: str) -> Room:
        """Return a room that the bot has one of these memberships of; raise MatrixError."""
        if room_id not in self.rooms or self.rooms[room_id].membership not in memberships:
            raise MatrixError(403, {"errcode": "M_FORBIDDEN"})
        return self.rooms[room_id]

    def log_in(self, body: JSON) -> JSON:
        """Give out an access token; the device's earlier ones are no longer good."""
        device = body.get("device_id") or f"DEVICE{next(self.numbers)}"
        self.devices = {old: other for old, other in self.devices.items() if other != device}
        token = f"token{next(self.numbers)}"
        self.devices[token] = device
        return {"user_id": BOT, "access_token": token, "device_id": device}

    async def sync(self, query: Any) -> JSON:
        """Return what is new, as soon as there is something or the poll has been held enough."""
        since = parse(query.get("since", "s0"))
        asked = json.loads(query.get("filter", "{}")).get("room", {}).get("timeline", {})
        asked = asked if self.manners.heeds_filter else {}
        is_held = "since" in query and self.manners.holds_polls
        with suppress(TimeoutError):
            async with asyncio.timeout(is_held * int(query.get("timeout", 0)) / 1000):
                while self.is_up and not any(self.rooms_since(since, asked).values()):
                    await self.news.wait()
        return {"next_batch": f"s{self.position}", "rooms": self.rooms_since(since, asked)}

    def rooms_since(self, since: int, asked: JSON) -> JSON:
        """Return the part `rooms` of a sync response."""
        joined, invited = {}, {}
        for room in self.rooms.values():
            invited_at, invitation = room.invitation
            if room.membership == "invite":
                if invited_at > since or self.manners.repeats_invitations:
                    invited[room.room_id] = {"invite_state": {"events": [invitation]}}
            elif room.membership == "join":
                # A room that is new to the account comes with its history.
                events = select(room, since if room.joined_at <= since else 0, asked)
                limit = min(asked.get("limit", 10), self.manners.timeline_limit)
                timeline = {"events": events[-limit:], "limited": len(events) > limit}
                if events:
                    joined[room.room_id] = {"timeline": timeline}
        return {"join": joined, "invite": invited}

    def page(self, room: Room, query: Any) -> JSON:
        """Return a page of /messages, read forward."""
        if query.get("dir") != "f":
            raise MatrixError(400, {"errcode": "M_INVALID_PARAM"})
        start = parse(query["from"])
        to = parse(query["to"]) - self.manners.stops_before_to if "to" in query else self.position
        events = select(room, start, json.loads(query.get("filter", "{}")), to)
        chunk = events[: min(int(query.get("limit", 10)), self.manners.page_limit)]
        page: JSON = {"chunk": chunk}
        if self.manners.start_in_pages:
            page["start"] = query["from"]
        if len(chunk) < len(events):
            page["end"] = f"s{next(p for p, event in room.events if event is chunk[-1])}"
        elif self.manners.pages_without_end:
            page["end"] = f"s{max(start, to)}-{next(self.numbers)}"
        elif self.manners.end_in_last_page:
            page["end"] = f"s{max(start, to)}"
        return page


async def body_of(request: web.Request) -> Any:
    """Return the JSON of a request, or None where there is none."""
    with suppress(ValueError):
        return json.loads(await request.read())
    return None


def parse(position: str) -> int:
    """Return the number in a position; raise MatrixError."""
    if not (match := re.match(r"s(\d+)", position)):
        raise MatrixError(400, {"errcode": "M_INVALID_PARAM"})
    return int(match[1])


def select(room: Room, start: int, asked: JSON, to: float = float("inf")) -> list[JSON]:
    """Return a room's events after a position, up to another, that a filter does not leave out."""
    return [
        event
        for position, event in room.events[bisect_right(room.events, start, key=itemgetter(0)) :]
        if position <= to
        and event["type"] in asked.get("types", [event["type"]])
        and event["sender"] not in asked.get("not_senders", [])
    ]


@dataclass
class Field:
    """A scripted homeserver, a proxy in front of it, and a bot that was never started."""

    server: Scripted
    proxy: Proxy
    bot: Bot

    def now(self) -> float:
        """Return the time in s by the bot's clock."""
        return time.monotonic() * self.bot.speed


@asynccontextmanager
async def field_of(
    manners: Manners = SYNAPSE, speed: float = 1, **changes: bool | int
) -> AsyncIterator[Field]:
    """Run a homeserver with these manners, changed so, and make a bot for it."""
    server = Scripted(replace(manners, **changes))  # type: ignore[arg-type]
    async with (
        served(server.handle) as server.url,
        running_proxy(server.url, speed=speed) as proxy,
        new_bot(proxy.url, speed) as bot,
    ):
        try:
            yield Field(server, proxy, bot)
        finally:
            if bot.running:
                await bot.kill()
            # While the proxy is there, or its last poll would be repeated while this closes.
            server.is_up = False
            server.happened()
            await asyncio.sleep(0.05)
