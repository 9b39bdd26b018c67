"""A scripted homeserver that costs next to nothing, so that what is measured is the bot.

It sends what Synapse sends. A message comes with the unread counts and the empty fields of its
room, and unless the client's filter leaves that out, with its sender's read receipt; a reply comes
back to its sender. Receipts never come in an answer of their own, which favours whoever gets them.
"""

import asyncio
import itertools
import json
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BOT, ALICE = "@bot:echobot.test", "@alice:echobot.test"
ROOMS = [f"!{n}:echobot.test" for n in range(10)]
LOGIN = {"user_id": BOT, "device_id": "BENCH", "access_token": "secret"}
PER_ANSWER = 20  # commands at most in a sync answer
NUMBERS = itertools.count(1)


def message(sender: str, content: Any, **unsigned: str) -> dict[str, Any]:
    """Return a message as Synapse words it."""
    return {
        "type": "m.room.message",
        "sender": sender,
        "content": content,
        "event_id": f"${next(NUMBERS):043}",
        "origin_server_ts": int(time.time() * 1000),
        "unsigned": {"age": 12, "membership": "join", **unsigned},
    }


class ScriptedHomeserver:
    """It has one account, a bot's; it knows what the bot is still to be told."""

    def __init__(self) -> None:
        self.url = ""
        self.timelines: defaultdict[str, list[Any]] = defaultdict(list)
        self.news, self.all_replied = asyncio.Event(), asyncio.Event()
        self.news.set()  # It is not set while a poll waits.
        self.filter: dict[str, Any] = {}
        self.commands = self.awaited = 0
        self.told_at = 0.0
        self.replies_at: list[float] = []

    async def feed(self, commands: int) -> tuple[float, float]:
        """Send commands; return the s from the first answer to the first reply and to the last."""
        rested = 0  # ms without a request
        while rested < 5:
            await asyncio.sleep(0.001)
            rested = 0 if self.news.is_set() else rested + 1
        self.commands = self.awaited = commands
        self.told_at, self.replies_at = 0, []
        self.all_replied.clear()
        self.news.set()
        await asyncio.wait_for(self.all_replied.wait(), 120)
        return self.replies_at[0] - self.told_at, self.replies_at[-1] - self.told_at

    async def sync(self, query: dict[str, list[str]]) -> Any:
        """Hold a poll until there are news, return what has come."""
        self.filter = json.loads(query.get("filter", ["{}"])[0])
        if "since" not in query:
            self.timelines = defaultdict(list, {room_id: [] for room_id in ROOMS})
        elif not self.timelines and not self.commands:
            self.news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), 30)
        for _ in range(min(PER_ANSWER, self.commands)):
            event = message(ALICE, {"msgtype": "m.text", "body": f"!replybot {self.commands}"})
            self.timelines[ROOMS[self.commands % len(ROOMS)]].append(event)
            self.commands -= 1
        join = {room_id: self.room(events) for room_id, events in self.timelines.items()}
        self.timelines = defaultdict(list)
        return {
            "next_batch": f"s{next(NUMBERS)}_5_1_3_1_1_1_4_0_1_1_1_1_1",
            "device_one_time_keys_count": {"signed_curve25519": 0},
            "device_unused_fallback_key_types": [],
            "rooms": {"join": join},
        }

    def wants(self, part: str) -> bool:
        """Tell whether the filter lets that part of a room pass, with the bot's own messages."""
        chosen = self.filter.get("room", {}).get(part, {})
        return chosen.get("types") != [] and "not_senders" not in chosen

    def room(self, events: list[Any]) -> dict[str, Any]:
        """Return a room's part of the answer to a sync."""
        ephemeral: list[Any] = []
        if events and self.wants("ephemeral"):
            read = {"m.read": {events[-1]["sender"]: {"ts": events[-1]["origin_server_ts"]}}}
            ephemeral.append({"type": "m.receipt", "content": {events[-1]["event_id"]: read}})
        return {
            "timeline": {"events": events, "prev_batch": f"s{next(NUMBERS)}", "limited": False},
            "state": {"events": []},
            "account_data": {"events": []},
            "ephemeral": {"events": ephemeral},
            "unread_notifications": {"notification_count": 1, "highlight_count": 0},
        }

    def send(self, room_id: str, transaction_id: str, content: Any, at: float) -> Any:
        """Accept a reply that came at that time, and tell its sender of it as of any message."""
        event = message(BOT, content, transaction_id=transaction_id)
        if self.wants("timeline"):
            self.timelines[room_id].append(event)
            self.news.set()
        self.replies_at.append(at)
        if len(self.replies_at) == self.awaited:
            self.all_replied.set()
        return {"event_id": event["event_id"]}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection: HTTP/1.1 with Content-Length, and no more than a bot needs."""
        # At the end of all, asyncio would tell of a task that was cancelled.
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                at = time.perf_counter()
                length = re.search(r"(?i)\ncontent-length: *(\d+)", head)
                content = await reader.readexactly(int(length[1]) if length else 0)
                url = urlsplit(head.split(" ", 2)[1])
                path = [unquote(part) for part in url.path.split("/")]
                answer: Any = LOGIN  # A bot asks for nothing else here.
                if path[-1] == "sync":
                    answer = await self.sync(parse_qs(url.query))
                elif "send" in path:
                    answer = self.send(path[5], path[-1], json.loads(content), at)
                body = json.dumps(answer).encode()
                head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                # Before the write: on a busy machine the bot may have replied when that returns.
                self.told_at = self.told_at or time.perf_counter()
                writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        writer.close()


@asynccontextmanager
async def scripted_homeserver() -> AsyncIterator[ScriptedHomeserver]:
    """Run a scripted homeserver on a free port of loopback for the length of the block."""
    homeserver = ScriptedHomeserver()
    server = await asyncio.start_server(homeserver.serve, "127.0.0.1", 0)
    homeserver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield homeserver
    finally:
        server.close()
