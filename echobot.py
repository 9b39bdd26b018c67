#!/usr/bin/env python3
"""A Matrix bot that answers every command once: none lost, none doubled.

It answers each message that starts with `!replybot` with the rest of that message, through bursts,
downtime, SIGKILL, homeserver restarts, rate limits and broken networks. To make a bot of your own,
rewrite one function: `reply_to`.

    export MATRIX_USER=@bot:example.org MATRIX_PASSWORD=...
    python echobot.py

Environment (an empty variable counts as missing):
    MATRIX_USER          required: user ID, or its localpart if MATRIX_HOMESERVER is given
    MATRIX_PASSWORD      this or the next is required
    MATRIX_ACCESS_TOKEN  used instead of the password if both are given; never written to disk
    MATRIX_HOMESERVER    base URL; default: found from the server name of the user ID
    MATRIX_INVITERS      whose invitations are accepted, others are rejected: user ID patterns,
                         separated by spaces (@me:example.org @*:example.com); default: *
    STATE_DIRECTORY      where next_batch and session.json are kept; default: working directory
    LOG_LEVEL            DEBUG, INFO, WARNING or ERROR; default: INFO
    HTTPS_PROXY, HTTP_PROXY and NO_PROXY are honoured, and so are systemd's NOTIFY_SOCKET,
    WATCHDOG_USEC and JOURNAL_STREAM.

Exit status: 0 stopped by SIGTERM or SIGINT, 1 a bug, 2 usage, 75 another copy is running on this
state directory, 77 credentials refused, 78 configuration wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import fnmatch
import itertools
import json
import logging
import os
import random
import re
import secrets
import signal
import socket
import sys
import time
import traceback
import urllib.request
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from nio import (
    AsyncClient,
    AsyncClientConfig,
    BadEvent,
    ErrorResponse,
    Event,
    InviteInfo,
    InviteMemberEvent,
    LocalProtocolError,
    MessageDirection,
    RoomMessageText,
    SyncResponse,
    Timeline,
)

COMMAND = "!replybot"

SYNC_TIMEOUT = 30_000  # ms that the homeserver holds a poll when there is nothing new
REQUEST_TIMEOUT = 60  # s that any other request may take
PATIENCE = 600  # s that one event may fail, while syncs succeed, before it is passed over
MAX_BACKOFF = 60  # s
MAX_UNFINISHED = 10_000  # sync answers with replies under way before polling pauses
SHUTDOWN_GRACE = 5  # s for the sends in flight
MAX_RETRY_AFTER = 3600  # s
LOGINS = 4  # in LOGIN_WINDOW s: Synapse allows five, then one in 333 s
LOGIN_WINDOW = 1400  # s

# Of all that a homeserver has to tell, only what is used here.
NOTHING: dict[str, Any] = {"types": []}
MESSAGES = {"types": ["m.room.message", "m.room.encrypted"]}
QUIET = {"presence": NOTHING, "account_data": NOTHING}
QUIET_ROOM = {"state": NOTHING, "ephemeral": NOTHING, "account_data": NOTHING}
SYNC_FILTER = {**QUIET, "room": {**QUIET_ROOM, "timeline": {**MESSAGES, "limit": 100}}}
START_FILTER = {**QUIET, "room": {**QUIET_ROOM, "timeline": NOTHING}}

# The parts of an answer that are read here, by name ("!" for a room ID).
USED: dict[str, Any] = {
    **dict.fromkeys(("rooms", "join", "invite", "!", "timeline", "invite_state"), dict),
    **dict.fromkeys(("next_batch", "start", "end"), str),
    **dict.fromkeys(("events", "chunk"), list),
    "limited": bool,
}
# HTTP statuses that are final: of most requests, and at the start of any answer.
REFUSED = frozenset(range(400, 500)) - {401, 429}
ANSWERED = frozenset(range(200, 500)) - {429}
NO_ANSWER = (aiohttp.ClientError, OSError, asyncio.TimeoutError)

Call = Callable[[], Awaitable[Any]]
Tasks = list["asyncio.Task[None]"]
Batches = asyncio.Queue[tuple[str, Tasks]]  # (next_batch, what must be done before it is saved)

log = logging.getLogger("echobot")


async def reply_to(event: RoomMessageText) -> str | None:
    """Return the text to answer a message with, or None to stay silent.

    This is the function to rewrite for another bot. It may take its time: other rooms are not held
    up. It may raise: that costs this one reply. After a crash it is called again for messages whose
    reply was not yet acknowledged, so what it does besides answering should bear a repetition.
    """
    if not event.body.startswith(COMMAND):
        return None
    # Every occurrence is removed, so that two such bots never answer each other.
    return event.body.replace(COMMAND, "").strip() or f"Usage: {COMMAND} text to repeat"


def main() -> int:
    """Run the bot until it is stopped; return the exit status."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(__doc__.strip())
        return 0
    try:
        if sys.argv[1:]:
            raise Exit(2, "takes no arguments but --help; settings are environment variables")
        settings = Settings.from_environment(os.environ)
        set_up_logging(settings.log_level)
        with locked(settings.state_directory):
            asyncio.run(run(settings))
    except Exit as reason:
        print(f"echobot: {reason}", file=sys.stderr)
        return reason.status
    return 0


class Exit(Exception):
    """The bot can't run: `status` is the exit status, the text what is wrong and what to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def run(settings: Settings) -> None:
    """Answer commands until SIGTERM or SIGINT; raise Exit if that is not possible."""
    batches: Batches = asyncio.Queue(MAX_UNFINISHED)
    homeserver = Homeserver(settings)
    polling = asyncio.create_task(poll(homeserver, batches))
    saving = asyncio.create_task(save_in_order(batches, settings.state_directory))
    watchdog = asyncio.create_task(feed_watchdog(homeserver))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, polling.cancel)
    try:
        ended, _ = await asyncio.wait({polling, saving}, return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        for task in ended:
            if not task.cancelled():
                task.result()  # Neither returns: this raises what ended it.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(batches.join(), SHUTDOWN_GRACE)
    finally:
        watchdog.cancel()
        await homeserver.client.close()


async def poll(homeserver: Homeserver, batches: Batches) -> None:
    """Sync for ever: start to answer each sync answer, and poll on without waiting for that."""
    await homeserver.connect()
    since = await start(homeserver, batches, load_next_batch(homeserver.settings.state_directory))
    while True:
        try:
            response = await homeserver.sync(since, SYNC_FILTER)
        except Failure as failure:
            log.error("The homeserver refuses next_batch (%s): starting from now instead", failure)
            since = await start(homeserver, batches, None)
            continue
        await batches.put((response.next_batch, start_answering(homeserver, response, since)))
        # Replies go on the wire first: building the next poll would hold them up.
        await asyncio.sleep(0)
        since = response.next_batch


async def start(homeserver: Homeserver, batches: Batches, since: str | None) -> str:
    """Take up pending invitations; return `since`, or without one the position of now."""
    # An incremental sync tells of an invitation once, one without `since` of all that are pending.
    response = await homeserver.sync(None, START_FILTER)
    notify("READY=1")
    since = since or response.next_batch
    await batches.put((since, []))
    await batches.put((since, start_answering(homeserver, response, since)))
    return since


def start_answering(homeserver: Homeserver, response: SyncResponse, since: str) -> Tasks:
    """Start to answer a sync answer, which follows `since`: one task for each room."""
    work = [
        answer_room(homeserver, room_id, room.timeline, since, response.next_batch)
        for room_id, room in response.rooms.join.items()
    ] + [
        accept_invitation(homeserver, room_id, room, since, response.next_batch)
        for room_id, room in response.rooms.invite.items()
    ]
    return [asyncio.create_task(task) for task in work]


async def answer_room(
    homeserver: Homeserver, room_id: str, timeline: Timeline, since: str, next_batch: str
) -> None:
    """Answer the part of a sync answer that belongs to a room, once its earlier parts are."""
    async with homeserver.turns[room_id]:
        if timeline.limited:
            await answer_gap(homeserver, room_id, since, next_batch)
        else:
            for event in timeline.events:
                await answer(homeserver, room_id, event)


async def answer_gap(homeserver: Homeserver, room_id: str, since: str, next_batch: str) -> None:
    """Answer what was sent to a room between two positions, reading forward page by page."""
    messages = partial(
        homeserver.client.room_messages,
        room_id,
        end=next_batch,
        direction=MessageDirection.front,
        limit=100,
        message_filter=MESSAGES,
    )
    position: str | None = since
    try:
        while position:
            page = await homeserver.request(partial(messages, position))
            for event in page.chunk:
                await answer(homeserver, room_id, event)
            position = page.end if page.end != position else None
    except Failure as failure:
        log.warning("Passed over a gap in %s: %s", room_id, failure)


async def accept_invitation(
    homeserver: Homeserver, room_id: str, room: InviteInfo, since: str, next_batch: str
) -> None:
    """Join a room and answer what was sent there since the invitation, or reject the invitation."""
    client, patterns = homeserver.client, homeserver.settings.inviters
    inviters = [
        event.sender
        for event in room.invite_state
        if isinstance(event, InviteMemberEvent) and event.state_key == client.user_id
    ]
    inviter = inviters[-1] if inviters else "somebody"
    try:
        async with homeserver.turns[room_id]:
            if not any(fnmatch.fnmatchcase(inviter, pattern) for pattern in patterns):
                await homeserver.request(lambda: client.room_leave(room_id))
                log.info("Rejected the invitation of %s to %s", inviter, room_id)
                return
            await homeserver.request(lambda: client.join(room_id))
            log.info("Joined %s, invited by %s", room_id, inviter)
            await answer_gap(homeserver, room_id, since, next_batch)
    except Failure as failure:
        log.warning("Passed over the invitation of %s to %s: %s", inviter, room_id, failure)


async def answer(homeserver: Homeserver, room_id: str, event: Event) -> None:
    """Answer an event if it calls for it, and return once the reply is acknowledged."""
    match event.source:
        case {"sender": homeserver.client.user_id} | {"unsigned": {"redacted_because": _}}:
            pass
        # The membership that the bot had when it was sent: that is history (spec: UnsignedData).
        case {"unsigned": {"membership": "leave" | "ban" | "knock"}}:
            pass
        case {"content": {"m.relates_to": {"rel_type": "m.replace"}}}:
            pass
        case {"type": "m.room.encrypted"}:
            await tell_encrypted(homeserver, room_id)
        case {"type": "m.room.message", "content": {"msgtype": "m.text", "body": str(body)}}:
            # nio rejects a message for any odd part of it, like a null formatted_body.
            if isinstance(event, BadEvent):
                event = RoomMessageText(event.source, body, None, None)
            if isinstance(event, RoomMessageText):
                await reply(homeserver, room_id, event)


async def reply(homeserver: Homeserver, room_id: str, event: RoomMessageText) -> None:
    """Send what reply_to returns for a message."""
    started = time.monotonic()
    try:
        body = await asyncio.wait_for(reply_to(event), PATIENCE)
        if body is None:
            return
        content = text_content(body, event)
    except Exception as error:
        # Not its text, which may quote the message.
        file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {Path(file).name}:{line}"
        log.error("reply_to failed for %s in %s: %s", event.event_id, room_id, where)
        return
    if await send(homeserver, room_id, content, event.event_id):
        homeserver.answered += 1
        elapsed = (time.monotonic() - started) * 1000
        log.info("Answered %s in %s after %.0f ms", event.event_id, room_id, elapsed)


def text_content(body: str, event: RoomMessageText) -> dict[str, Any]:
    """Return the content of a reply to an event, in that event's thread if it has one."""
    # Without m.mentions a body that says @room would ping everybody, with the rights of the bot.
    # A lone surrogate can't be sent: homeservers answer it with 500 for ever.
    text = body.encode(errors="replace").decode()
    content: dict[str, Any] = {"msgtype": "m.text", "body": text, "m.mentions": {}}
    match event.source["content"].get("m.relates_to"):
        case {"rel_type": "m.thread", "event_id": str(root)}:
            content["m.relates_to"] = {
                "rel_type": "m.thread",
                "event_id": root,
                "is_falling_back": True,
                "m.in_reply_to": {"event_id": event.event_id},
            }
    return content


async def tell_encrypted(homeserver: Homeserver, room_id: str) -> None:
    """Say once in a room that its messages are encrypted and can't be read."""
    if room_id in homeserver.told_encrypted:
        return
    homeserver.told_encrypted.add(room_id)
    log.warning("%s is encrypted: its messages can't be read", room_id)
    body = "This room is encrypted, and I can't read encrypted messages."
    content = {"msgtype": "m.notice", "body": body, "m.mentions": {}}
    await send(homeserver, room_id, content, f"encrypted{room_id}")


async def send(homeserver: Homeserver, room_id: str, content: dict[str, Any], tx_id: str) -> bool:
    """Send a message, once however often it is tried with this transaction ID; tell if it went."""
    client = homeserver.client
    try:
        await homeserver.request(
            lambda: client.room_send(room_id, "m.room.message", content, tx_id=tx_id)
        )
    except Failure as failure:
        log.warning("Passed over %s in %s: %s", tx_id, room_id, failure)
        return False
    return True


class Homeserver:
    """The bot's account on its homeserver: login, requests, and one rule for all their errors."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = Client("")
        self.session = Session("", "", "", "")
        self.is_other_account = False
        # Synapse repeats an answer for two minutes to whoever asks with the same parameters, though
        # messages may have been redacted: so each process asks with others.
        self.hold = SYNC_TIMEOUT - random.randrange(1000)
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.told_encrypted: set[str] = set()
        self.answered = 0
        self.login_lock = asyncio.Lock()
        self.logins: deque[float] = deque(maxlen=LOGINS)
        self.alive_until = self.last_vital_failure = 0.0
        self.troubled: set[asyncio.Task[Any] | None] = set()
        self.causes: set[str] = set()

    async def sync(self, since: str | None, sync_filter: dict[str, Any]) -> SyncResponse:
        """Return the next sync answer; raise Failure if the homeserver refuses `since`."""
        call = partial(self.client.sync, self.hold, sync_filter, since)
        response: SyncResponse = await self.request(call, {400} if since else (), vital=True)
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        notify(f"STATUS=Answered {self.answered}, last sync at {now}")
        return response

    async def request(
        self, call: Call, final: Container[int] = REFUSED, vital: bool = False
    ) -> Any:
        """Return the response to a request; repeat it while that may help, else raise Failure.

        Not repeated: what the homeserver itself answers with a status in `final`, and what fails
        for PATIENCE s while `vital` requests, those that the whole bot waits for, do not.
        """
        started = time.monotonic()
        try:
            for attempt in itertools.count():
                access_token = self.session.access_token
                if vital:
                    self.alive_until = time.monotonic() + 2 * REQUEST_TIMEOUT
                try:
                    return await respond(call)
                except Failure as failure:
                    # Without an errcode it may come from a proxy whose homeserver is restarting.
                    certain = failure.errcode or (vital and (failure.status == 404 or attempt >= 4))
                    if certain and failure.status in final:
                        raise
                    if failure.errcode and failure.status == 401:
                        await self.log_in(access_token)
                        continue
                    self.note_trouble(failure)
                    now, wait = time.monotonic(), failure.retry_after or backoff(attempt)
                    if vital:
                        self.last_vital_failure = now
                        self.alive_until += wait
                    elif failure.status == 429:
                        started = now
                    elif now - max(started, self.last_vital_failure) > PATIENCE:
                        raise
                    await asyncio.sleep(wait)
        finally:
            self.note_end_of_trouble()

    def note_trouble(self, failure: Failure) -> None:
        """Log what is wrong, each cause once until nothing is."""
        self.troubled.add(asyncio.current_task())
        if str(failure) not in self.causes:
            self.causes.add(str(failure))
            log.warning("Trouble with %s: %s; trying again", self.client.homeserver, failure)

    def note_end_of_trouble(self) -> None:
        """Log that the last request in trouble is over it."""
        if asyncio.current_task() in self.troubled:
            self.troubled.remove(asyncio.current_task())
            if not self.troubled:
                self.causes.clear()
                log.info("No more trouble with %s", self.client.homeserver)

    async def connect(self) -> None:
        """Restore the session or log in; raise Exit if that is refused."""
        settings = self.settings
        stored = load_session(settings.state_directory)
        if stored and stored.belongs_to(settings.user, settings.homeserver):
            self.session = stored
        else:
            # The device ID is ours and saved first: a crash amid the login costs no other device.
            url = settings.homeserver or await self.discover()
            self.session = Session(url, settings.user, secrets.token_hex(5).upper(), "")
            self.is_other_account = stored is not None
            if stored:
                log.warning("Not using the state of %s at %s", stored.user_id, stored.homeserver)
            else:
                self.save_session()
        url = self.session.homeserver
        if not re.match(r"https:|http://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", url):
            log.warning("%s is not encrypted: anybody on the way can read the password", url)
        self.client = open_client(url, settings.user)
        if settings.access_token or not self.session.access_token:
            await self.log_in(self.session.access_token)
        session = self.session
        self.client.restore_login(session.user_id, session.device_id, session.access_token)
        log.info("Logged in as %s, device id: %s.", session.user_id, session.device_id)

    async def discover(self) -> str:
        """Return the base URL that the user's server name publishes (spec: "Well-known URI")."""
        server_name = self.settings.user.partition(":")[2]
        self.client = open_client("https://" + re.sub(r":\d+$", "", server_name))
        try:
            found = await self.request(self.client.discovery_info, ANSWERED, vital=True)
        except Failure as failure:
            if failure.status == 404:
                return f"https://{server_name}"
            problem = f"{self.client.homeserver}/.well-known/matrix/client is no use ({failure})"
            raise Exit(78, f"{problem}: set MATRIX_HOMESERVER") from None
        finally:
            await self.client.close()
        return str(found.homeserver_url)

    async def log_in(self, rejected: str) -> None:
        """Log in anew, on the same device, unless the `rejected` access token was replaced already.

        Raise Exit if that is refused.
        """
        async with self.login_lock:
            settings, session, client = self.settings, self.session, self.client
            if session.access_token != rejected:
                client.access_token = session.access_token
                return
            if rejected:
                log.warning("The access token is no longer valid: logging in again")
            if len(self.logins) == LOGINS:
                await asyncio.sleep(self.logins[0] + LOGIN_WINDOW - time.monotonic())
            self.logins.append(time.monotonic())
            client.access_token, client.device_id = settings.access_token, session.device_id
            login = partial(client.login, settings.password, "echobot")
            try:
                answer = await self.request(
                    client.whoami if settings.access_token else login, ANSWERED, vital=True
                )
            except Failure as failure:
                raise refusal(settings, client.homeserver, failure) from None
            token = settings.access_token or answer.access_token
            self.session = Session(
                session.homeserver, answer.user_id, answer.device_id or "", token
            )
            if not self.session.belongs_to(settings.user, ""):
                raise Exit(78, f"MATRIX_ACCESS_TOKEN is of {answer.user_id}: check MATRIX_USER")
            client.access_token = token
            self.save_session()

    def save_session(self) -> None:
        """Save the session, and drop the position if that was another account's."""
        directory, session = self.settings.state_directory, self.session
        if self.settings.access_token:
            session = replace(session, access_token="")
        try:
            if self.is_other_account:
                (directory / "next_batch").unlink(missing_ok=True)
            replace_file(directory / "session.json", json.dumps(asdict(session)))
        except OSError as error:
            log.error("Can't save session.json in %s: %s", directory, error.strerror)


def refusal(settings: Settings, homeserver: str, failure: Failure) -> Exit:
    """Return what to exit with after the login failed for good."""
    if failure.errcode and failure.status != 404:
        secret = "MATRIX_ACCESS_TOKEN" if settings.access_token else "MATRIX_PASSWORD"
        problem = f"{homeserver} refuses {settings.user} ({failure})"
        return Exit(77, f"{problem}: check MATRIX_USER and {secret}")
    problem = f"no Matrix homeserver answers at {homeserver} ({failure})"
    return Exit(78, f"{problem}: check MATRIX_HOMESERVER")


class Failure(Exception):
    """A request that brought no success; the text says why, and never quotes a message.

    `status`: HTTP status, 0 without an answer. `errcode`: the homeserver's, "" if it gave none.
    `retry_after`: how long it asks to wait in s, 0 if it does not.
    """

    def __init__(self, cause: str, status: int = 0, errcode: str = "", retry_after: float = 0):
        super().__init__(cause)
        self.status, self.errcode, self.retry_after = status, errcode, retry_after


async def respond(call: Call) -> Any:
    """Return the response to one request; raise Failure for all else that can come of it."""
    try:
        response = await call()
    except LocalProtocolError:
        # A soft logout made nio forget its access token.
        raise Failure("logged out", 401, "M_UNKNOWN_TOKEN") from None
    except asyncio.TimeoutError:
        raise Failure("no answer in time") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Failure(str(error) or type(error).__name__) from None
    except Exception as error:
        # Without its text, which may quote the answer.
        raise Failure(f"an answer that can't be read ({type(error).__name__})") from None
    if not isinstance(response, ErrorResponse):
        return response
    transport: Any = response.transport_response
    errcode = response.status_code or ""
    header = transport.headers.get("Retry-After", "")
    wait = float(header) if header.isdecimal() else (response.retry_after_ms or 0) / 1000
    cause = f"HTTP {transport.status} {errcode or 'without a Matrix answer'}"
    raise Failure(cause, transport.status, errcode, min(wait, MAX_RETRY_AFTER))


def backoff(attempt: int) -> float:
    """Return how long to wait in s after so many failures, counted from 0."""
    return min(MAX_BACKOFF, 0.25 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1)


class Client(AsyncClient):
    """nio's client, but one odd event does not cost the whole answer that it came with."""

    reported: frozenset[str] = frozenset()

    async def create_matrix_response(
        self, response_class: Any, transport_response: Any, data: Any = (), save_to: Any = None
    ) -> Any:
        """Parse an answer; if nio fails on it, parse what is left without its odd parts."""
        try:
            response = await super().create_matrix_response(
                response_class, transport_response, data, save_to
            )
            if not isinstance(response, ErrorResponse) or transport_response.status != 200:
                return response
            cause = "against the schema"
        except NO_ANSWER:
            raise
        except Exception as error:
            cause = type(error).__name__
        body = parsable(await self.parse_body(transport_response))
        response = response_class.from_dict(body, *(data or ()))
        response.transport_response = transport_response
        if not isinstance(response, ErrorResponse) and cause not in self.reported:
            self.reported |= {cause}
            log.error("nio can't parse an answer (%s): passing over the odd parts of it", cause)
        return response

    async def receive_response(self, response: Any) -> None:
        """Keep no picture of the rooms: it is not used here, takes memory and can fail."""
        if not isinstance(response, SyncResponse):
            await super().receive_response(response)


def parsable(answer: Any) -> Any:
    """Return the parts of a sync or messages answer that are used here and that nio can parse."""
    if isinstance(answer, dict):
        return {
            key: parsable(part)
            for key, part in answer.items()
            if isinstance(part, USED.get("!" if key.startswith("!") else key, ()))
        }
    return list(filter(can_parse, answer)) if isinstance(answer, list) else answer


def can_parse(event: Any) -> bool:
    """Tell whether nio can parse an event."""
    try:
        return bool(Event.parse_event(event))
    except Exception:
        return False


def open_client(homeserver: str, user: str = "") -> Client:
    """Return a client for a homeserver's base URL that leaves errors to us."""
    config = AsyncClientConfig(
        max_limit_exceeded=0, max_timeouts=0, request_timeout=REQUEST_TIMEOUT
    )
    client = Client(homeserver, user, config=config)
    url = urlsplit(homeserver)
    bypass = urllib.request.proxy_bypass(url.hostname or "")
    proxy = None if bypass else urllib.request.getproxies().get(url.scheme)
    # nio's own session ends at 100 connections: that many sends that hang would stop the poll.
    connector = aiohttp.TCPConnector(limit=0)
    client.client_session = aiohttp.ClientSession(connector=connector, proxy=proxy)
    return client


@dataclass(frozen=True)
class Session:
    """What session.json holds: where we are logged in, and as whom."""

    homeserver: str
    user_id: str
    device_id: str
    access_token: str = ""

    def belongs_to(self, user: str, homeserver: str) -> bool:
        """Tell whether it is of this user ID or localpart, and of this homeserver if not ""."""
        mine, other = (
            user_id.lower().lstrip("@").partition(":") for user_id in (self.user_id, user)
        )
        is_user = mine == other or (mine[0] == other[0] and "" in (mine[2], other[2]))
        return is_user and homeserver in ("", self.homeserver)


def load_session(directory: Path) -> Session | None:
    """Return the session that was saved in a state directory, None if there is none."""
    try:
        fields = json.loads((directory / "session.json").read_bytes())
        if all(isinstance(value, str) for value in fields.values()):
            return Session(**fields)
        raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError):
        log.error("session.json in %s can't be read: logging in anew", directory)
        return None


def load_next_batch(directory: Path) -> str | None:
    """Return the sync token that was saved in a state directory, None if there is none."""
    try:
        next_batch = (directory / "next_batch").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Exit(78, f"can't read next_batch in {directory} ({error.strerror})") from None
    if not next_batch:
        log.error("next_batch in %s is empty: starting from now instead", directory)
    return next_batch or None


async def save_in_order(batches: Batches, directory: Path) -> None:
    """Save each sync answer's next_batch, once all before it and all its tasks are done."""
    saved, failing = None, False
    while True:
        next_batch, tasks = await batches.get()
        await asyncio.gather(*tasks)
        try:
            if next_batch != saved:
                await asyncio.to_thread(replace_file, directory / "next_batch", next_batch)
                saved, failing = next_batch, False
        except OSError as error:
            if not failing:
                log.error("Can't save next_batch: %s; answering goes on", error.strerror)
            failing = True
        batches.task_done()


def replace_file(path: Path, text: str) -> None:
    """Replace a file so that after a crash it holds either the old text or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a state directory for this process alone; raise Exit if that is not possible."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        os.close(os.open(directory / "next_batch.tmp", os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        problem = f"can't write to the state directory {directory} ({error.strerror})"
        raise Exit(78, f"{problem}: set STATE_DIRECTORY to one that is writable") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        problem = f"another copy is running on the state directory {directory}"
        raise Exit(75, f"{problem}: stop it, or set another STATE_DIRECTORY") from None
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Settings:
    """The environment variables of the module's docstring."""

    user: str
    password: str
    access_token: str
    homeserver: str
    inviters: list[str]
    state_directory: Path
    log_level: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the settings; raise Exit with all that is missing or malformed."""

        def get(name: str, default: str = "") -> str:
            return environment.get(name) or default

        settings = cls(
            user=get("MATRIX_USER"),
            password=get("MATRIX_PASSWORD"),
            access_token=get("MATRIX_ACCESS_TOKEN"),
            homeserver=get("MATRIX_HOMESERVER").rstrip("/"),
            inviters=get("MATRIX_INVITERS", "*").split(),
            state_directory=Path(get("STATE_DIRECTORY", ".")),
            log_level=get("LOG_LEVEL", "INFO").upper(),
        )
        if problems := list(settings.problems()):
            raise Exit(78, "; ".join(problems))
        return settings

    def problems(self) -> Iterator[str]:
        """Say what is missing or malformed, and what to do."""
        if not self.user:
            yield "MATRIX_USER is missing: set it to a user ID like @bot:example.org"
        elif not re.fullmatch(r"@[^\s:]+:[^\s/@]+|[^\s:@]+", self.user):
            yield "MATRIX_USER is malformed: set it to a user ID like @bot:example.org"
        elif ":" not in self.user and not self.homeserver:
            yield "MATRIX_HOMESERVER is missing: set it, or MATRIX_USER to a full user ID"
        if not self.password and not self.access_token:
            yield "MATRIX_PASSWORD is missing: set it or MATRIX_ACCESS_TOKEN"
        if not re.fullmatch(r"[!-~]*", self.access_token):
            yield "MATRIX_ACCESS_TOKEN is malformed: it has spaces or other odd characters"
        if not re.fullmatch(r"(https?://[^\s/?#@]+(/[^\s?#]*)?)?", self.homeserver):
            yield "MATRIX_HOMESERVER is malformed: set it to a URL like https://matrix.example.org"
        if not all(re.match(r"[@*?\[]", pattern) for pattern in self.inviters):
            yield "MATRIX_INVITERS is malformed: set it to user ID patterns like @*:example.org"
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            yield "LOG_LEVEL is malformed: set it to DEBUG, INFO, WARNING or ERROR"


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
    log.setLevel(level)


def notify(state: str) -> None:
    """Tell systemd the state of the service, if it asked for it (see sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        name = "\0" + address[1:] if address.startswith("@") else address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_UNIX, kind) as systemd, contextlib.suppress(OSError):
            systemd.sendto(state.encode(), name)


async def feed_watchdog(homeserver: Homeserver) -> None:
    """Tell systemd's watchdog that the bot is alive, for as long as its polls go on."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    while interval:
        if time.monotonic() < homeserver.alive_until:
            notify("WATCHDOG=1")
        await asyncio.sleep(interval)


if __name__ == "__main__":
    sys.exit(main())
