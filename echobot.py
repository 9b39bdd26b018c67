# /// script
# requires-python = ">=3.11"
# dependencies = ["matrix-nio~=0.26.0"]
# ///
"""A Matrix bot that answers every command once: none is lost, none is answered twice.

It answers each message that starts with !replybot with the rest of it. For a bot of your own,
rewrite one function: `reply_to`. Four rules keep the promise:

1. Save what is done, after every sync: next_batch, and for each room that still owes something the
   position to read it from again. So a slow room costs only itself, and a stop needs no care.
2. A reply names what it answers, so that what is read again tells what is done. A send that is
   repeated has the same transaction ID: the homeserver drops it.
3. Read back what was left out, to what was known before or to the bot's own invitation.
4. Persist: repeat each request until it succeeds, is refused for good, or its room has failed for
   long while syncs succeeded. A bug in reply_to is shown, and costs one event.

Environment of python echobot.py, besides HTTPS_PROXY, HTTP_PROXY, NO_PROXY and NOTIFY_SOCKET:
    MATRIX_USER        the full user ID; and MATRIX_PASSWORD, or MATRIX_ACCESS_TOKEN instead
    MATRIX_HOMESERVER  base URL; default: found from the user ID at every start
    MATRIX_INVITERS    whose invitations are accepted: @me:example.org @*:example.com; default: *
    STATE_DIRECTORY    where next_batch and session.json are kept; default: working directory
    LOG_LEVEL          DEBUG, INFO, WARNING or ERROR; default: INFO
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import dropwhile
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import getproxies, proxy_bypass

import aiohttp
from nio import AsyncClient, RoomMessageText

COMMAND = "!replybot"
ENCRYPTED = "I can't read encrypted messages: invite me to a new room with encryption turned off."
SYNC_TIMEOUT = 30_000  # ms that the homeserver holds a poll without news
PATIENCE = 600  # s that a room may fail while syncs succeed, or reply_to may take
NEVER = float("inf")
BLOCKED = ["M_USER_LOCKED", "M_USER_SUSPENDED", "M_RESOURCE_LIMIT_EXCEEDED", "M_CONSENT_NOT_GIVEN"]
HOST = r"([\w.-]+|\[[\w:.]+\])(:([0-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]))?"
JSON = dict[str, Any]  # an object; or events by event ID, in order
log = logging.getLogger("echobot")  # Others are silent: nio's quote events and access tokens.


async def reply_to(event: RoomMessageText) -> str | JSON | None:
    """Return what to answer a message with: a text, the content of an event, or None.

    There are event.sender, event.body, event.event_id and event.source["room_id"]. It may raise.
    """
    if not event.body.startswith(COMMAND):
        return None
    text = event.body
    while COMMAND in text:  # Nested ones too, so that no reply starts a loop.
        text = text.replace(COMMAND, "")
    return text.strip() or f"Usage: {COMMAND} text to repeat"


async def main() -> None:
    """Log in and answer until a signal comes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop(0, "stopped"))  # At once, whatever blocks the loop.
    os.umask(0o077)  # The access token is secret.
    sys.setrecursionlimit(20_000)  # Dendrite takes events that nest 10,000 deep.
    # However many threads reply_to blocks, names of hosts can be looked up.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(10**6))
    logging.basicConfig(level=logging.CRITICAL, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(setting("LOG_LEVEL", "INFO", "(?ai)DEBUG|INFO|WARNING|ERROR").upper())
    client = Client()
    what = "discovery (needed unless MATRIX_HOMESERVER is set)"
    client.use(setting("MATRIX_HOMESERVER") or await persist(client.discover, what))
    if client.given_token or not client.access_token:
        await persist(client.log_in, f"the login at {client.homeserver}")
    client.session["homeserver"] = client.homeserver
    log.info("Logged in as %s, device id: %s.", client.user_id, client.device_id)
    async with client.tasks:  # A bug in one ends them all.
        await sync_forever(client)


def setting(name: str, default: str = "", form: str = "[^\0-\x1f\x7f\ud800-\udfff]*") -> str:
    """Return an environment variable; an empty one counts as missing."""
    value = os.environ.get(name) or default
    if not re.fullmatch(form, value):
        stop(78, f"{name} is malformed: see --help; a user ID is like @bot:example.org")
    return value


def stop(status: int, reason: str) -> NoReturn:
    """End the process as a crash would: what is not saved will be done again."""
    notify("STOPPING=1")
    with suppress(OSError, AttributeError):  # There may be no stderr.
        os.write(sys.stderr.fileno(), f"echobot: {reason}\n".encode(errors="replace"))
    os._exit(status)


async def sync_forever(client: "Client") -> None:
    """Hand what each sync brings to its rooms, save what is done, poll on in no rush."""
    while True:
        began = time.monotonic()
        polling = client.tasks.create_task(persist(client.poll, "the sync"))
        await asyncio.sleep(0)  # The poll is on its way meanwhile.
        client.save()
        while not polling.done():
            await asyncio.wait([polling], timeout=60)
            notify("WATCHDOG=1")
        since, response = client.position, polling.result()
        client.position = part(response, "next_batch") or since
        notify("WATCHDOG=1" if client.sync_clock else "READY=1")
        for room_id in () if client.sync_clock else client.behind:  # from an earlier life
            client.room(room_id).begin_anew()
        follow(client, since, part(response, "rooms", "invite", kind=dict))
        rooms = part(response, "rooms", "join", kind=dict) if since else {}  # Else it is history.
        tasks = [client.room(i).hear(since, part(rooms[i], "timeline", kind=dict)) for i in rooms]
        if tasks and client.position != since:
            await asyncio.wait(tasks, timeout=0.5)  # Let most replies be done.
        else:
            await asyncio.sleep(began + 0.5 - time.monotonic())
        client.sync_clock += min(time.monotonic() - began, SYNC_TIMEOUT / 1000)


def follow(client: "Client", since: str, rooms: JSON) -> None:
    """Have rooms answer their invitations in a sync response, but not those of the last one."""
    behind, invited = client.behind, dict[str, str]()
    for room_id in filter(re.compile(r"!\S+").fullmatch, rooms):  # It could forge a line.
        events = part(rooms[room_id], "invite_state", "events", kind=list)
        own = [e for e in events if part(e, "state_key") == client.user_id]  # The last is true.
        invited[room_id] = "".join(part(own[-1], "sender").split()) if own else "?"
        if client.invited.get(room_id) != invited[room_id]:
            behind[room_id] = f"{behind.get(room_id, since).partition(' ')[0]} {invited[room_id]}"
            client.room(room_id).begin_anew()
    client.invited = invited


class Room:
    """A room. Client.behind has the position after which all is to be answered, and an inviter."""

    upto = ""  # a position: so far it was heard, "" if that is under way
    has_gap = False  # `events` are only the newest of that, the others have to be read
    task: asyncio.Task[None] | None = None  # which does all that
    failing_since = NEVER  # s, by Client.sync_clock
    has_notice = False  # that it is encrypted

    def __init__(self, client: "Client", room_id: str) -> None:
        self.client, self.id, self.behind = client, room_id, client.behind
        self.events: JSON = {}
        self.redacted = set[str]()  # event IDs

    def begin_anew(self) -> None:
        """Do all that the room owes: as after a crash, what is not done is read back."""
        if self.task:
            self.task.cancel()
        self.events, self.has_gap, self.has_notice, self.failing_since = {}, True, False, NEVER
        self.upto = "" if " " in self.behind[self.id] else self.client.position  # It joins first.
        self.task = self.client.tasks.create_task(self.work())

    def hear(self, since: str, timeline: JSON) -> asyncio.Task[None]:
        """Take what a sync since a position brought; return the task that answers it."""
        self.behind[self.id] = self.behind.get(self.id, since).partition(" ")[0]  # It has joined.
        if part(timeline, "limited", kind=bool) or len(self.events) > 1000:
            self.events, self.has_gap = {}, True  # for read_back to fill
        self.events |= (events := by_id(timeline, "events"))
        self.redacted |= {part(event, "redacts") for event in events.values()}
        self.upto = self.client.position
        self.task = self.task or self.client.tasks.create_task(self.work())
        return self.task

    async def work(self) -> None:
        """Answer the invitation, then all that is heard; note up to where that is done."""
        client, (position, _, inviter) = self.client, self.behind[self.id].partition(" ")
        if inviter:  # Join, or reject the invitation of one who is no inviter.
            joins = any(fnmatchcase(inviter, pattern) for pattern in client.inviters)
            request = partial(client.join if joins else client.room_leave, self.id)
            done = await persist(request, f"{'joining' if joins else 'leaving'} {self.id}", self)
            if done is not None:
                log.info("%s %s, invited by %s", "Joined" if joins else "Left", self.id, inviter)
                client.invited.pop(self.id, None)  # The next one is new.
            self.has_gap, self.behind[self.id] = joins and done is not None, position
        while upto := self.upto:
            events, has_gap = self.events, self.has_gap
            self.events, self.upto, self.has_gap = {}, "", False  # for what is heard from now on
            if has_gap:
                events = await self.read_back(self.behind[self.id], upto, events)
            await self.answer_all(events)
            self.behind[self.id] = upto
        self.task, self.redacted = None, set()
        if not self.has_gap:  # Else it has just joined: its first timeline is to come.
            del self.behind[self.id]

    async def answer_all(self, events: JSON) -> None:
        """Answer what has no reply, in order; a bug costs its event."""
        answered = self.answered_in(events)
        # Of homeservers that don't tell: before the first change it was the other way round.
        changes = filter(None, map(self.membership_by, events.values()))
        membership = "leave" if next(changes, "") in ("invite", "join") else "join"
        for event_id, event in events.items():
            change = "join" if event_id in answered else self.membership_by(event)
            membership = change or membership
            told = part(event, "unsigned", "membership") or membership
            try:
                if event_id not in answered | self.redacted and told in ("invite", "join"):
                    await self.answer(event_id, event)
            except BaseException as error:  # Whatever it raises may quote the message.
                if self.task is not asyncio.current_task():  # Cancelled, by begin_anew.
                    raise asyncio.CancelledError from None  # Whatever reply_to made of that.
                frames = "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__
                log.error("Passed over %s in %s:\n%s", event_id, self.id, frames)

    def answered_in(self, events: JSON) -> set[str]:
        """Return the IDs of what the bot's own messages among events answer."""
        own = [e for e in events.values() if part(e, "sender") == self.client.user_id]
        return {part(event, "content", "echobot.answers") for event in own}

    def membership_by(self, event: JSON) -> str:
        """Return the membership that an event gives the bot, "" if that is no change."""
        own = {"type": "m.room.member", "state_key": self.client.user_id}.items() <= event.items()
        now: str = part(event, "content", "membership")
        return now if own and now != part(event, "unsigned", "prev_content", "membership") else ""

    async def answer(self, event_id: str, event: JSON) -> None:
        """Answer an event if it calls for that; return once the reply is acknowledged."""
        content, answers = None, event_id
        match event:
            case {"sender": self.client.user_id} | {"unsigned": {"redacted_because": _}}:
                return
            case {"content": {"m.relates_to": {"rel_type": "m.replace"}}}:
                return  # an edit
            case {"type": "m.room.encrypted"} if not self.has_notice:
                self.has_notice, answers = True, self.id
                log.warning("%s is encrypted: its messages can't be read", self.id)
                content = {"msgtype": "m.notice", "body": ENCRYPTED, "m.mentions": {}}
            case {"type": "m.room.message", "content": {"msgtype": "m.text", "body": str(body)}}:
                style = map(event["content"].get, ("formatted_body", "format"))
                source = {**event, "room_id": self.id}
                content = await reply_content(RoomMessageText(source, body, *style))
        if content:
            content["echobot.answers"] = answers
            tx_id = answers.encode(errors="replace").hex()  # safe in any URL
            send = partial(self.client.room_send, self.id, "m.room.message", content, tx_id)
            if await persist(send, f"the reply to {event_id} in {self.id}", self):
                log.info("Answered %s in %s", event_id, self.id)

    async def read_back(self, since: str, upto: str, timeline: JSON) -> JSON:
        """Return what came between two positions, oldest first; a timeline is the newest of it."""
        known: list[str] = []  # at since, newest first; nothing, if the bot was just invited then
        if since:
            newest, _ = await self.read_page(since, 1)  # For 100, Synapse fetches what seems older.
            page, _ = await self.read_page(since, 100)
            if not any(part(e, "unsigned", "membership") == "invite" for e in newest.values()):
                known = [*dropwhile(lambda i: i not in (newest or page), page)] or [*newest]
        for attempt in range(10):
            page, before = await self.read_page(upto, 100)
            if not timeline or page.keys() & timeline.keys():
                break
            await asyncio.sleep(attempt / 4)  # That worker lags.
        ends, read = set(known[-1:]), dict[str, JSON]()  # newest first
        while not page.keys() <= read.keys():  # Some homeservers go round at the end.
            read |= page
            if not known:  # Then it ends with the bot's invitation, or with what has a reply.
                ends |= {i for i in page if self.membership_by(page[i]) == "invite"}
                ends |= self.answered_in(page)
            if page.keys() & ends or not before:
                break
            page, before = await self.read_page(before, 100)
        read = dict(reversed(timeline.items())) | read
        starts = ends.union(known) & read.keys() or set(read)
        order = dropwhile(lambda i: i not in starts, reversed(read))
        # What comes late from other homeservers is among the known, or follows what has a reply.
        done = set(known) - self.answered_in(read)  # and state, which Dendrite leaves out there
        done |= {i for i in read if "state_key" in read[i] and not self.membership_by(read[i])}
        return {i: read[i] for i in dropwhile(lambda i: i in done, order)}

    async def read_page(self, position: str, limit: int) -> tuple[JSON, str]:
        """Return events before a position, newest first, and the position before them."""
        get, only = self.client.room_messages, {"limit": 1000}  # Dendrite heeds this one.
        request = partial(get, self.id, position, limit=limit, message_filter=only)
        page = await persist(request, f"reading {self.id}", self)
        return by_id(page, "chunk"), part(page, "end")

    def gives_up(self, failure: "Failure") -> bool:
        """Note a failure; tell if its request is to be dropped."""
        if failure.status in (400, 413, 429):  # It is the message, or has to wait: not the room.
            self.failing_since = NEVER
            return failure.status != 429
        self.failing_since = min(self.failing_since, self.client.sync_clock)
        return self.client.sync_clock - self.failing_since >= PATIENCE  # until one succeeds


async def reply_content(event: RoomMessageText) -> JSON | None:
    """Return what reply_to answers as content, in the event's thread, without lone surrogates."""
    async with asyncio.timeout(PATIENCE):
        reply = await reply_to(event)
    if not reply:
        return None
    content: JSON = {"m.mentions": {}}  # Else @room in a body would ping everybody.
    match event.source["content"].get("m.relates_to"):
        case {"rel_type": "m.thread", "event_id": str(root)} if root.isprintable():
            thread = {"rel_type": "m.thread", "event_id": root, "is_falling_back": True}
            content["m.relates_to"] = {**thread, "m.in_reply_to": {"event_id": event.event_id}}
    content |= {"msgtype": "m.text", "body": reply} if isinstance(reply, str) else reply
    return dict(json.loads(json.dumps(content, ensure_ascii=False).encode(errors="replace")))


def by_id(whole: Any, name: str) -> JSON:
    """Return a list of events by event ID; what has none is no event."""
    return {i: event for event in part(whole, name, kind=list) if (i := part(event, "event_id"))}


def part(whole: Any, *path: str, kind: type = str) -> Any:
    """Return a part of untrusted JSON, empty if it is missing or of another kind."""
    for name in path:
        whole = whole.get(name) if isinstance(whole, dict) else None
    return whole if isinstance(whole, kind) else kind()


async def persist(request: Callable[[], Any], what: str, room: Room | None = None) -> Any:
    """Repeat a request until it succeeds; return its response, or None if the room gives up."""
    delay, time_limit, cause = 0.125, 60, ""  # s
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(time_limit):
                response = await request()
            break
        except TimeoutError:
            failure = Failure(f"Timeout after {time_limit} s")
            time_limit = min(2 * time_limit, PATIENCE)
        except Failure as error:
            failure = error
        if room and room.gives_up(failure):
            log.warning("Gave up on %s: %s", what, failure)
            return None
        if str(failure) != cause:
            cause = str(failure)
            log.warning("Trouble with %s: %s; trying again", what, cause)
        delay = 0.25 if time.monotonic() - began > 5 else min(2 * delay, 60)
        await asyncio.sleep(failure.retry_after + delay * random.uniform(0.5, 1))
    if room:
        room.failing_since = NEVER
    if cause:
        log.info("No more trouble with %s", what)
    return response


class Failure(Exception):
    """A request that failed; its text says why, and quotes no message."""

    status, retry_after = 0, 0.0  # if the homeserver says no, or anybody 429; s to wait, as told


def failure_of(response: aiohttp.ClientResponse, content: Any) -> Failure:
    """Return what an answer that is no success says, in the homeserver's own words."""
    status, errcode, error = response.status, part(content, "errcode"), part(content, "error")
    failure = Failure(f"HTTP {status} {errcode} {error!r}" if errcode else f"HTTP {status}")
    if status == 429 or errcode in BLOCKED or (errcode and status < 500):  # A proxy's has none.
        failure.status = 429 if errcode in BLOCKED else status
    seconds = max(0.0, min(part(content, "retry_after_ms", kind=int), 10**6)) / 1000
    told = response.headers.get("Retry-After", "")
    seconds = seconds or (float(told) if told.isdecimal() else 0.0)
    with suppress(ValueError, TypeError, OverflowError):  # It may be a date.
        seconds = parsedate_to_datetime(told).timestamp() - time.time()
    failure.retry_after = max(0, min(seconds, 120))
    return failure


class Client(AsyncClient):
    """nio's client, whose requests are made once, and return JSON or raise Failure."""

    refusals = 0  # of next_batch, in a row
    sync_clock = 0.0  # s in syncs that succeeded: rooms are given up by it

    def __init__(self) -> None:
        user = setting("MATRIX_USER", "", rf"(@[!-9;-~]*:{HOST})?")
        self.password, self.given_token = setting("MATRIX_PASSWORD"), setting("MATRIX_ACCESS_TOKEN")
        if not user or not (self.password or self.given_token):
            stop(78, "set MATRIX_USER, and MATRIX_PASSWORD or MATRIX_ACCESS_TOKEN; see --help")
        super().__init__("", user)
        form = r"[ ,]*((?=[^ ,]*[:*])[@*?[][^\s,@:]*(:[^\s,@/]*[\w*?\]])?([ ,]+|$))+"
        self.inviters = setting("MATRIX_INVITERS", "*", form).replace(",", " ").split()
        self.directory = Path(setting("STATE_DIRECTORY", "."))
        self.saved: dict[str, str | None] = {}  # files as written; None if that failed
        self.load()
        token = self.given_token or part(self.session, "access_token")
        self.restore_login(user, part(self.session, "device_id") or "ECHOBOT", token)
        self.tasks = asyncio.TaskGroup()
        self.room = cache(lambda room_id: Room(self, room_id))  # the same each time
        self.invited: dict[str, str] = {}  # rooms and inviters, by the last sync response
        self.hold = random.randrange(1, 1000)  # ms, of a poll: Synapse repeats its answers
        connector = aiohttp.TCPConnector(limit=450)  # Often 1,024 files may be open.
        self.http = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout())

    def load(self) -> None:
        """Lock the state directory, and read what an earlier life left there."""
        paths = [self.directory / name for name in ("next_batch", "session.json")]
        try:
            self.lock = (self.directory / "echobot.lock").open("a")  # until the process ends
            text, session = [p.read_text(errors="replace") if p.exists() else "" for p in paths]
            self.descriptor = os.open(self.directory, os.O_RDONLY)
        except OSError as error:
            stop(78, f"can't use {self.directory} ({error.strerror}): set another STATE_DIRECTORY")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # The latter is SMB's.
            stop(75, f"another copy is running on {self.directory}: stop it first")
        except OSError as error:  # Not every file system has locks.
            log.warning("Can't lock %s (%s): start no other copy", self.directory, error.strerror)
        self.session: JSON = {}
        with suppress(ValueError):
            self.session = part(json.loads(session), kind=dict)
        if (owner := part(self.session, "user_id")) not in ("", self.user):
            log.warning("Not using the state of %s", owner)
            text, self.session = "", {}
        self.position = text.partition("\n")[0].strip()
        self.behind: dict[str, str] = dict(re.findall(r"(?m)^(!\S+) ?(.*)", text))

    def save(self) -> None:
        """Replace each changed file atomically, or say once that it can't be done."""
        lines = "\n".join([self.position, *map(" ".join, self.behind.items())])
        for name, text in {"next_batch": lines, "session.json": json.dumps(self.session)}.items():
            if self.saved.get(name) == text:
                continue
            temporary = self.directory / f"{name}.tmp"
            try:
                with temporary.open("w", errors="replace") as file:
                    print(text, end="", file=file, flush=True)
                    os.fsync(file.fileno())
                temporary.replace(self.directory / name)
                with suppress(OSError):  # Not every file system can.
                    os.fsync(self.descriptor)
                self.saved[name] = text
            except OSError as error:
                if self.saved.get(name, "") is not None:
                    log.error("Can't save %s: %s; answering goes on", name, error.strerror)
                self.saved[name] = None

    def use(self, homeserver: str) -> None:
        """Send requests to a base URL, through the environment's proxy for it."""
        if not (url := re.fullmatch(rf"(https?)://({HOST})(/[^?#\s]*)?", homeserver)):
            stop(78, f"the homeserver of {self.user} has no valid URL: set MATRIX_HOMESERVER")
        self.homeserver, proxies = homeserver.rstrip("/"), getproxies()
        proxy = "" if proxy_bypass(url[2]) else proxies.get(url[1]) or proxies.get("all", "")
        self.proxy = re.sub("^(?!.*://)", "http://", proxy) if proxy else None
        if self.proxy and not re.fullmatch(rf"https?://([^@/?#[\]]*@)?{HOST}/?", self.proxy):
            stop(78, f"{url[1].upper()}_PROXY or ALL_PROXY is not like http://proxy.example:3128")

    async def discover(self) -> str:
        """Return the base URL that the user's server publishes (spec: "Well-known URI")."""
        name, last = self.user.partition(":")[2], part(self.session, "homeserver")
        self.use("https://" + re.sub(r":\d+$", "", name))
        try:
            async with asyncio.timeout(20 if last else None):
                return str(part(await self.discovery_info(), "m.homeserver", "base_url") or last)
        except (Failure, TimeoutError) as failure:
            if not last and not str(failure).startswith("HTTP 404"):
                raise
            return str(last or f"https://{name}")  # It may be 404 for a moment.

    async def log_in(self) -> None:
        """Log in, on the same device as before, or end the process if that is refused."""
        try:
            found: Any = await (self.whoami() if self.given_token else self.login(self.password))
        except Failure as failure:
            if failure.status in (0, 429):
                raise
            secret = "MATRIX_ACCESS_TOKEN" if self.given_token else "MATRIX_PASSWORD"
            check = f"check MATRIX_USER and {secret}, and MATRIX_HOMESERVER"
            stop(77, f"{self.homeserver} refuses {self.user}: {failure}; {check}")
        if (user_id := part(found, "user_id")) != self.user:
            stop(78, f"the login is of {user_id}: set MATRIX_USER to that")
        device = part(found, "device_id") or str(self.device_id)
        new_token = part(found, "access_token")  # One that was given is not saved.
        self.restore_login(user_id, device, self.given_token or new_token)
        self.session |= {"user_id": user_id, "device_id": device, "access_token": new_token}
        self.save()

    async def poll(self) -> Any:
        """Return what came after next_batch; forget that once it is refused for a minute."""
        since, hold, self.hold = self.position, self.hold, SYNC_TIMEOUT
        refusals, self.refusals = self.refusals, 0  # Only those in a row count.
        try:
            return await self.sync(hold, sync_filter(since), since)
        except Failure as failure:
            self.hold = random.randrange(1, 1000)  # Failures may be cached.
            if failure.status == 401:
                await self.log_in()  # Only here: others are repeated with the new token.
            if since and failure.status in (400, 404):
                await self.sync(1, sync_filter(""), "")  # If this raises, it is not the position.
                self.refusals = refusals + 1
            if self.refusals == 9:  # That took a minute, by the delays of persist.
                log.error("next_batch %s is refused: starting from now", since)
                self.position = ""
            raise

    async def _send(
        self, response_class: Any, method: str, path: str, data: Any = None, *_: Any, **__: Any
    ) -> JSON:
        """Make one of nio's requests."""
        # nio's URLs have the access token, which logs on the way would keep.
        url, needs_token = re.subn(r"access_token=[^&]*&?", "", self.homeserver + path)
        headers = {"Authorization": f"Bearer {self.access_token}"} if needs_token else {}
        if method != "GET":  # Not every homeserver takes a body of another type, or none.
            data, headers["Content-Type"] = data or "{}", "application/json"
        # Redirected, a login or a token would get lost.
        options: JSON = {"proxy": self.proxy, "allow_redirects": "/.well-known/" in url}
        try:
            request = self.http.request(method, url, data=data, headers=headers, **options)
            async with request as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, UnicodeError) as error:
            # Others may quote a password.
            raise Failure(error if isinstance(error, OSError) else type(error).__name__) from None
        content: Any = None
        with suppress(ValueError, RecursionError):  # It is no JSON.
            content = json.loads(body.decode("utf-8-sig", errors="replace"))
        if response.status == 200 and isinstance(content, dict) and (content or "/leave" in path):
            return content
        raise failure_of(response, content)


def sync_filter(since: str) -> JSON:
    """Ask for timelines since a position; without one, for invitations alone."""
    # Without one another URL each time: Synapse repeats its answers.
    nothing: JSON = {"types": [], "limit": 1 if since else random.randrange(1, 10**9)}
    room = dict.fromkeys(["timeline", "state", "ephemeral", "account_data"], nothing)
    if since:  # All types, for Dendrite; lazily, or Synapse leaves out what it has joined in part.
        room |= {"timeline": {"limit": 1000}, "state": {"types": [], "lazy_load_members": True}}
    return {"room": room, "presence": nothing, "account_data": nothing}


def notify(state: str) -> None:
    """Tell systemd the state of the service, if it asked (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.setblocking(False)  # Nobody may read it.
            unix.sendto(state.encode(), re.sub("^@", "\0", address))


if __name__ == "__main__":
    if sys.argv[1:] == ["--help"]:
        print(Path(__file__).read_text().split('"""')[1])  # __doc__ is None under -OO.
    elif sys.argv[1:]:
        stop(2, "takes no arguments but --help")
    else:
        asyncio.run(main())
