"""A homeserver that takes on the manners of others than Synapse, and is as strict as the strictest.

It knows one account, the bot's, and believes every password. All that happens has a place in one
line: the event at position 7 comes with the first sync after `since=s6`, whose next_batch is `s7`,
and with the page of messages that `from=t7` asks for. Faults are the proxy's affair.
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
from urllib.parse import parse_qsl, unquote

from aiohttp import web

from support.bot import Bot, eventually, new_bot
from support.homeserver import MatrixError
from support.proxy import Proxy, running_proxy, served

BOT = "@bot:echobot.test"
ALICE = "@alice:echobot.test"
IGNORED = "@ignored:echobot.test"  # by the bot's account, as one may say in any client

JSON = dict[str, Any]


@dataclass(frozen=True)
class Manners:
    """What a homeserver does its own way."""

    timeline_limit: int = 1000  # events in a timeline at most, whatever the filter asks for
    page_limit: int = 1000  # events in a page of /messages at most
    last_end: str = ""  # of the page after which there is none: that, "other" each time, or "round"
    start_in_pages: bool = True
    tells_membership: bool = True  # `unsigned.membership` in each event
    tells_prev_content: bool = True  # in the bot's membership events
    remembers_for_token: bool = False  # transaction IDs, instead of for the device
    heeds_filter: bool = True  # else a sync has timelines whatever was asked for
    hides_history: bool = False  # what precedes the bot's own join; pages of that are empty
    empty: str = "there"  # a list or an object with nothing in it; else it is "null" or "left out"
    breaks_filters: bool = False  # by types: order, limit and end are as on Dendrite 0.13
    limits_first_timeline: bool = False  # it is always said to be limited
    has_pages_outside: bool = False  # of a room that the bot is not in: they are empty
    hides_what_was_read_outside: bool = False  # for good, as if the bot still was not in the room
    holds_polls: bool = True  # else they return at once
    repeats_invitations: bool = False  # in every sync, not only once
    decodes_paths: bool = False  # %2F in a path separates its parts, as behind some proxies
    room_version_3: bool = False  # event IDs with / and +


SYNAPSE = Manners()
DENDRITE = Manners(
    timeline_limit=10,
    page_limit=100,
    last_end="t0",
    tells_membership=False,
    remembers_for_token=True,
    empty="left out",
    breaks_filters=True,
    limits_first_timeline=True,
    has_pages_outside=True,
)
CONDUIT = Manners(
    timeline_limit=10,
    page_limit=100,
    tells_membership=False,
    tells_prev_content=False,
    remembers_for_token=True,
    heeds_filter=False,
    has_pages_outside=True,
    hides_what_was_read_outside=True,
    start_in_pages=False,
)
FAMILIES = {"synapse": SYNAPSE, "dendrite": DENDRITE, "conduit": CONDUIT}

# What the specification has in a filter, and in the query of a request.
LISTS = ("types", "not_types", "senders", "not_senders", "rooms", "not_rooms")
FLAGS = ("lazy_load_members", "include_redundant_members", "contains_url")
EVENTS: JSON = {"limit": int, **dict.fromkeys(LISTS, list), **dict.fromkeys(FLAGS, bool)}
ROOM: JSON = dict.fromkeys(("timeline", "state", "ephemeral", "account_data"), EVENTS)
ROOM |= {"include_leave": bool, "rooms": list, "not_rooms": list}
FILTER: JSON = {"room": ROOM, "presence": EVENTS, "account_data": EVENTS, "event_fields": list}
QUERIES: dict[str, dict[str, JSON | str]] = {
    "sync": {"filter": FILTER, "since": r"s\d+", "timeout": r"\d+", "full_state": "true|false"},
    "messages": {
        **{"dir": "b", "from": r"[st]\d+(-\d+)?", "to": r"[st]\d+(-\d+)?"},
        **{"limit": r"[1-9]\d*", "filter": EVENTS},
    },
}
QUERIES["sync"]["set_presence"] = "offline|online|unavailable"


@dataclass(eq=False)
class Room:
    """A room with alice in it: its events with their positions, and the bot's membership."""

    server: "Scripted"
    room_id: str
    membership: str = "leave"
    changed_at: int = 0  # when the bot got this membership
    hidden_until: int = 0  # the bot may not see what was said up to then
    is_joined_in_part: bool = False  # as a room that others have is, for some while after the join
    events: list[tuple[int, JSON]] = field(default_factory=list)

    def add(self, kind: str, sender: str, content: JSON, **more: Any) -> str:
        """Append an event; return its event ID."""
        self.server.log.append(self)
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
        for _, earlier in self.events:
            if earlier["event_id"] == more.get("redacts"):
                earlier["unsigned"] = {**earlier["unsigned"], "redacted_because": event}
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

    def set_membership(self, membership: str, sender: str = BOT, **content: str) -> None:
        """Change the bot's membership, or only its profile, and tell it in the room."""
        before, self.membership = self.membership, membership
        content |= {"membership": membership}
        self.add("m.room.member", sender, content, state_key=BOT)
        if self.server.manners.tells_prev_content and self.changed_at:
            self.events[-1][1]["unsigned"]["prev_content"] = {"membership": before}
        if membership != before:
            self.changed_at = self.server.position
            if membership == "join" and self.server.manners.hides_history:
                self.hidden_until = self.changed_at - 1

    def between(self, start: int, end: int, asked: JSON) -> list[tuple[int, JSON]]:
        """Return the events after a position, up to another, that a filter does not leave out."""
        first, last = [bisect_right(self.events, p, key=itemgetter(0)) for p in (start, end)]
        types, others = asked.get("types"), asked.get("not_senders", [])
        return [
            (position, event)
            for position, event in self.events[first:last]
            if (types is None or event["type"] in types) and event["sender"] not in others
        ]

    @property
    def replies(self) -> list[str]:
        """The bodies of what the bot has sent, repeated transactions left out."""
        own = [event for _, event in self.events if event["sender"] == BOT]
        return [event["content"]["body"] for event in own if event["type"] == "m.room.message"]

    async def answers(self, *texts: object, seconds: float = 20) -> None:
        """Wait for as many replies as texts; assert that they are these, in order, each once."""
        count = len(texts)
        await eventually(lambda: len(self.replies) >= count, seconds, f"{count} replies")
        assert self.replies == [str(text) for text in texts], self.replies


class Scripted:
    """The homeserver: its rooms, and who is logged in."""

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self.url = ""
        self.log: list[Room] = []  # where what happened at position 1, 2, ... happened
        self.pages_up_to: float = float("inf")  # the position that a worker for /messages lags at
        self.rooms: dict[str, Room] = {}
        self.devices: dict[str, str] = {}  # by access token
        self.transactions: dict[tuple[str, ...], str] = {}  # their event IDs
        self.numbers = itertools.count(1)
        self.news = asyncio.Event()
        self.is_up = True

    @property
    def position(self) -> int:
        """The position of what happened last."""
        return len(self.log)

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
        path = request.raw_path.partition("?")[0]
        path = unquote(path) if self.manners.decodes_paths else path
        try:
            if not path.startswith("/_matrix/client/v3/"):
                raise MatrixError(404, {"errcode": "M_UNRECOGNIZED"})
            answer = await self.answer(request, [unquote(part) for part in path.split("/")[4:]])
        except MatrixError as refusal:
            error = {"errcode": refusal.errcode, "error": "Refused"}
            return web.json_response(error, status=refusal.status)
        return web.json_response(answer)

    async def answer(self, request: web.Request, path: list[str]) -> JSON:
        """Return the answer to a request; raise MatrixError."""
        query = query_of(request, path[-1])
        body = await body_of(request)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        # Some refuse a login too if there is a token that they do not know.
        if (scheme, token in self.devices) != ("Bearer", True) and (scheme or path != ["login"]):
            raise MatrixError(401, {"errcode": "M_UNKNOWN_TOKEN"})
        match request.method, path:
            case "POST", ["login"]:
                return self.log_in(body)
            case "GET", ["login"]:
                return {"flows": [{"type": "m.login.password"}]}
            case "GET", ["joined_rooms"]:
                rooms = self.rooms.items()
                return {"joined_rooms": [i for i, room in rooms if room.membership == "join"]}
            case "GET", ["account", "whoami"]:
                return {"user_id": BOT, "device_id": self.devices[token]}
            case "GET", ["sync"]:
                return await self.sync(query)
            case "POST", ["join", room_id] | ["rooms", room_id, "join" | "leave"]:
                room = self.find(room_id, "invite", "join")
                membership = "leave" if path[-1] == "leave" else "join"
                if room.membership != membership:
                    room.set_membership(membership)
                return {"room_id": room_id} if membership == "join" else {}
            case "GET", ["rooms", room_id, "messages"]:
                anyone = ("join", "leave", "invite") if self.manners.has_pages_outside else ()
                room = self.find(room_id, "join", *anyone)
                if room.membership == "join":
                    return self.page(room, query)
                if self.manners.hides_what_was_read_outside:
                    room.hidden_until = self.position
                return {"chunk": []}
            case "PUT", ["rooms", room_id, "send", "m.room.message" as kind, transaction_id]:
                if not fits(body, {"body": str, "msgtype": str}, is_whole=False):
                    raise MatrixError(400, {"errcode": "M_BAD_JSON"})
                who = token if self.manners.remembers_for_token else self.devices[token]
                key = (who, room_id, transaction_id)
                if key not in self.transactions:
                    self.transactions[key] = self.find(room_id, "join").add(kind, BOT, body)
                return {"event_id": self.transactions[key]}
        raise MatrixError(404, {"errcode": "M_UNRECOGNIZED"})

    def find(self, room_id: str, *memberships: str) -> Room:
        """Return a room that the bot has one of these memberships of; raise MatrixError."""
        if room_id not in self.rooms or self.rooms[room_id].membership not in memberships:
            raise MatrixError(403, {"errcode": "M_FORBIDDEN"})
        return self.rooms[room_id]

    def log_in(self, body: JSON) -> JSON:
        """Give out an access token; the device's earlier ones are no longer good."""
        identifier = {"type": "m.id.user", "user": BOT}
        login = {"type": "m.login.password", "identifier": identifier, "password": str}
        if not fits(body, login, is_whole=False):
            raise MatrixError(400, {"errcode": "M_BAD_JSON"})
        device = body.get("device_id") or f"DEVICE{next(self.numbers)}"
        self.devices = {old: other for old, other in self.devices.items() if other != device}
        token = f"token{next(self.numbers)}"
        self.devices[token] = device
        return {"user_id": BOT, "access_token": token, "device_id": device}

    async def sync(self, query: JSON) -> JSON:
        """Return what is new, as soon as there is something or the poll has been held enough."""
        asked = query.get("filter", {}).get("room", {})
        since = number(query["since"]) if "since" in query else None
        is_held = since is not None and self.manners.holds_polls
        with suppress(TimeoutError):
            async with asyncio.timeout(is_held * int(query.get("timeout", 0)) / 1000):
                while self.is_up and not any(self.rooms_since(since, asked).values()):
                    await self.news.wait()
        rooms = self.tell(**self.rooms_since(since, asked))
        return {"next_batch": f"s{self.position}", **self.tell(rooms=rooms)}

    def rooms_since(self, since: int | None, asked: JSON) -> dict[str, JSON]:
        """Return the part `rooms` of a sync response."""
        timeline = asked.get("timeline", {}) if self.manners.heeds_filter else {}
        is_lazy = asked.get("state", {}).get("lazy_load_members", False)
        rooms: dict[str, JSON] = {"join": {}, "invite": {}, "leave": {}}
        changed = dict.fromkeys(self.log[since or 0 :])
        for room in self.rooms.values() if self.manners.repeats_invitations else changed:
            is_new = room.changed_at > (since or 0)
            if room.membership == "invite":
                if is_new or self.manners.repeats_invitations:
                    rooms["invite"][room.room_id] = self.invitation(room)
            elif room.membership == "join" and (is_lazy or not room.is_joined_in_part):
                # A room that is new to the account comes with its history.
                entry = self.timeline(room, 0 if is_new else since or 0, timeline)
                if since is None and is_lazy:  # Each room, as Synapse does, though it be empty.
                    entry["state"] = {"events": [{"content": {"displayname": "x" * 1000}}]}
                if entry["timeline"].get("events") or "state" in entry:
                    rooms["join"][room.room_id] = entry
            elif room.membership == "leave" and is_new and since is not None:
                rooms["leave"][room.room_id] = self.timeline(room, since, timeline)
        return rooms

    def invitation(self, room: Room) -> JSON:
        """Return what a sync response has of a room that the bot is invited to."""
        event = next(event for position, event in room.events if position == room.changed_at)
        stripped = {name: event[name] for name in ("type", "sender", "state_key", "content")}
        return {"invite_state": {"events": [stripped]}}

    def timeline(self, room: Room, since: int, asked: JSON) -> JSON:
        """Return what a sync response has of a room, the timeline after a position."""
        ignored = [IGNORED, *asked.get("not_senders", [])]
        asked = {**asked, "not_senders": ignored}
        events = room.between(max(since, room.hidden_until), self.position, asked)
        limit = min(asked.get("limit", 10), self.manners.timeline_limit)
        shown = events[-limit:]
        first = shown[0][0] - 1 if shown else self.position
        if self.manners.breaks_filters and "types" in asked:
            shown.reverse()
        is_first = self.manners.limits_first_timeline and since < room.changed_at
        timeline = {"limited": is_first or len(events) > limit, "prev_batch": f"t{first}"}
        return {"timeline": timeline | self.tell(events=[event for _, event in shown])}

    def page(self, room: Room, query: JSON) -> JSON:
        """Return a page of /messages, newest first."""
        if "dir" not in query:
            raise MatrixError(400, {"errcode": "M_MISSING_PARAM"})
        start = min(number(query.get("from", f"t{self.position}")), self.pages_up_to)
        end, asked = number(query.get("to", "t0")), query.get("filter", {})
        is_broken = self.manners.breaks_filters and "types" in asked
        events = room.between(end, int(start), {} if is_broken else asked)
        read = events[: -1 - min(int(query.get("limit", 10)), self.manners.page_limit) : -1]
        chunk = [
            {**event, "room_id": room.room_id}
            for position, event in read
            if position > room.hidden_until and event["sender"] != IGNORED
            if not is_broken or event["type"] in asked["types"]
        ]
        page: JSON = {"chunk": chunk or (None if self.manners.empty == "null" else [])}
        if self.manners.start_in_pages:
            page["start"] = query.get("from", f"t{self.position}")
        if len(read) < len(events):
            page["end"] = f"t{read[-1][0] - 1}"
        elif self.manners.last_end == "other":
            page["end"] = f"t{end}-{next(self.numbers)}"
        elif self.manners.last_end == "round":
            page["end"] = f"t{self.position}"
        elif self.manners.last_end:
            page["end"] = self.manners.last_end
        if is_broken and not chunk:
            page.pop("end", None)
        return page

    def tell(self, **parts: Any) -> JSON:
        """Return an object as this homeserver tells it: what is empty is told its own way."""
        if self.manners.empty == "there":
            return parts
        if self.manners.empty == "null":
            return {name: part or None for name, part in parts.items()}
        return {name: part for name, part in parts.items() if part}


def query_of(request: web.Request, endpoint: str) -> JSON:
    """Return the query of a request, its filter read; raise MatrixError."""
    query: JSON = {}
    for name, value in parse_qsl(request.query_string, keep_blank_values=True):
        if name == "access_token":
            raise MatrixError(401, {"errcode": "M_MISSING_TOKEN"})
        shape = QUERIES.get(endpoint, {}).get(name)
        if isinstance(shape, dict):
            with suppress(ValueError):
                query[name] = json.loads(value)
            is_good = fits(query.get(name), shape)
        else:
            is_good = bool(shape and name not in query and re.fullmatch(shape, value))
            query[name] = value
        if not is_good:
            raise MatrixError(400, {"errcode": "M_INVALID_PARAM"})
    return query


async def body_of(request: web.Request) -> Any:
    """Return the body of a request; raise MatrixError."""
    # A body, or none, of a type that is not JSON; some proxies want to know its length.
    is_json = request.headers.get("Content-Type", "application/json") == "application/json"
    if not is_json or request.can_read_body == (request.content_length is None):
        raise MatrixError(400, {"errcode": "M_NOT_JSON"})
    raw = await request.read()
    if request.method == "GET":
        if raw:
            raise MatrixError(400, {"errcode": "M_UNRECOGNIZED"})
        return None
    body = None
    with suppress(ValueError):
        body = json.loads(raw, parse_float=refuse, parse_constant=refuse)
    if not isinstance(body, dict):
        raise MatrixError(400, {"errcode": "M_BAD_JSON"})
    try:
        size = len(json.dumps(body, ensure_ascii=False).encode())
    except UnicodeEncodeError:  # Half a character is what Synapse does not expect.
        raise MatrixError(500, {"errcode": "M_UNKNOWN"}) from None
    if size > 65_000:
        raise MatrixError(413, {"errcode": "M_TOO_LARGE"})
    return body


def refuse(number: str) -> None:
    """Refuse what is JSON, but not Matrix's."""
    raise ValueError(number)


def fits(value: Any, shape: Any, is_whole: bool = True) -> bool:
    """Tell whether JSON is of a shape; if that is whole, nothing else may be in its objects."""
    if isinstance(shape, dict):
        if not isinstance(value, dict) or (is_whole and not value.keys() <= shape.keys()):
            return False
        names = value if is_whole else shape
        return all(fits(value.get(name), shape[name], is_whole) for name in names)
    return type(value) is shape if isinstance(shape, type) else bool(value == shape)


def number(token: str) -> int:
    """Return the position that a token stands for."""
    return int(token[1:].partition("-")[0])


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
    manners: Manners = SYNAPSE, speed: float = 1, **changes: bool | int | str
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
