#!/usr/bin/env python3
"""A Matrix bot that answers every command once: none is lost, none is answered twice.

It answers each message that starts with `!replybot` with the rest of that message, through bursts,
downtime, SIGKILL, homeserver restarts, rate limits and broken networks. To make a bot of your own,
rewrite one function: `reply_to`. Four rules keep the promise:

1. Reply, then save. The `next_batch` of a sync response is saved once every reply to it, and to all
   before it, was acknowledged. So a stop needs no care: the next start does what was not done.
2. Repeat safely. The transaction ID of a reply is made from the event ID, and the device ID stays
   the same: the homeserver drops a reply that it has already.
3. Read what was left out. If a timeline is limited, the messages since the last sync are read page
   by page, and then the timeline. What precedes the bot's own invitation is history.
4. Persist. Every request is repeated until it succeeds or is refused for good, by one loop:
   `Client.persist`. What is no network error is a bug: it is shown, not repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import fnmatch
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import quote, urlsplit

import aiohttp
from nio import AsyncClient, AsyncClientConfig, MessageDirection, RoomMessageText

USAGE = """A Matrix bot that answers each message that starts with !replybot with the rest of it.

    export MATRIX_USER=@bot:example.org MATRIX_PASSWORD=...
    python echobot.py

Environment (an empty variable counts as missing):
    MATRIX_USER          required: the full user ID
    MATRIX_PASSWORD      this or the next is required
    MATRIX_ACCESS_TOKEN  used instead of the password if both are given; never written to disk
    MATRIX_HOMESERVER    base URL; default: found from the user ID at every start
    MATRIX_INVITERS      whose invitations are accepted, others are rejected: user ID patterns,
                         separated by spaces (@me:example.org @*:example.com); default: *
    STATE_DIRECTORY      where next_batch and session.json are kept; default: working directory
    LOG_LEVEL            DEBUG, INFO, WARNING or ERROR; default: INFO
    HTTPS_PROXY, HTTP_PROXY, NO_PROXY and systemd's NOTIFY_SOCKET are honoured.

Exit status: 0 stopped by SIGTERM or SIGINT, 1 a bug, 2 usage, 75 another copy is running on this
state directory, 77 credentials refused, 78 configuration wrong."""

COMMAND = "!replybot"
ENCRYPTED = (
    "I can't read encrypted messages. Please make a room with encryption turned off (it can't be"
    " turned off later) and invite me there."
)

DEVICE_ID = "ECHOBOT"  # always the same: transaction IDs are remembered for the device
SYNC_TIMEOUT = 30_000  # ms that the homeserver holds a poll when there is nothing new
QUIET_INTERVAL = 0.5  # s between two polls that bring nothing
SAVE_INTERVAL = 0.1  # s between two writes of next_batch
REQUEST_TIMEOUT = 60  # s that any other request may take
MAX_BACKOFF = 60  # s between two attempts, unless the homeserver asks for more
MAX_RETRY_AFTER = 120  # s
TURN = 5  # s that one of those that are rate limited may hold up the others
REFUSAL_PATIENCE = 60  # s that a room may be refused: some servers do so just after an invitation
PATIENCE = 600  # s that a room may fail otherwise while syncs succeed, or reply_to may take

MESSAGES = {"types": ["m.room.message", "m.room.encrypted", "m.room.member"], "limit": 100}
NOTHING: dict[str, list[str]] = {"types": []}
# What a person mends, at login too: the command is not lost meanwhile.
ACCOUNT_STATES = (
    "M_USER_LOCKED",
    "M_USER_SUSPENDED",
    "M_RESOURCE_LIMIT_EXCEEDED",
    "M_CONSENT_NOT_GIVEN",
)

JSON = dict[str, Any]
Request = Callable[[], Awaitable[Any]]
log = logging.getLogger("echobot")


async def reply_to(event: RoomMessageText) -> str | None:
    """Return the text to answer a message with, or None to stay silent.

    This is the function to rewrite for another bot. It may take its time, up to PATIENCE s: if it
    awaits instead of blocking, only its own room waits. It may raise: that costs this one reply.
    After a crash it may be called again for messages that were answered. The homeserver drops the
    repeated reply; what else it does should bear a repetition.
    """
    if not event.body.startswith(COMMAND):
        return None
    text = event.body
    # Until none is left, also of nested ones: two such bots never answer each other.
    while COMMAND in text:
        text = text.replace(COMMAND, "")
    return text.strip() or f"Usage: {COMMAND} text to repeat"


def main() -> int:
    """Run the bot until it is stopped; return the exit status."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    try:
        if sys.argv[1:]:
            raise Exit(2, "takes no arguments but --help; settings are environment variables")
        settings = Settings.from_environment()
        set_up_logging(settings.log_level)
        asyncio.run(run(settings, State(Path(settings.state_directory))))
    except Exit as reason:
        print(f"echobot: {reason}", file=sys.stderr)
        return reason.status
    return 0


class Exit(Exception):
    """The bot can't run: `status` is the exit status, the text what is wrong and what to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def run(settings: Settings, state: State) -> None:
    """Log in and answer commands until a signal comes; raise Exit if that is not possible."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    state.lock()
    session = state.load_session(settings.matrix_user)
    homeserver = settings.matrix_homeserver or await find_homeserver(settings.matrix_user, session)
    client = Client(homeserver, settings.matrix_user)
    if not re.match(r"https:|http://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", homeserver):
        log.warning("%s is not encrypted: others can read along", homeserver)
    if session and session["access_token"] and not settings.matrix_access_token:
        client.restore_login(session["user_id"], session["device_id"], session["access_token"])
        if session["homeserver"] != client.homeserver:
            state.save_session(**{**session, "homeserver": client.homeserver})
    else:
        await log_in(client, settings, state)
    log.info("Logged in as %s, device id: %s.", client.user_id, client.device_id)
    await sync_forever(client, settings, state)


def stop() -> NoReturn:
    """End the process as a crash would, but with status 0: what is not saved will be done again."""
    notify("STOPPING=1")
    os._exit(0)


async def sync_forever(client: Client, settings: Settings, state: State) -> None:
    """Start to answer each sync response, and poll on without waiting for that."""
    rooms = Rooms(client, settings.matrix_inviters.split())
    since = state.load_next_batch() or await position_of_now(client, settings, state)
    saved = asyncio.create_task(rooms.answer_pending_invitations(since))
    timeout = random.randrange(1, 100)  # ms; see new_timeout
    while True:
        started = time.monotonic()
        try:
            response = await poll(client, settings, state, timeout, SYNC_FILTER, since)
        except Failure as refusal:
            log.error("The homeserver refuses next_batch (%s): starting from now instead", refusal)
            since = await position_of_now(client, settings, state)
            continue
        if timeout < SYNC_TIMEOUT:
            notify("READY=1")
        answering = rooms.start_answering(response, since)
        since = response["next_batch"]
        if saved.done():
            saved.result()  # A bug there ends the bot: its position would never move again.
        saved = asyncio.create_task(save_after([saved, *answering], state, since))
        if not answering and timeout == SYNC_TIMEOUT:
            await asyncio.sleep(started + QUIET_INTERVAL - time.monotonic())
        timeout = SYNC_TIMEOUT


def new_timeout() -> int:
    """Return a timeout in ms for a sync without `since`, another one each time.

    Synapse repeats a response for two minutes to who asks the same, after a restart of the bot too.
    """
    return random.randrange(3 * SYNC_TIMEOUT, 4 * SYNC_TIMEOUT)


async def position_of_now(client: Client, settings: Settings, state: State) -> str:
    """Return and save the position to start from when there is none."""
    response = await poll(client, settings, state, new_timeout(), POSITION_FILTER, None)
    # At once: a kill must not make the next start a first one again.
    await state.save_next_batch(response["next_batch"])
    return str(response["next_batch"])


async def poll(
    client: Client, settings: Settings, state: State, timeout: int, which: JSON, since: str | None
) -> JSON:
    """Return the next sync response (`timeout` in ms); raise Failure if `since` is refused."""

    async def sync() -> Any:
        notify("WATCHDOG=1")
        try:
            return await client.sync(timeout, which, since)
        except Failure as failure:
            # Only here: all other requests are just repeated, with the new access token.
            if failure.status == 401 and failure.errcode not in ("", *ACCOUNT_STATES):
                await log_in(client, settings, state)
            raise

    return cast(JSON, await client.persist(sync, "the sync", final=[400] if since else []))


async def save_after(tasks: list[asyncio.Task[None]], state: State, next_batch: str) -> None:
    """Have a position saved once all that it stands for is done; a bug in that ends the bot."""
    await asyncio.gather(*tasks)
    state.save_soon(next_batch)


class Rooms(dict[str, "Room"]):
    """The rooms of which a sync response has told, by room ID."""

    def __init__(self, client: Client, inviters: list[str]) -> None:
        super().__init__()
        self.client, self.inviters = client, inviters

    def __missing__(self, room_id: str) -> Room:
        """Make a room when it is first asked for."""
        self[room_id] = Room(self.client, room_id)
        return self[room_id]

    def start_answering(self, response: JSON, since: str) -> list[asyncio.Task[None]]:
        """Start a task for each room of a sync response that follows `since`."""
        work = [
            self[room_id].answer_timeline(part(room, dict, "timeline"), since, response)
            for room_id, room in part(response, dict, "rooms", "join").items()
        ] + [
            self[room_id].answer_invitation(self.inviters, invited, since)
            for room_id, invited in part(response, dict, "rooms", "invite").items()
            if self[room_id].is_new(invited)
        ]
        return [asyncio.create_task(task) for task in work]

    async def answer_pending_invitations(self, since: str) -> None:
        """Answer the invitations of which only a sync without `since` tells again."""
        with contextlib.suppress(Failure):
            overview = await self.client.persist(
                lambda: self.client.sync(new_timeout(), POSITION_FILTER),
                "the sync for pending invitations",
                Patience(),
            )
            invited = part(overview, dict, "rooms", "invite")
            await asyncio.gather(*self.start_answering({"rooms": {"invite": invited}}, since))


@dataclass
class Patience:
    """Since when a room's requests were refused or failed otherwise, in monotonic s; 0: neither."""

    refused_since: float = 0
    failing_since: float = 0


@dataclass
class Room:
    """A room, and what is remembered of it until the process ends."""

    client: Client
    room_id: str
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # its parts are answered in order
    patience: Patience = field(default_factory=Patience)
    seen: set[str] = field(default_factory=set)  # event IDs that the next timeline may repeat
    just_joined: bool = False
    told_encrypted: bool = False
    invitation: Any = None  # the last one that brought no join, and when it may be tried again
    not_before: float = 0

    async def answer_timeline(self, timeline: JSON, since: str, response: JSON) -> None:
        """Answer the room's part of a sync response, and what it left out."""
        async with self.turn:
            events = part(timeline, list, "events")
            if part(timeline, bool, "limited") or self.just_joined:
                gap = await self.read_gap(since, response["next_batch"])
                known = self.seen.union(part(event, str, "event_id") for event in gap)
                # The gap may stop early; what the timeline has before its end is older than it.
                new = takewhile(lambda e: part(e, str, "event_id") not in known, reversed(events))
                events = gap + list(new)[::-1]
            self.just_joined = False
            await self.answer_events(events)
            self.seen.clear()

    def is_new(self, invited: Any) -> bool:
        """Tell an invitation from one that the homeserver repeats in every sync response."""
        # Without `unsigned`: the age of an event changes.
        events = part(invited, list, "invite_state", "events")
        invitation = [(part(e, str, "sender"), part(e, dict, "content")) for e in events]
        if invitation == self.invitation and time.monotonic() < self.not_before:
            return False
        self.invitation, self.not_before = invitation, time.monotonic() + PATIENCE
        return True

    async def answer_invitation(self, inviters: list[str], invited: JSON, since: str) -> None:
        """Join the room and answer what was sent since the invitation, or reject that."""
        client, inviter = self.client, "nobody"
        for event in part(invited, list, "invite_state", "events"):
            # The last one counts: only that is our own homeserver's, not what the inviter's says.
            match event:
                case {"type": "m.room.member", "state_key": client.user_id, "sender": str(sender)}:
                    inviter = sender
        with contextlib.suppress(Failure):
            async with self.turn:
                what = f"joining {self.room_id}"
                if not any(fnmatch.fnmatchcase(inviter, pattern) for pattern in inviters):
                    what = f"rejecting {self.room_id}"
                    await client.persist(
                        lambda: client.room_leave(self.room_id), what, self.patience
                    )
                    log.info("Rejected the invitation of %s to %s", inviter, self.room_id)
                    return
                await client.persist(lambda: client.join(self.room_id), what, self.patience)
                log.info("Joined %s, invited by %s", self.room_id, inviter)
                self.just_joined, self.invitation = True, None
                # Up to now: the polls since the invitation have told nothing of this room.
                await self.answer_events(await self.read_gap(since, None))

    async def read_gap(self, since: str, to: str | None) -> list[Any]:
        """Return the events between two positions (default: now), oldest first, as far as read.

        Spec: GET /rooms/{roomId}/messages. Some homeservers' pages never end, or begin again.
        """
        events: list[Any] = []
        positions: set[str] = set()
        delays, news = backoff(), time.monotonic()
        what = f"reading {self.room_id}"

        async def read() -> Any:
            forward = MessageDirection.front
            return await self.client.room_messages(self.room_id, since, to, forward, 100, MESSAGES)

        with contextlib.suppress(Failure):
            while since and since not in positions:
                positions.add(since)
                page = await self.client.persist(read, what, self.patience)
                events += page["chunk"]
                since = part(page, str, "end")
                if page["chunk"]:
                    delays, news = backoff(), time.monotonic()
                elif time.monotonic() - news > PATIENCE:
                    log.warning("Gave up on %s: its pages never end", what)
                    break
                elif since:
                    await asyncio.sleep(next(delays))
        return events

    async def answer_events(self, events: list[Any]) -> None:
        """Answer what is new among events, each once and in order; a bug costs its event."""
        done, start = self.look_over(events)
        for number, event in enumerate(events):
            event_id = part(event, str, "event_id")
            membership = part(event, str, "unsigned", "membership")
            is_history = membership in ("leave", "ban", "knock") if membership else number < start
            if is_history or event_id in self.seen or transaction_id(event_id) in done:
                continue
            self.seen.add(event_id)
            try:
                await self.answer(event)
            except Failure:
                continue  # It is in the log.
            except Exception as error:
                log_bug(error, f"Passed over {event_id} in {self.room_id}")

    def look_over(self, events: list[Any]) -> tuple[set[str], int]:
        """Return transaction IDs of what was sent before a crash, and the number of the invitation.

        Without `unsigned.membership`, which not every homeserver tells, only that invitation (or
        a join without one) tells history from news.
        """
        done, start, before = set(), 0, ""
        for number, event in enumerate(events):
            match event:
                case {"sender": self.client.user_id, "unsigned": {"transaction_id": str(tx_id)}}:
                    done.add(tx_id)
                case {
                    "type": "m.room.member",
                    "state_key": self.client.user_id,
                    "content": {"membership": str(membership)},
                }:
                    before = before or part(event, str, "unsigned", "prev_content", "membership")
                    if {before, membership} & {"invite", "join"} == {membership}:
                        start = number if before != membership else start
                    before = membership
        return done, start

    async def answer(self, event: Any) -> None:
        """Answer an event if it calls for it, and return once the reply is acknowledged."""
        match event:
            case (
                {"sender": self.client.user_id}
                | {"unsigned": {"redacted_because": _}}
                | {"content": {"m.relates_to": {"rel_type": "m.replace"}}}
            ):
                return
            case {"type": "m.room.encrypted", "event_id": str()} if not self.told_encrypted:
                self.told_encrypted = True
                log.warning("%s is encrypted: its messages can't be read", self.room_id)
                content = {"msgtype": "m.notice", "body": ENCRYPTED, "m.mentions": {}}
                await self.send(content, f"encrypted{self.room_id}", "the notice")
            case {
                "type": "m.room.message",
                "event_id": str(event_id),
                "sender": str(),
                "origin_server_ts": int(),
                "content": {"msgtype": "m.text", "body": str(body)} as content,
            }:
                formatted_body, style = content.get("formatted_body"), content.get("format")
                message = RoomMessageText(event, body, formatted_body, style)
                reply = await call_reply_to(message)
                if reply is not None:
                    content = text_content(reply, message)
                    await self.send(content, event_id, f"the reply to {event_id}")
                    log.info("Answered %s in %s", event_id, self.room_id)

    async def send(self, content: JSON, about: str, what: str) -> None:
        """Send a message once, however often it is tried, about an event ID; or raise Failure."""
        await self.client.persist(
            lambda: self.client.room_send(
                self.room_id, "m.room.message", content, transaction_id(about)
            ),
            f"{what} in {self.room_id}",
            self.patience,
        )


def transaction_id(event_id: str) -> str:
    """Return the transaction ID for a reply, safe in URLs: old event IDs have `/` and `+`."""
    return quote(event_id, safe="!$:", errors="replace").replace("%", "~")


async def call_reply_to(event: RoomMessageText) -> str | None:
    """Return what reply_to returns; raise what it raises, or TimeoutError after PATIENCE s."""

    async def call() -> str | BaseException | None:
        try:
            return await reply_to(event)
        except BaseException as error:  # Even SystemExit, as of argparse, ends no bot.
            return error

    # In a task of its own: its cancellation, by itself or after too long, is not ours.
    calling = asyncio.create_task(call())
    await asyncio.wait({calling}, timeout=PATIENCE)
    if calling.cancel():
        raise TimeoutError("reply_to did not return")
    result = calling.result()
    if isinstance(result, BaseException):
        raise RuntimeError("reply_to failed") from result
    return result


def log_bug(error: BaseException, what: str) -> None:
    """Log where an exception comes from, but not its text, which may quote a message."""
    causes: list[str] = []
    cause: BaseException | None = error
    while cause:
        frames = traceback.format_list(traceback.extract_tb(cause.__traceback__))
        causes.insert(0, f"{''.join(frames)}{type(cause).__name__}")
        cause = cause.__cause__
    log.error("%s:\n%s", what, "\n".join(causes))


def text_content(body: str, event: RoomMessageText) -> JSON:
    """Return the content of a reply to an event, in that event's thread if it has one."""
    # Without m.mentions a body that says @room would ping everybody, with the rights of the bot.
    # A lone surrogate can't be sent: homeservers answer it with 500 for ever.
    text = body.encode(errors="replace").decode()
    content: JSON = {"msgtype": "m.text", "body": text, "m.mentions": {}}
    match event.source["content"].get("m.relates_to"):
        case {"rel_type": "m.thread", "event_id": str(root)} if root.isprintable():
            content["m.relates_to"] = {
                "rel_type": "m.thread",
                "event_id": root,
                "is_falling_back": True,
                "m.in_reply_to": {"event_id": event.event_id},
            }
    return content


class Failure(Exception):
    """A request that brought no success; the text says why, and never quotes a message.

    `status`: HTTP status, 0 without an answer. `errcode`: the homeserver's, "" if it gave none.
    `retry_after`: how long it asks to wait, in s.
    """

    def __init__(self, cause: str, status: int = 0, errcode: str = "", retry_after: float = 0):
        super().__init__(cause)
        self.status, self.errcode, self.retry_after = status, errcode, retry_after


# What a success has, by the names of nio's responses.
REQUIRED: dict[str, tuple[str, type]] = {
    "JoinResponse": ("room_id", str),
    "LoginResponse": ("access_token", str),
    "RoomMessagesResponse": ("chunk", list),
    "RoomSendResponse": ("event_id", str),
    "SyncResponse": ("next_batch", str),
    "WhoamiResponse": ("user_id", str),
}


class Client(AsyncClient):
    """nio's client, but each request returns JSON or raises Failure, and `persist` repeats it.

    nio's own parser fails on a whole response for one odd event, and takes most of the time.
    """

    def __init__(self, homeserver: str, user: str) -> None:
        config = AsyncClientConfig(max_timeouts=0, request_timeout=REQUEST_TIMEOUT)
        super().__init__(homeserver.rstrip("/"), user, DEVICE_ID, config=config)
        try:
            url = urlsplit(homeserver)
            if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
                raise ValueError
        except ValueError:
            problem = f"the base URL of the homeserver of {user} is malformed"
            raise Exit(78, f"{problem}: set MATRIX_HOMESERVER to one like https://a.org") from None
        is_direct = urllib.request.proxy_bypass(url.hostname)
        self.http_proxy = None if is_direct else urllib.request.getproxies().get(url.scheme)
        # nio's own session ends at 100 connections: so many sends that hang would stop the poll.
        self.client_session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self.limited = asyncio.Lock()  # held by the one of those that met a 429 whose turn it is
        self.sync_failed_at = 0.0  # monotonic s

    async def persist(
        self, request: Request, what: str, patience: Patience | None = None, final: Any = (400, 413)
    ) -> Any:
        """Return the response of a request: repeat it until it succeeds or is refused for good.

        Raise Failure then. `what` names the request in the log; `final` has HTTP statuses.
        """
        causes: set[str] = set()
        delays, wait = backoff(), 0.0
        while True:
            # One at a time of those that are limited, or they would ask all for each free slot.
            async with self.limited if patience and wait else contextlib.nullcontext():
                await asyncio.sleep(wait)
                try:
                    response = await request()
                except Failure as error:
                    failure = error
                else:
                    self.note_success(what, patience, causes)
                    return response
            if self.is_final(failure, patience, final):
                log.warning("Gave up on %s: %s", what, failure)
                raise failure
            is_limited = failure.status == 429
            if str(failure) not in causes:
                causes.add(str(failure))
                level = logging.INFO if is_limited else logging.WARNING
                log.log(level, "Trouble with %s: %s; trying again", what, failure)
            wait = min(failure.retry_after, TURN) if is_limited else 0
            await asyncio.sleep(failure.retry_after - wait if is_limited else next(delays))

    def note_success(self, what: str, patience: Patience | None, causes: set[str]) -> None:
        """Log that trouble is over, and forget since when a room has failed."""
        if causes:
            log.info("No more trouble with %s", what)
        if patience:
            patience.failing_since = patience.refused_since = 0

    def is_final(self, failure: Failure, patience: Patience | None, final: Any) -> bool:
        """Tell whether a failure is for good: the one predicate for what is not repeated."""
        now = time.monotonic()
        if failure.status == 429 or failure.errcode in ACCOUNT_STATES:
            return False
        # Without an errcode it may come from a proxy whose homeserver is restarting.
        if failure.status in final and failure.errcode:
            return True
        if patience is None:
            self.sync_failed_at = now
            return False
        sound_since = self.sync_failed_at
        if failure.errcode and 400 <= failure.status < 500 and failure.status != 401:
            patience.failing_since = 0
            patience.refused_since = patience.refused_since or now
            return now - max(patience.refused_since, sound_since) > REFUSAL_PATIENCE
        patience.failing_since = patience.failing_since or now
        return now - max(patience.failing_since, sound_since) > PATIENCE

    async def send(self, method: Any, path: Any, *body: Any, **_: Any) -> aiohttp.ClientResponse:
        """Send a request through the proxy of the environment; `timeout` is in s."""
        data, headers, _trace_context, timeout = body
        assert self.client_session
        return await self.client_session.request(
            method,
            self.homeserver + path,
            data=data,
            headers=headers,
            proxy=self.http_proxy,
            timeout=aiohttp.ClientTimeout(total=timeout or REQUEST_TIMEOUT),
        )

    async def _send(self, *arguments: Any, **options: Any) -> Any:
        """Make a request, once; return JSON or raise Failure."""
        try:
            return await super()._send(*arguments, **options)
        except TimeoutError:
            raise Failure("no answer in time") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise Failure(str(error) or type(error).__name__) from None
        except aiohttp.ClientError as error:
            # Without its text, which may quote a proxy's password.
            raise Failure(f"{type(error).__name__} {getattr(error, 'status', '')}") from None

    async def create_matrix_response(
        self, response_class: Any, transport_response: Any, data: Any = None, save_to: Any = None
    ) -> Any:
        """Return the JSON of an HTTP response, or raise Failure."""
        status = transport_response.status
        try:
            body = json.loads((await transport_response.read()).decode(errors="replace"))
        except (ValueError, RecursionError):
            body = None
        key, kind = REQUIRED.get(response_class.__name__, ("", dict))
        if status == 200 and isinstance(body, dict) and isinstance(body.get(key, body), kind):
            return body
        errcode = part(body, str, "errcode")
        seconds = transport_response.headers.get("Retry-After", "")
        wait = float(seconds) if seconds.isdecimal() else part(body, int, "retry_after_ms") / 1000
        reason = " ".join(part(body, str, "error").split())[:200]
        cause = f"HTTP {status} {errcode} ({reason})" if errcode else f"HTTP {status}"
        raise Failure(cause, status, errcode, min(wait or 1, MAX_RETRY_AFTER))

    async def receive_response(self, response: Any) -> None:
        """Change nothing: nio's picture of the rooms is not used, and logging in is ours."""


def sync_filter(timeline: JSON) -> JSON:
    """Return a filter for a sync: nothing but these events of timelines, and invitations."""
    # Without lazy_load_members Synapse leaves out a room that it has joined only in part.
    state = {**NOTHING, "lazy_load_members": True}
    room = {"timeline": timeline, "state": state, "ephemeral": NOTHING, "account_data": NOTHING}
    return {"room": room, "presence": NOTHING, "account_data": NOTHING}


SYNC_FILTER, POSITION_FILTER = sync_filter(MESSAGES), sync_filter(NOTHING)


def backoff() -> Iterator[float]:
    """Yield how long to wait before each further attempt, in s."""
    delay = 0.25
    while True:
        yield delay * random.uniform(0.5, 1)
        delay = min(2 * delay, MAX_BACKOFF)


def part(whole: Any, kind: type, *path: str) -> Any:
    """Return a part of untrusted JSON, empty if it is missing or of another kind."""
    for name in path:
        whole = whole.get(name) if isinstance(whole, dict) else None
    return whole if isinstance(whole, kind) else kind()


async def find_homeserver(user: str, session: JSON | None) -> str:
    """Return the base URL that the user's server name publishes (spec: "Well-known URI")."""
    server_name = user.partition(":")[2]
    client = Client("https://" + re.sub(r":\d+$", "", server_name), user)

    async def look_up() -> str:
        try:
            found = await client.discovery_info()
            return str(part(found, dict, "m.homeserver").get("base_url"))
        except Failure as failure:
            if failure.status == 404:
                return f"https://{server_name}"
            if session:
                return str(session["homeserver"])
            raise

    try:
        return str(await client.persist(look_up, f"finding the homeserver of {server_name}"))
    finally:
        await client.close()


async def log_in(client: Client, settings: Settings, state: State) -> None:
    """Log in, on the same device as before; raise Exit if that is refused."""
    user, token = settings.matrix_user, settings.matrix_access_token
    # Another client: some homeservers refuse a login that carries an access token they forgot.
    newcomer = Client(client.homeserver, user)
    newcomer.access_token = token
    try:
        found = await newcomer.persist(
            lambda: newcomer.whoami() if token else newcomer.login(settings.matrix_password),
            f"the login at {client.homeserver}",
            final=range(400, 500),
        )
    except Failure as failure:
        secret = "MATRIX_ACCESS_TOKEN" if token else "MATRIX_PASSWORD"
        problem = f"{client.homeserver} refuses {user}: {failure}"
        raise Exit(77, f"{problem}; check MATRIX_USER and {secret}") from None
    finally:
        await newcomer.close()
    if found["user_id"] != user:
        raise Exit(78, f"the login is of {found['user_id']}: set MATRIX_USER to that")
    device_id = found.get("device_id") or DEVICE_ID
    client.restore_login(user, device_id, token or found["access_token"])
    state.save_session(
        homeserver=client.homeserver,
        user_id=user,
        device_id=device_id,
        access_token="" if token else client.access_token,
    )


@dataclass
class State:
    """The state directory: next_batch and session.json, which hold the old or the new, whole."""

    directory: Path
    failing: bool = False
    is_foreign: bool = False  # of another user, until our own login is saved
    newest: str = ""  # the newest position that may be saved
    saving: asyncio.Task[None] | None = None

    def lock(self) -> None:
        """Keep the directory for this process until it ends; raise Exit if it can't be used."""
        try:
            fcntl.flock(os.open(self.directory, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.directory / "next_batch.tmp").touch(0o600)
        except BlockingIOError:
            problem = f"another copy is running on the state directory {self.directory}"
            raise Exit(75, f"{problem}: stop it, or set another STATE_DIRECTORY") from None
        except OSError as error:
            problem = f"can't use the state directory {self.directory} ({error.strerror})"
            raise Exit(78, f"{problem}: set STATE_DIRECTORY to one that is writable") from None

    def load_session(self, user: str) -> JSON | None:
        """Return the session that was saved, None if there is none of this user."""
        try:
            session = json.loads((self.directory / "session.json").read_bytes())
            names = ("homeserver", "user_id", "device_id", "access_token")
            session = {name: str(session[name]) for name in names}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError):
            log.error("session.json in %s can't be read: logging in anew", self.directory)
            return None
        if session["user_id"] == user:
            return session
        log.warning("Not using the state of %s", session["user_id"])
        self.is_foreign = True
        return None

    def load_next_batch(self) -> str | None:
        """Return the sync token that was saved, None if there is none."""
        try:
            next_batch = (self.directory / "next_batch").read_text(errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Exit(78, f"can't read next_batch in {self.directory}: {error.strerror}") from None
        if not next_batch:
            log.error("next_batch in %s is empty: starting from now instead", self.directory)
        return next_batch

    def save_session(self, **session: str) -> None:
        """Save where and as whom we are logged in."""
        try:
            if self.is_foreign:
                (self.directory / "next_batch").unlink(missing_ok=True)
            self.is_foreign = False
            replace_file(self.directory / "session.json", json.dumps(session))
        except OSError as error:
            log.error("Can't save session.json: %s; answering goes on", error.strerror)

    def save_soon(self, next_batch: str) -> None:
        """Save a sync token without waiting for that; of those that come meanwhile, the newest."""
        self.newest = next_batch
        if self.saving is None or self.saving.done():
            self.saving = asyncio.create_task(self.save_newest())

    async def save_newest(self) -> None:
        """Save until the newest sync token is saved."""
        saved = ""
        while saved != self.newest:
            saved = self.newest
            await self.save_next_batch(saved)
            await asyncio.sleep(SAVE_INTERVAL)

    async def save_next_batch(self, next_batch: str) -> None:
        """Save a sync token; tell once if that fails."""
        try:
            await asyncio.to_thread(replace_file, self.directory / "next_batch", next_batch)
            self.failing = False
        except OSError as error:
            if not self.failing:
                log.error("Can't save next_batch: %s; answering goes on", error.strerror)
            self.failing = True


def replace_file(path: Path, text: str) -> None:
    """Replace a file so that after a crash it holds either the old text or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@dataclass(frozen=True)
class Settings:
    """The environment variables of USAGE."""

    matrix_user: str = ""
    matrix_password: str = ""
    matrix_access_token: str = ""
    matrix_homeserver: str = ""
    matrix_inviters: str = "*"
    state_directory: str = "."
    log_level: str = "INFO"

    @classmethod
    def from_environment(cls) -> Settings:
        """Return the settings; raise Exit with all that is missing."""
        given = {name: os.environ.get(name.upper()) for name in cls.__annotations__}
        settings = cls(**{name: value for name, value in given.items() if value})
        missing = [] if settings.matrix_user else ["MATRIX_USER (like @bot:example.org)"]
        if not settings.matrix_password and not settings.matrix_access_token:
            missing.append("MATRIX_PASSWORD or MATRIX_ACCESS_TOKEN")
        if missing:
            raise Exit(78, f"set {' and '.join(missing)}; --help tells of all variables")
        for name, value in given.items():
            if value and not value.isprintable():
                raise Exit(78, f"{name.upper()} is malformed (no UTF-8?): set it anew")
        return settings


def set_up_logging(level: str) -> None:
    """Log our own lines to stderr, with UTC timestamps unless systemd's journal reads them."""
    stderr = os.fstat(sys.stderr.fileno())
    in_journal = os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
    logging.Formatter.converter = time.gmtime
    logging.Formatter.default_msec_format = "%s.%03dZ"
    # The libraries stay silent: nio's warnings quote whole events, access tokens included.
    logging.basicConfig(
        level=logging.CRITICAL,
        format=f"{'' if in_journal else '%(asctime)s '}%(levelname)s %(message)s",
    )
    try:
        log.setLevel(level.upper())
    except ValueError:
        raise Exit(78, "LOG_LEVEL is unknown: set it to DEBUG, INFO, WARNING or ERROR") from None


def notify(state: str) -> None:
    """Tell systemd the state of the service, if it asked for it (see sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.sendto(state.encode(), re.sub("^@", "\0", address))


if __name__ == "__main__":
    sys.exit(main())
