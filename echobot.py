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
from collections import defaultdict, deque
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from nio import (
    AsyncClient,
    AsyncClientConfig,
    ErrorResponse,
    MessageDirection,
    RoomMessagesResponse,
    RoomMessageText,
    RoomSendResponse,
    SyncResponse,
)

COMMAND = "!replybot"
ENCRYPTED = "This room is encrypted, and I can't read encrypted messages."

SYNC_TIMEOUT = 30_000  # ms that the homeserver holds a poll when there is nothing new
REQUEST_TIMEOUT = 60  # s that any other request may take
PATIENCE = 600  # s that a request may fail in a room while syncs succeed, or reply_to may take
MAX_BACKOFF = 60  # s between two attempts, unless the homeserver asks for more
MAX_RETRY_AFTER = 3600  # s
MAX_UNFINISHED = 10_000  # sync responses whose next_batch is not saved before polling pauses
MAX_CONNECTIONS = 500  # fewer than the files that a process may open
SHUTDOWN_GRACE = 5  # s for the sends in flight
ALIVE = 300  # s for a poll, more than nio's deadlines, until systemd's watchdog ends the bot
LOGINS = 4  # in LOGIN_WINDOW s: Synapse allows five, then one in 333 s
LOGIN_WINDOW = 1400  # s
DEVICE_ID = "ECHOBOT"  # always the same: transaction IDs are remembered for the device
MESSAGES = {"types": ["m.room.message", "m.room.encrypted"], "limit": 100}

JSON = dict[str, Any]
Tasks = list["asyncio.Task[None]"]
Batches = asyncio.Queue[tuple[str, Tasks]]  # (next_batch, what must be done before it is saved)

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
        print(__doc__.strip())
        return 0
    try:
        if sys.argv[1:]:
            raise Exit(2, "takes no arguments but --help; settings are environment variables")
        settings = read_settings(os.environ)
        set_up_logging(settings.log_level)
        lock(settings.state_directory)
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
    homeserver = Homeserver(settings)
    batches: Batches = asyncio.Queue(MAX_UNFINISHED)
    polling = asyncio.create_task(poll(homeserver, batches))
    saving = asyncio.create_task(save_in_order(batches, settings.state_directory))
    watchdog = asyncio.create_task(feed_watchdog(homeserver))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, polling.cancel)
    try:
        ended, _ = await asyncio.wait({polling, saving}, return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        for task in ended:
            if task is not polling or not task.cancelled():
                task.result()  # Neither returns: this raises what ended it.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(batches.join(), SHUTDOWN_GRACE)
    finally:
        watchdog.cancel()
        await homeserver.client.close()


async def poll(homeserver: Homeserver, batches: Batches) -> None:
    """Sync for ever: start to answer each response, and poll on without waiting for that."""
    await homeserver.connect()
    since = await starting_position(
        homeserver, batches, load_next_batch(homeserver.settings.state_directory)
    )
    while True:
        try:
            response = await homeserver.sync(since)
        except Failure as failure:
            log.error("The homeserver refuses next_batch (%s): starting from now instead", failure)
            since = await starting_position(homeserver, batches, None)
            await asyncio.sleep(backoff(4))
            continue
        tasks = start_answering(homeserver, response, since)
        since = response["next_batch"]
        await batches.put((since, tasks))
        if tasks:
            # Quick replies first: the next poll would slow them down, here and at the homeserver.
            await asyncio.wait(tasks, timeout=0.05)
            # A single reply is seen 2 ms sooner if the homeserver can first deliver it.
            await asyncio.sleep(0.002 if len(tasks) == 1 else 0)


async def save_in_order(batches: Batches, directory: str) -> None:
    """Save the next_batch of each sync response once its tasks, and all before it, are done."""
    saved, failing = None, False
    while True:
        next_batch, tasks = await batches.get()
        await asyncio.gather(*tasks)
        try:
            if next_batch != saved:
                await asyncio.to_thread(replace_file, Path(directory, "next_batch"), next_batch)
                saved, failing = next_batch, False
        except OSError as error:
            if not failing:
                log.error("Can't save next_batch: %s; answering goes on", error.strerror)
            failing = True
        batches.task_done()


async def starting_position(homeserver: Homeserver, batches: Batches, since: str | None) -> str:
    """Return `since`, or without one the position of now; take up pending invitations."""
    if since is None:
        since = str((await homeserver.sync(None))["next_batch"])
        # Saved at once, not after the joins: a kill amid them must not make this a first start.
        await batches.put((since, []))
    await batches.put((since, [asyncio.create_task(accept_pending(homeserver, since))]))
    return since


async def accept_pending(homeserver: Homeserver, since: str) -> None:
    """Accept the invitations before `since`, of which only a sync without it tells again."""
    try:
        # With the patience of a room: polling does not wait for it.
        overview = await Room(homeserver, "all").request(homeserver.sync_once, None)
    except Failure as failure:
        # What is saved must not wait for it longer; the next start asks again.
        log.warning("Passed over invitations that may be pending: %s", failure)
    else:
        invited = part(overview, dict, "rooms", "invite").items()
        await asyncio.gather(
            *(homeserver.room(room_id).accept_invitation(room, since) for room_id, room in invited)
        )


def start_answering(homeserver: Homeserver, response: JSON, since: str) -> Tasks:
    """Start to answer a sync response, which follows `since`: one task for each room."""
    next_batch = response["next_batch"]
    work = [
        homeserver.room(room_id).answer_timeline(part(room, dict, "timeline"), since, next_batch)
        for room_id, room in part(response, dict, "rooms", "join").items()
    ] + [
        homeserver.room(room_id).accept_invitation(room, since)
        for room_id, room in part(response, dict, "rooms", "invite").items()
    ]
    return [asyncio.create_task(task) for task in work]


@dataclass(eq=False)
class Room:
    """A room, and what is remembered of it until the process ends."""

    homeserver: Homeserver
    room_id: str
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a part is answered
    just_joined: bool = False  # the next timeline may reach back before the invitation
    told_encrypted: bool = False
    failing_since: float = 0.0  # monotonic s, 0 after a success or a refusal
    # Event IDs: the timeline after a join repeats what was read at the join.
    answered: deque[str] = field(default_factory=partial(deque, maxlen=100))

    async def answer_timeline(self, timeline: JSON, since: str, next_batch: str) -> None:
        """Answer the room's part of a sync response, once its earlier parts are answered."""
        async with self.turn:
            has_gap = part(timeline, bool, "limited") or self.just_joined
            self.just_joined = False
            if has_gap and await self.answer_gap(since, next_batch):
                return
            for event in part(timeline, list, "events"):
                await self.answer(event)

    async def answer_gap(self, since: str, next_batch: str | None) -> bool:
        """Answer what was sent between two positions, page by page; tell if all was read.

        Without `next_batch`, read up to now. Spec: GET /rooms/{roomId}/messages.
        """
        read, forward = self.homeserver.client.room_messages, MessageDirection.front
        position = since
        while position:
            try:
                page = await self.request(
                    read, self.room_id, position, next_batch, forward, 100, MESSAGES
                )
            except Failure as failure:
                log.warning("Passed over a gap in %s: %s", self.room_id, failure)
                return False
            for event in part(page, list, "chunk"):
                await self.answer(event)
            end = part(page, str, "end")
            position = end if end != position else ""
        return True

    async def accept_invitation(self, invited_room: JSON, since: str) -> None:
        """Join the room and answer what was sent since the invitation, or reject that."""
        client, inviter = self.homeserver.client, "nobody"
        for event in part(invited_room, list, "invite_state", "events"):
            # The last one counts: only that is our own homeserver's, not what the inviter's says.
            match event:
                case {"type": "m.room.member", "state_key": client.user_id, "sender": str(sender)}:
                    inviter = sender
        patterns = self.homeserver.settings.matrix_inviters.split()
        try:
            async with self.turn:
                if not any(fnmatch.fnmatchcase(inviter, pattern) for pattern in patterns):
                    await self.request(client.room_leave, self.room_id)
                    log.info("Rejected the invitation of %s to %s", inviter, self.room_id)
                    return
                await self.request(client.join, self.room_id)
                log.info("Joined %s, invited by %s", self.room_id, inviter)
                self.just_joined = True
                # Up to now: the polls since the invitation have told nothing of this room.
                await self.answer_gap(since, None)
        except Failure as failure:
            log.warning("Passed over the invitation to %s: %s", self.room_id, failure)

    async def answer(self, event: Any) -> None:
        """Answer an event if it calls for it, and return once the reply is acknowledged."""
        match event:
            case (
                {"sender": self.homeserver.client.user_id}
                | {"unsigned": {"redacted_because": _}}
                # The membership that the bot had when it was sent: this is history.
                | {"unsigned": {"membership": "leave" | "ban" | "knock"}}
                | {"content": {"m.relates_to": {"rel_type": "m.replace"}}}
            ):
                return
            case {"type": "m.room.encrypted"} if not self.told_encrypted:
                self.told_encrypted = True
                log.warning("%s is encrypted: its messages can't be read", self.room_id)
                content = {"msgtype": "m.notice", "body": ENCRYPTED, "m.mentions": {}}
                await self.send(content, f"encrypted{self.room_id}")
            case {
                "type": "m.room.message",
                "event_id": str(event_id),
                "sender": str(),
                "origin_server_ts": int(),
                "content": {"msgtype": "m.text", "body": str(body)} as content,
            } if event_id not in self.answered:
                formatted_body, style = content.get("formatted_body"), content.get("format")
                await self.reply(RoomMessageText(event, body, formatted_body, style))
                self.answered.append(event_id)
            case {"type": str(), "event_id": str(), "sender": str(), "origin_server_ts": int()}:
                return
            case _:
                log.error("Passed over a malformed event in %s", self.room_id)

    async def reply(self, event: RoomMessageText) -> None:
        """Send what reply_to returns for a message; a bug in it costs that reply."""
        started = time.monotonic()
        # In a task of its own: its cancellation, by itself or after too long, is not ours.
        calling = asyncio.create_task(result_of_reply_to(event))
        done, _ = await asyncio.wait({calling}, timeout=PATIENCE)
        calling.cancel()
        result = calling.result() if done else TimeoutError()
        if result is None:
            return
        if not isinstance(result, str):
            # Not its text, which may quote the message.
            frames = traceback.extract_tb(getattr(result, "__traceback__", None))
            lines = [frame.lineno for frame in frames if frame.filename == __file__]
            what = f"{type(result).__name__} at lines {lines}"
            log.error("reply_to failed for %s in %s: %s", event.event_id, self.room_id, what)
        elif await self.send(text_content(result, event), event.event_id):
            elapsed = (time.monotonic() - started) * 1000
            log.info("Answered %s in %s after %.0f ms", event.event_id, self.room_id, elapsed)
            self.homeserver.answered += 1
            self.homeserver.tell_status()

    async def send(self, content: JSON, tx_id: str) -> bool:
        """Send a message, once however often it is tried with a transaction ID; tell if it went."""
        room_send = self.homeserver.client.room_send
        try:
            await self.request(room_send, self.room_id, "m.room.message", content, tx_id)
        except Failure as failure:
            log.warning("Passed over %s in %s: %s", tx_id, self.room_id, failure)
            return False
        return True

    async def request(self, method: Any, *arguments: Any) -> Any:
        """Return the response of one of the client's methods; repeat it while that may help.

        Raise Failure for what the homeserver refuses, and for what fails for PATIENCE s while the
        requests for which all wait do not.
        """
        homeserver, attempt = self.homeserver, 0
        queue = homeserver.queues[method.__name__]
        while True:
            try:
                response = await in_turn(queue, method, *arguments)
                break
            except Failure as failure:
                attempt += 1
                # Not 401: any server can have the join of its room answered with that.
                if failure.errcode and 400 <= failure.status < 500 and failure.status != 401:
                    homeserver.note_recovery(self)
                    raise
                homeserver.note_trouble(self, failure, "trying again")
                failed_for = time.monotonic() - max(self.failing_since, homeserver.sound_since)
                # Once a room was given up, its next requests still get nine attempts, some 40 s.
                if attempt > 8 and failed_for > PATIENCE and None not in homeserver.troubled:
                    homeserver.troubled.discard(self)
                    raise
                await asyncio.sleep(failure.wait(attempt))
        homeserver.note_recovery(self)
        return response


async def result_of_reply_to(event: RoomMessageText) -> Any:
    """Return what reply_to returns or raises; even SystemExit, as of argparse, ends no bot."""
    try:
        return await reply_to(event)
    except BaseException as error:
        return error


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


# HTTP statuses that end a login; with a 200 among them, what answers is no homeserver.
FINAL_AT_LOGIN = frozenset(range(200, 500)) - {429}


class Homeserver:
    """The bot's account on its homeserver: login, requests, and one rule for all their errors."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.room = cache(partial(Room, self))  # by room ID
        self.session = load_session(settings.state_directory)
        self.client = Client("")
        # Synapse repeats a response for two minutes if it is asked with the same parameters, even
        # what the position of now is: so each process asks with others.
        self.hold = SYNC_TIMEOUT - random.randrange(1000)
        self.answered = 0
        self.last_sync = ""
        self.logins: deque[float] = deque(maxlen=LOGINS)
        self.queues: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.sound_since = self.alive_until = 0.0  # monotonic s
        self.troubled: set[Room | None] = set()
        self.causes: set[str] = set()

    async def connect(self) -> None:
        """Go on with the saved session or log in; raise Exit if that is refused."""
        settings, session = self.settings, self.session
        if session and session.belongs_to(settings):
            self.client = open_client(session.homeserver, settings.matrix_user)
            self.client.restore_login(*session[1:])
        else:
            url = settings.matrix_homeserver or await self.discover()
            self.client = open_client(url, settings.matrix_user)
        url = self.client.homeserver
        if not re.match(r"https:|http://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", url):
            log.warning("%s is not encrypted: others can read along", url)
        if settings.matrix_access_token or not self.client.access_token:
            await self.log_in()
        log.info("Logged in as %s, device id: %s.", self.client.user_id, self.client.device_id)

    async def discover(self) -> str:
        """Return the base URL that the user's server name publishes (spec: "Well-known URI")."""
        server_name = self.settings.matrix_user.partition(":")[2]
        self.client = open_client("https://" + re.sub(r":\d+$", "", server_name))
        try:
            found = await self.request(self.client.discovery_info, final=FINAL_AT_LOGIN)
            if is_base_url(found.homeserver_url):
                return str(found.homeserver_url)
            problem = "its base_url is malformed"
        except Failure as failure:
            if failure.status == 404:
                return f"https://{server_name}"
            problem = str(failure)
        finally:
            await self.client.close()
        url = f"{self.client.homeserver}/.well-known/matrix/client"
        raise Exit(78, f"{url} names no homeserver ({problem}): set MATRIX_HOMESERVER")

    async def log_in(self) -> None:
        """Log in, on the same device as before; raise Exit if that is refused."""
        client, token = self.client, self.settings.matrix_access_token
        user, password = self.settings.matrix_user, self.settings.matrix_password
        if len(self.logins) == LOGINS:
            wait = self.logins[0] + LOGIN_WINDOW - time.monotonic()
            self.alive_until = time.monotonic() + wait + ALIVE
            await asyncio.sleep(wait)
        self.logins.append(time.monotonic())
        # Some homeservers refuse any request with an access token that they do not know.
        client.access_token = token
        login = (client.whoami,) if token else (client.login, password, "echobot")
        try:
            found = await self.request(*login, final=FINAL_AT_LOGIN)
        except Failure as failure:
            if failure.errcode and failure.status != 404:
                problem = f"{client.homeserver} refuses {user} ({failure})"
                secret = "MATRIX_ACCESS_TOKEN" if token else "MATRIX_PASSWORD"
                raise Exit(77, f"{problem}: check MATRIX_USER and {secret}") from None
            problem = f"no Matrix homeserver answers at {client.homeserver} ({failure})"
            raise Exit(78, f"{problem}: check MATRIX_HOMESERVER") from None
        if not same_user(found.user_id, user):
            raise Exit(78, f"MATRIX_ACCESS_TOKEN is of {found.user_id}: check MATRIX_USER")
        client.restore_login(found.user_id, found.device_id or "", token or found.access_token)
        self.save_session()

    def save_session(self) -> None:
        """Save where and as whom we are logged in, but not an access token that we were given."""
        client, directory, before = self.client, self.settings.state_directory, self.session
        token = "" if self.settings.matrix_access_token else client.access_token
        self.session = Session(client.homeserver, client.user_id, client.device_id or "", token)
        try:
            if before and not before.belongs_to(self.settings):
                log.warning("Not using the state of %s at %s", before.user_id, before.homeserver)
                Path(directory, "next_batch").unlink(missing_ok=True)
            replace_file(Path(directory, "session.json"), json.dumps(self.session._asdict()))
        except OSError as error:
            log.error("Can't save session.json in %s: %s", directory, error.strerror)

    async def sync(self, since: str | None) -> JSON:
        """Return the next sync response; raise Failure if the homeserver refuses `since`."""
        final = {400} if since else ()
        response: JSON = await self.request(self.sync_once, since, final=final)
        if not self.last_sync:
            notify("READY=1")
        self.last_sync = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self.tell_status()
        return response

    async def sync_once(self, since: str | None) -> Any:
        """Sync: for messages of others and invitations since then, or all pending invitations."""
        nothing: JSON = {"types": []}
        room = dict.fromkeys(("timeline", "state", "ephemeral", "account_data"), nothing)
        if since:
            room["timeline"] = {**MESSAGES, "not_senders": [self.client.user_id]}
        only = {"room": room, "presence": nothing, "account_data": nothing}
        # Without `since` the homeserver does not wait for news, but may take minutes to answer.
        return await self.client.sync(self.hold if since else 8 * self.hold, only, since)

    def tell_status(self) -> None:
        """Tell systemd how many commands were answered, and when the last sync was."""
        notify(f"STATUS=Answered {self.answered}, last sync at {self.last_sync}")

    async def request(self, method: Any, *arguments: Any, final: Container[int]) -> Any:
        """Return the response of a request for which all wait: repeat it until it succeeds.

        Raise Failure for what the homeserver itself refuses with an HTTP status in `final`.
        """
        attempt = strange = 0
        while True:
            self.alive_until = time.monotonic() + ALIVE
            try:
                response = await outcome(method, *arguments)
                break
            except Failure as failure:
                attempt += 1
                # Without an errcode it may come from a proxy whose homeserver is restarting.
                strange = strange + 1 if failure.status in final else 0
                no_matrix = not self.client.user_id and (failure.status == 404 or strange >= 5)
                if failure.status in final and (failure.errcode or no_matrix):
                    self.note_recovery(None)
                    raise
                if failure.status == 401 and failure.errcode:
                    self.note_trouble(None, failure, "logging in again")
                    await self.log_in()
                else:
                    self.note_trouble(None, failure, "trying again")
                    wait = failure.wait(attempt)
                    self.alive_until += wait
                    await asyncio.sleep(wait)
        self.note_recovery(None)
        return response

    def note_trouble(self, room: Room | None, failure: Failure, remedy: str) -> None:
        """Log what is wrong, each cause once until nothing is."""
        if room:
            room.failing_since = room.failing_since or time.monotonic()
        if not self.troubled:
            self.causes.clear()
        self.troubled.add(room)
        if str(failure) not in self.causes:
            self.causes.add(str(failure))
            log.warning("Trouble with %s: %s; %s", self.client.homeserver, failure, remedy)

    def note_recovery(self, room: Room | None) -> None:
        """Log when nothing is wrong any more."""
        if room:
            room.failing_since = 0.0
        if room in self.troubled:
            self.troubled.remove(room)
            if not room:
                self.sound_since = time.monotonic()
            if not self.troubled:
                log.info("No more trouble with %s", self.client.homeserver)


class Failure(Exception):
    """A request that brought no success; the text says why, and never quotes a message.

    `status`: HTTP status, 0 without an answer. `errcode`: the homeserver's, "" if it gave none.
    `retry_after`: how long it asks to wait in s, 0 if it does not.
    """

    def __init__(self, cause: str, status: int = 0, errcode: str = "", retry_after: float = 0):
        super().__init__(cause)
        self.status, self.errcode, self.retry_after = status, errcode, retry_after

    def wait(self, attempt: int) -> float:
        """Return how long to wait in s after this failure of the attempt, counted from 1."""
        return max(self.retry_after, backoff(0 if self.retry_after else attempt - 1))


async def outcome(method: Any, *arguments: Any) -> Any:
    """Return the response of one of the client's methods; raise Failure for all else."""
    try:
        return await method(*arguments)
    except Failure:
        raise
    except asyncio.TimeoutError:
        raise Failure("no answer in time") from None
    except (aiohttp.ClientConnectionError, OSError) as error:
        raise Failure(str(error) or type(error).__name__) from None
    except Exception as error:
        # Without its text, which may quote the answer, or a proxy's password.
        raise Failure(f"{type(error).__name__} {getattr(error, 'status', '')}".strip()) from None


async def in_turn(queue: asyncio.Lock, method: Any, *arguments: Any) -> Any:
    """Return an outcome; wait out rate limits, one request of a queue after the other.

    So rooms go on in the order in which they met the limit: none of them starves.
    """
    attempt = 0
    async with contextlib.AsyncExitStack() as turn:
        while True:
            try:
                return await outcome(method, *arguments)
            except Failure as failure:
                if failure.status != 429:
                    raise
                attempt += 1
                until = time.monotonic() + failure.wait(attempt)
            if attempt == 1:
                await turn.enter_async_context(queue)
            await asyncio.sleep(until - time.monotonic())


def backoff(attempt: int) -> float:
    """Return how long to wait in s after so many failures, counted from 0."""
    return min(MAX_BACKOFF, 0.25 * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1)


# The responses that are left as the JSON they are, and what they have if they are a success.
KEYS = {SyncResponse: "next_batch", RoomMessagesResponse: "start", RoomSendResponse: "event_id"}


class Client(AsyncClient):
    """nio's client, but it raises what is no success, and leaves most responses as they are.

    nio's own parser fails on a whole response for one odd event, and takes most of the time.
    """

    async def create_matrix_response(
        self, response_class: Any, transport_response: Any, data: Any = None, save_to: Any = None
    ) -> Any:
        """Return the response that an HTTP response carries."""
        body = await self.parse_body(transport_response)
        if transport_response.status == 200:
            key = KEYS.get(response_class)
            response = body if key else response_class.from_dict(body, *data or ())
            if not isinstance(response, ErrorResponse) and (not key or part(body, str, key)):
                return response
        errcode = part(body, str, "errcode")
        seconds = transport_response.headers.get("Retry-After", "")
        wait = float(seconds) if seconds.isdecimal() else part(body, int, "retry_after_ms") / 1000
        cause = f"HTTP {transport_response.status} {errcode or 'without a Matrix response'}"
        raise Failure(cause, transport_response.status, errcode, min(wait, MAX_RETRY_AFTER))

    async def receive_response(self, response: Any) -> None:
        """Change nothing: nio's picture of the rooms is not used, and logging in is ours."""


def part(whole: Any, kind: type, *path: str) -> Any:
    """Return a part of untrusted JSON, empty if it is missing or of another kind."""
    for name in path:
        whole = whole.get(name) if isinstance(whole, dict) else None
    return whole if isinstance(whole, kind) else kind()


def open_client(homeserver: str, user: str = "") -> Client:
    """Return a client for a homeserver's base URL that leaves errors to us."""
    config = AsyncClientConfig(max_timeouts=0, request_timeout=REQUEST_TIMEOUT)
    client = Client(homeserver.rstrip("/"), user, DEVICE_ID, config=config)
    url = urlsplit(homeserver)
    is_direct = urllib.request.proxy_bypass(url.hostname or "")
    proxy = None if is_direct else urllib.request.getproxies().get(url.scheme)
    if proxy:
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if not is_base_url(re.sub("//.*@", "//", proxy)):
            name = f"{url.scheme.upper()}_PROXY"
            raise Exit(78, f"{name} is malformed: set it to a URL like http://host:3128")
    # nio's own session ends at 100 connections: so many sends that hang would stop the poll.
    connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS)
    client.client_session = aiohttp.ClientSession(connector=connector, proxy=proxy)
    return client


class Session(NamedTuple):
    """What session.json holds: where we are logged in, and as whom."""

    homeserver: str
    user_id: str
    device_id: str
    access_token: str

    def belongs_to(self, settings: Settings) -> bool:
        """Tell whether it is of the user and, if one is given, the homeserver of the settings."""
        is_user = same_user(self.user_id, settings.matrix_user)
        return is_user and settings.matrix_homeserver.rstrip("/") in ("", self.homeserver)


def same_user(user_id: str, user: str) -> bool:
    """Tell whether a user ID is that of a user ID or localpart."""
    user_id, user = user_id.lower(), user.lower()
    return user == user_id or f"@{user}" == user_id.partition(":")[0]


def load_session(directory: str) -> Session | None:
    """Return the session that was saved in a state directory, None if there is none."""
    try:
        fields = json.loads(Path(directory, "session.json").read_bytes())
        return Session(**{name: str(value) for name, value in fields.items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError):
        log.error("session.json in %s can't be read: logging in anew", directory)
        return None


def load_next_batch(directory: str) -> str | None:
    """Return the sync token that was saved in a state directory, None if there is none."""
    try:
        next_batch = Path(directory, "next_batch").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Exit(78, f"can't read next_batch in {directory} ({error.strerror})") from None
    if not re.fullmatch(r"[!-~]{1,4096}", next_batch):
        log.error("next_batch in %s is no sync token: starting from now instead", directory)
        return None
    return next_batch


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


def lock(directory: str) -> None:
    """Keep a state directory for this process until it ends; raise Exit if that is not possible."""
    try:
        fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(directory, "next_batch.tmp").touch(0o600)
    except BlockingIOError:
        problem = f"another copy is running on the state directory {directory}"
        raise Exit(75, f"{problem}: stop it, or set another STATE_DIRECTORY") from None
    except OSError as error:
        problem = f"can't use the state directory {directory} ({error.strerror})"
        raise Exit(78, f"{problem}: set STATE_DIRECTORY to one that is writable") from None


@dataclass(frozen=True)
class Settings:
    """The environment variables of the module's docstring."""

    matrix_user: str = ""
    matrix_password: str = ""
    matrix_access_token: str = ""
    matrix_homeserver: str = ""
    matrix_inviters: str = "*"
    state_directory: str = "."
    log_level: str = "INFO"

    def problems(self) -> Iterator[str]:
        """Yield what to do about each variable that is missing or malformed."""
        user, url, token = self.matrix_user, self.matrix_homeserver, self.matrix_access_token
        if not re.fullmatch(r"@[^\s:]+:[^\s/@]+|[^\s:@]+", user):
            yield "MATRIX_USER is missing or malformed: set it to a user ID like @bot:example.org"
        if not self.matrix_password and not token:
            yield "MATRIX_PASSWORD is missing: set it, or MATRIX_ACCESS_TOKEN"
        if not re.fullmatch(r"[!-~]*", token):
            yield "MATRIX_ACCESS_TOKEN is malformed: set it to an access token, without spaces"
        if not url and user and ":" not in user:
            yield "MATRIX_HOMESERVER is missing: set it, or MATRIX_USER to a full user ID"
        if url and not is_base_url(url):
            yield "MATRIX_HOMESERVER is malformed: set it to a URL like https://example.org"
        if not re.fullmatch(r"\s*([@*?[]\S*(\s+|$))+", self.matrix_inviters):
            yield "MATRIX_INVITERS is malformed: set it to user ID patterns like @*:example.org"
        if self.log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            yield "LOG_LEVEL is malformed: set it to DEBUG, INFO, WARNING or ERROR"
        if not Path(self.state_directory).is_dir():
            yield f"STATE_DIRECTORY {self.state_directory} is no directory: set it to one"


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Return the settings; raise Exit with all that is missing or malformed."""
    given = [name for name in Settings.__annotations__ if environment.get(name.upper())]
    settings = Settings(**{name: environment[name.upper()] for name in given})
    if problems := list(settings.problems()):
        raise Exit(78, "; ".join(problems))
    return settings


def is_base_url(text: str) -> bool:
    """Tell whether a text is an http or https URL with a host and a port that can be."""
    try:
        url = urlsplit(text)
        host = (url.hostname or "").encode("idna")
        is_clean = not re.search(r"[\s?#@]", text)
        return is_clean and url.scheme in ("http", "https") and bool(host) and url.port != 0
    except ValueError:
        return False


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
    log.setLevel(level.upper())


def notify(state: str) -> None:
    """Tell systemd the state of the service, if it asked for it (see sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
        ):
            systemd.sendto(state.encode(), re.sub("^@", "\0", address))


async def feed_watchdog(homeserver: Homeserver) -> None:
    """Tell systemd's watchdog that the bot is alive, for as long as its polls go on."""
    interval = int(os.environ.get("WATCHDOG_USEC") or 0) / 2e6
    while interval:
        if time.monotonic() < homeserver.alive_until:
            notify("WATCHDOG=1")
        await asyncio.sleep(interval)


if __name__ == "__main__":
    sys.exit(main())
