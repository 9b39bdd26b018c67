"""A scripted homeserver that costs next to nothing, so that what is measured is the bot.

`python scripted.py` prints its URL and serves until its stdin ends. Any password logs in;
each account is in ROOMS rooms. Its own endpoint, `POST /bench`, has one account be sent commands
and answers once all of them were replied to. Messages are accepted at once, or as slowly as asked.

It sends what Synapse sends. Each message comes with the unread counts and the empty fields of its
room; a reply comes back to its sender with the transaction ID. Unless the client's filter leaves
that out, messages come with their senders' read receipts, in every fourth answer with a typing
notice and a presence. These never come in an answer of their own, which favours whoever gets them.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SERVER_NAME = "echobot.test"
ROOMS = 10
MEMBERS = 20
QUIET_TIME = 0.005  # s without any request before commands are sent
NOTHING: dict[str, Any] = {"types": []}

EVENT_NUMBERS = itertools.count(1)


def new_event(kind: str, sender: str, content: Any, **fields: Any) -> dict[str, Any]:
    """Return an event as Synapse words it."""
    return {
        "type": kind,
        "sender": sender,
        "content": content,
        "event_id": f"${next(EVENT_NUMBERS):043}",
        "origin_server_ts": int(time.time() * 1000),
        "unsigned": {"age": 12, "membership": "join"},
        **fields,
    }


@dataclass
class Poll:
    """A sync request that is not answered yet."""

    connection: Connection
    wants_state: bool
    wants_ephemeral: bool
    wants_presence: bool
    wants_own: bool

    @classmethod
    def from_filter(cls, connection: Connection, text: str) -> Poll:
        """Read of a filter what a bot may set in it to get less."""
        chosen = json.loads(text)
        room = chosen.get("room", {})
        return cls(
            connection,
            wants_state=room.get("state") != NOTHING,
            wants_ephemeral=room.get("ephemeral") != NOTHING,
            wants_presence=chosen.get("presence") != NOTHING,
            wants_own="not_senders" not in room.get("timeline", {}),
        )


@dataclass
class Account:
    """A bot's account: what it has still to be told, and what is measured of it."""

    user_id: str
    poll: Poll | None = None
    timelines: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    position: int = 0
    commands: int = 0
    batch: int = 0
    awaited: int = 0
    delay: float = 0
    bench: Connection | None = None
    told_at: float = 0
    first_reply_at: float = 0

    @property
    def rooms(self) -> list[str]:
        """The IDs of its rooms."""
        return [f"!{self.user_id[1:].partition(':')[0]}{n}:{SERVER_NAME}" for n in range(ROOMS)]

    def serve(self) -> None:
        """Answer its poll if there is one, and something to tell."""
        poll = self.poll
        if poll is None:
            return
        batch = min(self.batch, self.commands)
        for number in range(self.commands, self.commands - batch, -1):
            content = {"msgtype": "m.text", "body": f"!replybot number {number}", "m.mentions": {}}
            event = new_event("m.room.message", f"@alice:{SERVER_NAME}", content)
            self.timelines[self.rooms[number % ROOMS]].append(event)
        if not self.timelines:
            return
        self.commands -= batch
        self.position += 1
        answer = self.answer(poll, {room: self.joined(poll, room) for room in self.timelines})
        self.timelines.clear()
        self.poll = None
        told_at = poll.connection.respond(answer)
        if batch and not self.told_at:
            self.told_at = told_at

    def answer(self, poll: Poll, join: dict[str, Any]) -> dict[str, Any]:
        """Return a sync answer with these joined rooms."""
        answer: dict[str, Any] = {
            "next_batch": f"s{self.position}_5_1_3_1_1_1_4_0_1_1_1_1_1",
            "device_one_time_keys_count": {"signed_curve25519": 0},
            "device_unused_fallback_key_types": [],
            "rooms": {"join": join},
        }
        if poll.wants_presence and self.position % 4 == 0:
            content = {"presence": "online", "last_active_ago": 32, "currently_active": True}
            sender = f"@alice:{SERVER_NAME}"
            presence = {"type": "m.presence", "sender": sender, "content": content}
            answer["presence"] = {"events": [presence]}
        return answer

    def joined(self, poll: Poll, room_id: str) -> dict[str, Any]:
        """Return a room's part of a sync answer."""
        events = self.timelines[room_id]
        ephemeral: list[Any] = []
        if poll.wants_ephemeral:
            read = {
                event["event_id"]: {"m.read": {event["sender"]: {"ts": event["origin_server_ts"]}}}
                for event in events[-1:]
            }
            ephemeral.append({"type": "m.receipt", "content": read})
            if self.position % 4 == 0:
                ephemeral.append({"type": "m.typing", "content": {"user_ids": []}})
        return {
            "timeline": {"events": events, "prev_batch": f"s{self.position}", "limited": False},
            "state": {"events": []},
            "account_data": {"events": []},
            "ephemeral": {"events": ephemeral},
            "unread_notifications": {"notification_count": 1, "highlight_count": 0},
            "summary": {},
        }

    def first_answer(self, poll: Poll) -> dict[str, Any]:
        """Return the answer to a sync without `since`."""
        join = {}
        for room_id in self.rooms:
            join[room_id] = self.joined(poll, room_id)
            if poll.wants_state:
                join[room_id]["state"]["events"] = [
                    new_event("m.room.member", user_id, {"membership": "join"}, state_key=user_id)
                    for user_id in (f"@user{n}:{SERVER_NAME}" for n in range(MEMBERS))
                ]
        self.timelines.clear()
        return self.answer(poll, join)

    def replied(self, room_id: str, content: Any, transaction_id: str, at: float) -> None:
        """Count a reply, and tell its sender of it as of any message."""
        self.awaited -= 1
        self.first_reply_at = self.first_reply_at or at
        event = new_event("m.room.message", self.user_id, content)
        event["unsigned"]["transaction_id"] = transaction_id
        if self.poll is None or self.poll.wants_own:
            self.timelines[room_id].append(event)
        if self.bench and self.awaited == 0:
            now = time.perf_counter()
            share = self.first_reply_at - self.told_at
            self.bench.respond({"seconds": now - self.told_at, "share": share})
            self.bench = None

    def listen(self, poll: Poll) -> None:
        """Take a poll; what its filter leaves out of the timelines is dropped."""
        self.poll = poll
        if not poll.wants_own:
            for room_id, events in list(self.timelines.items()):
                kept = [event for event in events if event["sender"] != self.user_id]
                self.timelines[room_id] = kept
                if not kept:
                    del self.timelines[room_id]
        self.serve()

    async def run_bench(
        self, bench: Connection, commands: int, batch: int, delay: float = 0
    ) -> None:
        """Once it is polling and all is quiet, send commands, so many in one sync answer.

        Each reply is accepted after a delay in s.
        """
        quiet_since = time.perf_counter()
        while time.perf_counter() - quiet_since < QUIET_TIME:
            await asyncio.sleep(0.001)
            if self.poll is None:
                quiet_since = time.perf_counter()
        self.bench, self.commands, self.awaited, self.batch = bench, commands, commands, batch
        self.delay = delay
        self.told_at = self.first_reply_at = 0
        self.serve()


class Homeserver:
    """The accounts, and the requests that there are."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def account(self, name: str) -> Account:
        """Return an account, new if there is none of that name."""
        return self.accounts.setdefault(name, Account(f"@{name}:{SERVER_NAME}"))

    def handle(
        self, connection: Connection, method: str, target: str, token: str, body: bytes, at: float
    ) -> None:
        """Answer a request, at once or later; `at` is when its first byte came."""
        url = urlsplit(target)
        query = parse_qs(url.query)
        path = [unquote(part) for part in url.path.split("/")]
        if path[-1] == "sync":
            account = self.account(token)
            poll = Poll.from_filter(connection, query.get("filter", ["{}"])[0])
            if "since" in query:
                account.listen(poll)
            else:
                connection.respond(account.first_answer(poll))
        elif method == "PUT" and "send" in path:
            account = self.account(token)
            reply = partial(self.accept, account, connection, path, json.loads(body), at)
            if account.delay:
                asyncio.get_running_loop().call_later(account.delay, reply)
            else:
                reply()
        elif path[-1] == "login":
            name = json.loads(body)["identifier"]["user"].partition(":")[0].removeprefix("@")
            user_id = self.account(name).user_id
            connection.respond({"user_id": user_id, "device_id": "BENCH", "access_token": name})
        elif path[-1] == "bench":
            order = json.loads(body)
            work = self.account(order.pop("name")).run_bench(connection, **order)
            task = asyncio.create_task(work)
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            connection.respond({"errcode": "M_UNRECOGNIZED", "error": "Unrecognized"}, 404)

    def accept(
        self, account: Account, connection: Connection, path: list[str], content: Any, at: float
    ) -> None:
        """Accept a reply."""
        connection.respond({"event_id": f"${next(EVENT_NUMBERS):043}"})
        account.replied(path[5], content, path[-1], at)
        account.serve()


class Connection(asyncio.Protocol):
    """One connection: HTTP/1.1 with Content-Length, no more, and a timestamp on each request."""

    def __init__(self, homeserver: Homeserver) -> None:
        self.homeserver = homeserver
        self.received = b""
        self.first_byte_at = 0.0
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the poll of this connection."""
        for account in self.homeserver.accounts.values():
            if account.poll and account.poll.connection is self:
                account.poll = None

    def data_received(self, data: bytes) -> None:
        """Handle the requests that are complete."""
        if not self.received:
            self.first_byte_at = time.perf_counter()
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, rest = self.received.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
            length = int(headers.get("content-length", "0"))
            if len(rest) < length:
                return
            method, target, _ = first.split(" ")
            token = headers.get("authorization", "").removeprefix("Bearer ")
            self.received = rest[length:]
            body, at = rest[:length], self.first_byte_at
            self.homeserver.handle(self, method, target, token, body, at)

    def respond(self, answer: Any, status: int = 200) -> float:
        """Send an answer, return when."""
        body = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\n"
        # Before the write: on a busy machine the bot may have replied when that returns.
        at = time.perf_counter()
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return at


async def main() -> None:
    """Serve on a free port of loopback until stdin ends."""
    homeserver = Homeserver()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(homeserver), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
