#!/usr/bin/env python3
"""A Matrix bot that answers every command once: none is lost, none is answered twice.

    MATRIX_USER=@bot:example.org MATRIX_PASSWORD=... python echobot.py

It answers each message that starts with !replybot with the rest of it. For a bot of your own,
rewrite one function: `reply_to`. Four rules keep the promise, whatever breaks on the way:

1. Reply, then save. The next_batch of a sync response is saved once every reply to it, and to all
   before it, was acknowledged. So a stop needs no care: the next start does what was not done.
2. Repeat safely. The transaction ID of a reply is made from the event ID, and the device ID stays
   the same: the homeserver drops a reply that it has already.
3. Read what was left out. If a timeline is limited, the messages since the last sync are read page
   by page, and then the timeline. What precedes the bot's own invitation is history.
4. Persist. Every request is repeated by one loop, `Client.persist`, until it succeeds, is refused
   for good, or fails for long in a room while syncs succeed. A bug is shown, and costs one event.

Environment (an empty variable counts as missing):
    MATRIX_USER          the full user ID; and MATRIX_PASSWORD, or MATRIX_ACCESS_TOKEN instead
    MATRIX_HOMESERVER    base URL; default: found from the user ID at every start
    MATRIX_INVITERS      whose invitations are accepted: @me:example.org @*:example.com; default: *
    STATE_DIRECTORY      where next_batch and session.json are kept; default: working directory
    LOG_LEVEL            DEBUG, INFO, WARNING or ERROR; default: INFO
    HTTPS_PROXY, HTTP_PROXY, NO_PROXY and systemd's NOTIFY_SOCKET are honoured.
Exit status: 0 stopped, 1 bug, 2 usage, 75 another copy runs, 77 credentials refused, 78 settings.
"""

import asyncio
import fcntl
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
from collections.abc import Callable
from contextlib import nullcontext, suppress
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import aiohttp
from nio import AsyncClient, MessageDirection, RoomMessageText

COMMAND = "!replybot"
ENCRYPTED = "I can't read encrypted messages: invite me to a new room with encryption turned off."
DEVICE_ID = "ECHOBOT"  # always the same: transaction IDs are remembered for the device
SYNC_TIMEOUT = 30_000  # ms that the homeserver holds a poll when there is nothing new
INTERVAL = 0.5  # s between two polls that bring nothing, and that a poll may wait for replies
MAX_WAIT = 60  # s without a sign of an answer, and between two attempts; twice that if told so
REFUSAL_PATIENCE = 60  # s that a room may be refused: some servers do so just after an invitation
PATIENCE = 600  # s that it may fail otherwise while syncs succeed
LONG_PATIENCE = 43_200  # s that it may be limited or blocked; transaction IDs last about 24 h
REPLY_TIMEOUT = 600  # s that reply_to may take
MAX_EMPTY_PAGES = 600  # of messages, in a row, which take about a second each
BLOCKED = ["M_USER_LOCKED", "M_USER_SUSPENDED", "M_RESOURCE_LIMIT_EXCEEDED", "M_CONSENT_NOT_GIVEN"]
JSON = dict[str, Any]
NOTHING: JSON = {"types": []}
MESSAGES: JSON = {"types": ["m.room.message", "m.room.encrypted", "m.room.member"], "limit": 100}
# What a success has, by the names of nio's responses.
REQUIRED = {"Join": "room_id", "Login": "access_token", "Whoami": "user_id"}
REQUIRED |= {"RoomMessages": "chunk", "RoomSend": "event_id", "Sync": "next_batch"}
log = logging.getLogger("echobot")


async def reply_to(event: RoomMessageText) -> str | None:
    """Return the text to answer a message with, or None to stay silent.

    This is the function to rewrite for another bot. It may take REPLY_TIMEOUT s: while it awaits,
    other rooms go on. It may raise: that costs this one reply. It may be called again for what was
    answered, above all after a crash: the second reply is dropped, other effects are not.
    """
    if not event.body.startswith(COMMAND):
        return None
    text = event.body
    while COMMAND in text:  # Nested ones too: so two such bots never answer each other.
        text = text.replace(COMMAND, "")
    return text.strip() or f"Usage: {COMMAND} text to repeat"


async def main() -> None:
    """Log in and answer commands until a signal comes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, 0, "stopped")
    # The libraries stay silent: nio's warnings quote whole events, access tokens included.
    logging.basicConfig(level=logging.CRITICAL, format="%(asctime)s %(levelname)s %(message)s")
    level = logging.getLevelNamesMapping().get(setting("LOG_LEVEL", "INFO").upper())
    log.setLevel(level or stop(78, "set LOG_LEVEL to DEBUG, INFO, WARNING or ERROR"))
    user, token = setting("MATRIX_USER"), setting("MATRIX_ACCESS_TOKEN")
    if not user or not (token or setting("MATRIX_PASSWORD")):
        stop(78, "MATRIX_USER and MATRIX_PASSWORD or MATRIX_ACCESS_TOKEN must be set; see --help")
    state = State(Path(setting("STATE_DIRECTORY", ".")), user)
    client = Client(user, state)
    what = "discovery (needed unless MATRIX_HOMESERVER is set)"
    client.use(setting("MATRIX_HOMESERVER") or await client.persist(client.discover, what))
    if token or not client.access_token:
        await client.persist(client.log_in, f"the login at {client.homeserver}")
    state.save_session(homeserver=client.homeserver)
    log.info("Logged in as %s, device id: %s.", client.user_id, client.device_id)
    await sync_forever(client, state)


def setting(name: str, default: str = "") -> str:
    """Return an environment variable; an empty one counts as missing."""
    value = os.environ.get(name) or default
    if re.search("[\0-\x1f\x7f\ud800-\udfff]", value):
        stop(78, f"{name} is malformed (no UTF-8, or a line break in it): set it anew")
    return value


def stop(status: int, reason: str) -> NoReturn:
    """End the process as a crash would: what is not saved will be done again."""
    notify("STOPPING=1")
    print(f"echobot: {reason}", file=sys.stderr)
    os._exit(status)


async def sync_forever(client: "Client", state: "State") -> None:
    """Start to answer each sync response, and poll on without waiting for that."""
    room = cache(lambda room_id: Room(client, room_id))
    response = await client.persist(client.poll, "the sync")  # Without since: old invitations too.
    notify("READY=1")
    next_batch = state.next_batch or response["next_batch"]
    async with asyncio.TaskGroup() as tasks:  # A bug outside of a single event ends the bot.
        # At once, or after a kill the next start would be a first one again.
        pause = saved = tasks.create_task(state.save_after([], next_batch))
        told: JSON = {}  # invitations: some homeservers tell of them in every response
        while True:
            since = client.next_batch
            # Not every homeserver heeds the filter: what came without a since is history.
            joined, invited = [part(response, dict, "rooms", k) for k in ("join", "invite")]
            work = [room(i).answer_timeline(joined[i], since, next_batch) for i in joined if since]
            work += [room(i).accept(invited[i], since or next_batch) for i in invited.keys() - told]
            answering, told = [tasks.create_task(answer) for answer in work], invited
            saved = tasks.create_task(state.save_after([saved, *answering], next_batch))
            # Neither too far ahead of the replies, nor in a rush if there is nothing to answer.
            await asyncio.wait(answering or [pause], timeout=INTERVAL)
            client.next_batch, pause = next_batch, tasks.create_task(asyncio.sleep(INTERVAL))
            response = await client.persist(client.poll, "the sync")
            client.timeout, next_batch = SYNC_TIMEOUT, response["next_batch"]


class Room:
    """A room, and what is remembered of it until the process ends."""

    def __init__(self, client: "Client", room_id: str) -> None:
        self.client, self.room_id, self.told_encrypted = client, room_id, False
        self.turn = asyncio.Lock()  # its parts are answered one after the other
        self.answered: set[str] = set()  # transaction IDs for what timelines to come may repeat
        self.failing_since: dict[float, float] = {}  # monotonic s, by the patience of the failure

    async def answer_timeline(self, joined: JSON, since: str, next_batch: str) -> None:
        """Answer the room's timeline in a sync response, and before it what that leaves out."""
        async with self.turn:
            events = part(joined, list, "timeline", "events")
            if part(joined, bool, "timeline", "limited"):
                events = await self.answer_gap(since, next_batch, events)
            await self.answer_events(events)
            self.answered.clear()

    async def accept(self, invited: JSON, since: str) -> None:
        """Join the room and answer what was said since the invitation, or reject that."""
        client, room_id = self.client, self.room_id
        events = part(invited, list, "invite_state", "events")
        senders = [part(event, str, "sender") for event in events if self.own_membership(event)]
        inviter = (senders or ["nobody"])[-1]  # The others are told by the inviter's homeserver.
        async with self.turn:
            self.failing_since.clear()
            if not any(fnmatchcase(inviter, i) for i in setting("MATRIX_INVITERS", "*").split()):
                await client.persist(lambda: client.room_leave(room_id), f"leaving {room_id}", self)
                log.info("Did not follow the invitation of %s to %s", inviter, room_id)
            elif await client.persist(lambda: client.join(room_id), f"joining {room_id}", self):
                log.info("Joined %s, invited by %s", room_id, inviter)
                # Up to now: the polls since the invitation have told nothing of this room.
                await self.answer_events(await self.answer_gap(since, None, []))

    async def answer_gap(self, since: str, end: str | None, timeline: list[Any]) -> list[Any]:
        """Answer what came between two positions (default: now); return what is left to answer."""
        client, state, forward = self.client, self.client.state, MessageDirection.front
        start = part(state.session, str, "gaps", since, self.room_id) or since
        events, known = list[Any](), set[str]()
        read, empty = {"", end}, 0  # A page without an end, or that goes round, is the last one.
        while start not in read and empty < MAX_EMPTY_PAGES:
            read.add(start)
            request = partial(client.room_messages, self.room_id, start, end, forward, 20, MESSAGES)
            page = await client.persist(request, f"reading {self.room_id}", self)
            start, chunk = part(page, str, "end"), part(page, list, "chunk")
            events += chunk
            known |= {part(event, str, "event_id") for event in chunk}
            empty = 0 if chunk else empty + 1
            await asyncio.sleep(min(empty / 4, 1))
            # By pages, so that a killed bot gets on; unless later events may tell what is history.
            if all(part(event, str, "unsigned", "membership") for event in events):
                await self.answer_events(events)
                events = []
                if start and since == state.next_batch:
                    gap = {**part(state.session, dict, "gaps", since), self.room_id: start}
                    state.save_session(gaps={since: gap})
        if empty == MAX_EMPTY_PAGES:
            log.warning("Gave up on reading %s: too many empty pages", self.room_id)
        # The pages may stop early; what the timeline has before their end is older than that.
        old = [n for n, event in enumerate(timeline, 1) if part(event, str, "event_id") in known]
        return events + timeline[max(old, default=0) :]

    async def answer_events(self, events: list[Any]) -> None:
        """Answer what is new among events, each once and in order; a bug costs its event."""
        # The bot's own events come with their transaction IDs: so was answered what it sent before.
        self.answered |= {part(event, str, "unsigned", "transaction_id") for event in events}
        # Not every homeserver tells the bot's membership at an event: it follows from its changes.
        change = next(filter(self.own_membership, events), None)
        before = "leave" if self.own_membership(change) in ("invite", "join") else "join"
        membership = part(change, str, "unsigned", "prev_content", "membership") or before
        for event in events:
            event_id = part(event, str, "event_id")
            # Safe in any URL: in old rooms event IDs have / and +, and some proxies decode %2F.
            tx_id = quote(event_id, safe="!$:", errors="replace").replace("%", "~")
            membership = self.own_membership(event) or membership
            then = part(event, str, "unsigned", "membership") or membership
            try:
                if then in ("invite", "join") and tx_id not in self.answered:
                    self.answered.add(tx_id)
                    await self.answer(event, event_id, tx_id)
            except Exception as error:
                # Without its text, which may quote the message.
                frames = "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__
                log.error("Passed over %s in %s:\n%s", event_id, self.room_id, frames)

    def own_membership(self, event: Any) -> str:
        """Return the membership that an event gives the bot, "" if it is about something else."""
        is_own = part(event, str, "state_key") == self.client.user_id
        return str(part(event, str, "content", "membership")) if is_own else ""

    async def answer(self, event: Any, event_id: str, tx_id: str) -> None:
        """Answer an event if it calls for it, and return once the reply is acknowledged."""
        client, room_id, content = self.client, self.room_id, None
        match event:
            case {"sender": client.user_id} | {"unsigned": {"redacted_because": _}}:
                return
            case {"content": {"m.relates_to": {"rel_type": "m.replace"}}}:
                return  # It is an edit.
            case {"type": "m.room.encrypted"} if not self.told_encrypted:
                self.told_encrypted = True
                log.warning("%s is encrypted: its messages can't be read", room_id)
                content = {"msgtype": "m.notice", "body": ENCRYPTED, "m.mentions": {}}
                tx_id = f"encrypted{room_id}"
            case {"type": "m.room.message", "content": {"msgtype": "m.text", "body": str(body)}}:
                style = event["content"].get("formatted_body"), event["content"].get("format")
                content = await reply_content(RoomMessageText(event, body, *style))
        if content:
            request = partial(client.room_send, room_id, "m.room.message", content, tx_id)
            if await client.persist(request, f"the reply to {event_id} in {room_id}", self):
                log.info("Answered %s in %s", event_id, room_id)

    def gives_up(self, failure: "Failure") -> bool:
        """Tell whether the room has been refused, or fails while syncs succeed, for too long."""
        since = self.failing_since.setdefault(failure.patience, time.monotonic())
        return time.monotonic() - max(since, self.client.sync_failed_at) >= failure.patience


async def reply_content(event: RoomMessageText) -> JSON | None:
    """Return the content of what reply_to answers an event with, in that event's thread."""
    try:
        async with asyncio.timeout(REPLY_TIMEOUT):
            text = await reply_to(event)
    except (SystemExit, asyncio.CancelledError) as end:  # Like all that it raises: one reply less.
        raise RuntimeError(type(end).__name__).with_traceback(end.__traceback__) from None
    if text is None:
        return None
    # A lone surrogate can't be sent. Without m.mentions a body with @room would ping everybody.
    text = text.encode(errors="replace").decode()
    content: JSON = {"msgtype": "m.text", "body": text, "m.mentions": {}}
    match event.source["content"].get("m.relates_to"):
        case {"rel_type": "m.thread", "event_id": str(root)} if root.isprintable():
            thread = {"rel_type": "m.thread", "event_id": root, "is_falling_back": True}
            content["m.relates_to"] = {**thread, "m.in_reply_to": {"event_id": event.event_id}}
    return content


class Failure(Exception):
    """A request that failed, and why, quoting no message; `refusal`: the homeserver's 4xx, or 0."""

    def __init__(self, cause: str, status: int = 0, content: Any = None, headers: Any = None):
        errcode, reason = part(content, str, "errcode"), part(content, str, "error")
        said = "".join(c if c.isprintable() else " " for c in f" {errcode} ({reason[:200]})")
        super().__init__(cause + said if errcode else cause or "no answer in time")
        told, ms = (headers or {}).get("Retry-After", ""), part(content, int, "retry_after_ms")
        seconds = min(ms, 10**6) / 1000 or int(told[:9] if told.isdecimal() else 0)  # ms is exact
        self.retry_after = min(max(seconds, 0.5), 2 * MAX_WAIT) if status == 429 else 0
        is_awaited = self.retry_after or (status in (401, 403) and errcode in BLOCKED)
        is_refusal = errcode and 400 <= status < 500 and not is_awaited
        self.status, self.refusal = status, status if is_refusal else 0
        patience = {0: PATIENCE, 400: 0, 401: PATIENCE, 413: 0}.get(self.refusal, REFUSAL_PATIENCE)
        self.patience = LONG_PATIENCE if is_awaited else patience  # s that a room may fail so


class Client(AsyncClient):
    """nio's client, but a request returns JSON or raises Failure, and `persist` repeats it."""

    def __init__(self, user: str, state: "State") -> None:
        super().__init__("", user)
        self.state, device = state, part(state.session, str, "device_id") or DEVICE_ID
        token = setting("MATRIX_ACCESS_TOKEN") or part(state.session, str, "access_token")
        self.restore_login(user, device, token)
        self.in_turn, self.sync_failed_at = asyncio.Lock(), 0.0  # after a 429; monotonic s
        self.timeout = random.randrange(1, SYNC_TIMEOUT)  # ms: or Synapse repeats an old response
        # nio's own session ends at 100 connections: so many sends that hang would stop the poll.
        timeout = aiohttp.ClientTimeout(PATIENCE, connect=MAX_WAIT, sock_read=MAX_WAIT)
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    def use(self, homeserver: str) -> None:
        """Send requests to this base URL, through the proxy that the environment names for it."""
        url = re.match(r"(https?)://([\w.-]+|\[[\da-f:.]+])(:[1-6]?\d{1,4})?(/|$)", homeserver)
        if not url:
            stop(78, f"the homeserver of {self.user} has no valid URL: set MATRIX_HOMESERVER")
        self.homeserver = homeserver.rstrip("/")
        self.http_proxy = None if proxy_bypass(url[2]) else getproxies().get(url[1])

    async def discover(self) -> str:
        """Return the base URL that the user's server name publishes (spec: "Well-known URI")."""
        name, last = self.user.partition(":")[2], part(self.state.session, str, "homeserver")
        self.use("https://" + re.sub(r":\d+$", "", name))
        try:
            return str(part(await self.discovery_info(), str, "m.homeserver", "base_url") or last)
        except Failure as failure:
            if failure.status != 404 and not last:
                raise
            return f"https://{name}" if failure.status == 404 else str(last)

    async def poll(self) -> Any:
        """Return what came after next_batch; without one, the position of now and invitations."""
        notify("WATCHDOG=1")
        room = {"timeline": MESSAGES if self.next_batch else NOTHING, "ephemeral": NOTHING}
        # Without lazy_load_members Synapse leaves out a room that it has joined only in part.
        room |= {"account_data": NOTHING, "state": {**NOTHING, "lazy_load_members": True}}
        sync_filter = {"room": room, "presence": NOTHING, "account_data": NOTHING}
        try:
            return await self.sync(self.timeout, sync_filter, self.next_batch)
        except Failure as failure:
            self.sync_failed_at = time.monotonic()
            if failure.refusal == 400 and self.next_batch:
                log.error("next_batch is refused (%s): starting from now instead", failure)
                self.next_batch = ""
            if failure.refusal == 401:  # Only here: other requests are repeated with the new token.
                await self.log_in()
            raise

    async def log_in(self) -> None:
        """Log in, on the same device as before; end the process if that is refused."""
        token, password = setting("MATRIX_ACCESS_TOKEN"), setting("MATRIX_PASSWORD")
        try:
            found: Any = await (self.whoami() if token else self.login(password))
        except Failure as failure:
            if failure.refusal:
                check = f"MATRIX_USER and MATRIX_{'ACCESS_TOKEN' if token else 'PASSWORD'}"
                stop(77, f"{self.homeserver} refuses {self.user}: {failure}; check {check}")
            raise
        if found["user_id"] != self.user:
            stop(78, f"the login is of {found['user_id']}: set MATRIX_USER to that")
        device = part(found, str, "device_id") or str(self.device_id)
        new_token = found.get("access_token", "")  # One that was given is not saved.
        self.restore_login(self.user, device, token or new_token)
        if not self.state.next_batch:  # What is there is empty, or of another user.
            (self.state.directory / "next_batch").unlink(missing_ok=True)
        self.state.save_session(user_id=self.user, device_id=device, access_token=new_token)

    async def persist(self, request: Callable[[], Any], what: str, room: Room | None = None) -> Any:
        """Repeat a request until it succeeds and return its response; None if the room gives up."""
        delay, cause = 0.25, ""
        while True:
            try:
                response = await request()
                if room:
                    room.failing_since.clear()
                if cause:
                    log.info("No more trouble with %s", what)
                return response
            except Failure as failure:
                if room and room.gives_up(failure):
                    room.failing_since = {failure.patience: 0.0}  # The next gets one attempt.
                    log.warning("Gave up on %s: %s", what, failure)
                    return None
                if str(failure) != cause:
                    cause = str(failure)
                    level = logging.INFO if failure.retry_after else logging.WARNING
                    log.log(level, "Trouble with %s: %s; trying again", what, cause)
                # In turn if it is short, or all that are limited would ask for each free slot.
                async with self.in_turn if room and 0 < failure.retry_after <= 5 else nullcontext():
                    await asyncio.sleep(failure.retry_after or delay * random.uniform(0.5, 1))
                delay = min(2 * delay, MAX_WAIT)

    async def _send(
        self, response_class: Any, method: str, path: str, data: Any = None, *_: Any, **__: Any
    ) -> JSON:
        """Make one of nio's requests, once; return JSON or raise Failure."""
        # nio has the access token in the URL of all that needs one; logs on the way would have it.
        url, needs_token = re.subn(r"access_token=[^&]*&?", "", self.homeserver + path)
        headers = {"Authorization": f"Bearer {self.access_token}"} if needs_token else {}
        if method != "GET":  # Not every homeserver takes a body of another type, or none.
            data, headers["Content-Type"] = data or "{}", "application/json"
        request = self.http.request(method, url, data=data, headers=headers, proxy=self.http_proxy)
        try:
            async with request as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, UnicodeError) as error:
            # Not the whole text, which may quote a proxy's password.
            cause = str(error) if isinstance(error, OSError) else type(error).__name__
            raise Failure(cause) from None
        content: Any = None
        with suppress(ValueError, RecursionError):  # It is no JSON.
            content = json.loads(body.decode(errors="replace"))
        key = REQUIRED.get(response_class.__name__.removesuffix("Response"), "")
        is_complete = not key or isinstance(part(content, dict).get(key), list | str)
        if response.status == 200 and isinstance(content, dict) and is_complete:
            return content
        raise Failure(f"HTTP {response.status}", response.status, content, response.headers)


class State:
    """The state directory: next_batch and session.json, which hold the old or the new, whole."""

    def __init__(self, directory: Path, user: str) -> None:
        self.directory, saved = directory, None
        self.next_batch = ""  # the last position up to which all is done
        self.complain = cache(log.error)  # once of the same, until it is mended
        try:
            self.descriptor = os.open(directory, os.O_RDONLY)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
            (directory / "next_batch.tmp").touch(0o600)  # To fail now, not at a save.
            with suppress(FileNotFoundError):
                self.next_batch = (directory / "next_batch").read_text(errors="replace").strip()
            with suppress(FileNotFoundError, ValueError):
                saved = json.loads((directory / "session.json").read_bytes())
        except BlockingIOError:
            stop(75, f"another copy is running on {directory}: stop it first")
        except OSError as error:
            stop(78, f"can't use {directory} ({error.strerror}): set another STATE_DIRECTORY")
        owner = part(saved, str, "user_id")
        if owner not in ("", user):
            log.warning("Not using the state of %s", owner)
            self.next_batch, saved = "", None
        elif owner and not self.next_batch:
            log.error("next_batch is missing or empty: starting from now instead")
        self.session: JSON = part(saved, dict)  # and "gaps": {since: {room ID: answered up to}}

    def save_session(self, **changes: Any) -> None:
        """Change session.json."""
        self.session |= changes
        self.save("session.json", json.dumps(self.session))

    def save(self, name: str, text: str) -> None:
        """Replace a file, or say once that it can't be done: answering does not depend on it."""
        try:
            self.replace(self.directory / name, text)
            self.complain.cache_clear()
        except OSError as error:
            self.complain("Can't save %s: %s; answering goes on", name, error.strerror)

    def replace(self, path: Path, text: str) -> None:
        """Replace a file; after a crash it holds either the old text or the new one, whole."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.touch(0o600)
        temporary.write_text(text)
        with temporary.open() as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        os.fsync(self.descriptor)

    async def save_after(self, tasks: list[asyncio.Task[None]], next_batch: str) -> None:
        """Save a position once all that it stands for is done."""
        await asyncio.gather(*tasks)
        self.next_batch = next_batch
        await asyncio.to_thread(self.save, "next_batch", next_batch)


def part(whole: Any, kind: type, *path: str) -> Any:
    """Return a part of untrusted JSON, empty if it is missing or of another kind."""
    for name in path:
        whole = whole.get(name) if isinstance(whole, dict) else None
    return whole if isinstance(whole, kind) else kind()


def notify(state: str) -> None:
    """Tell systemd the state of the service, if it asked for it (see sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.sendto(state.encode(), re.sub("^@", "\0", address))


if __name__ == "__main__":
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(Path(__file__).read_text().split('"""')[1])  # __doc__ is None under -OO.
    elif sys.argv[1:]:
        stop(2, "takes no arguments but --help; settings are environment variables")
    else:
        asyncio.run(main())
