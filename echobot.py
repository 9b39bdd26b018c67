#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["matrix-nio~=0.26.0"]
# ///
"""A Matrix bot that answers every command once: none is lost, none is answered twice.

    MATRIX_USER=@bot:example.org MATRIX_PASSWORD=... python echobot.py

It answers each message that starts with !replybot with the rest of it. For a bot of your own,
rewrite one function: `reply_to`. Four rules keep the promise:

1. Save what is done, after every sync: next_batch, and for each room that still owes replies the
   position to read it from again. So a slow room costs only itself, and a stop needs no care.
2. A reply names what it answers, as echobot.answers. Before anything is answered, or sent again,
   the bot's own messages tell what has a reply.
3. Read back what was left out, to what was known before or to the bot's own invitation.
4. Retry. One loop repeats every request until it succeeds, is refused for good, or its room has
   failed for long while syncs succeeded. A bug in reply_to is shown, and costs one event.

Environment:
    MATRIX_USER        the full user ID; and MATRIX_PASSWORD, or MATRIX_ACCESS_TOKEN instead
    MATRIX_HOMESERVER  base URL; default: found from the user ID at every start
    MATRIX_INVITERS    whose invitations are accepted: @me:example.org @*:example.com; default: *
    STATE_DIRECTORY    where next_batch and session.json are kept; default: working directory
    LOG_LEVEL          DEBUG, INFO, WARNING or ERROR; default: INFO
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
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from itertools import dropwhile
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import getproxies, proxy_bypass

import aiohttp
from nio import AsyncClient, RoomMessageText

COMMAND = "!replybot"
ENCRYPTED = "I can't read encrypted messages: invite me to a new room with encryption turned off."
SYNC_TIMEOUT = 30_000  # ms that the homeserver holds a poll without news
INTERVAL = 0.5  # s between polls without news, and that a poll may wait for replies
MAX_DELAY = 60  # s between two attempts
PATIENCE = 600  # s that a room may fail while syncs succeed
REPLY_TIMEOUT = 600  # s that reply_to may take
MAX_BUSY = 450  # rooms answered, or joined, at a time: often only 1,024 files may be open
MAX_REMEMBERED = 1000  # events of a room, or 100 more
NEVER = float("inf")
BLOCKED = ["M_USER_LOCKED", "M_USER_SUSPENDED", "M_RESOURCE_LIMIT_EXCEEDED", "M_CONSENT_NOT_GIVEN"]
# What a success has, by nio's name of the response.
REQUIRED = {"Join": "room_id", "Login": "access_token", "Whoami": "user_id"}
REQUIRED |= {"RoomMessages": "chunk", "RoomSend": "event_id", "Sync": "next_batch"}
PORT = r"[0-5]?\d{1,4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]"
HOST = rf"([\w.-]+|\[[\da-fA-F:.]+\])(:({PORT}))?"
ONE_LINE = "[^\0-\x1f\x7f\ud800-\udfff]*"
JSON = dict[str, Any]
Events = dict[str, JSON]  # by event ID, in order
Task = asyncio.Task[Any]
log = logging.getLogger("echobot")


async def reply_to(event: RoomMessageText) -> str | JSON | None:
    """Return what to answer a message with: a text, the content of an event, or None.

    This is the function to rewrite for another bot. It gets event.sender, event.body and
    event.event_id; event.source has all else, as event.source["room_id"]. It may take
    REPLY_TIMEOUT s: while it awaits, other rooms go on. It may raise: that costs this one reply.
    After a restart or an invitation it may be called again: no second reply is sent.
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
    sys.setrecursionlimit(20_000)  # Dendrite takes events that nest 10,000 deep.
    # However many threads reply_to blocks, saves and look-ups of names need some, too.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(10**6))
    # Other loggers are silent: nio's quote events and access tokens.
    logging.basicConfig(level=logging.CRITICAL, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(setting("LOG_LEVEL", "INFO", "(?ai)DEBUG|INFO|WARNING|ERROR", "INFO").upper())
    client = Client()
    what = "discovery (needed unless MATRIX_HOMESERVER is set)"
    client.use(setting("MATRIX_HOMESERVER") or await retry(lambda: discover(client), what))
    if client.given_token or not client.access_token:
        await retry(lambda: log_in(client), f"the login at {client.homeserver}")
    client.state.save_session(homeserver=client.homeserver)
    log.info("Logged in as %s, device id: %s.", client.user_id, client.device_id)
    await sync_forever(client)


def setting(name: str, default: str = "", form: str = ONE_LINE, example: str = "text") -> str:
    """Return an environment variable; an empty one counts as missing."""
    value = os.environ.get(name) or default
    if not re.fullmatch(form, value):
        stop(78, f"{name} is malformed: it must be one line of UTF-8, like {example}")
    return value


def stop(status: int, reason: str) -> NoReturn:
    """End the process as a crash would: what is not saved will be done again."""
    notify("STOPPING=1")
    with suppress(OSError):
        if sys.stderr and select.select([], [2], [], 0)[1]:  # Else nobody reads it.
            os.write(2, f"echobot: {reason}\n".encode(errors="replace"))
    os._exit(status)


async def crash_on_bug(work: Awaitable[Any]) -> Any:
    """Return what work does, or end the process if that has a bug."""
    try:
        return await work
    except Exception:
        stop(1, f"ended by a bug\n{traceback.format_exc()}")


async def sync_forever(client: "Client") -> None:
    """Hand what each sync brings to its rooms, save what is done, and poll on."""
    state, is_ready = client.state, False
    while True:
        began = time.monotonic()
        notify("WATCHDOG=1")
        polling = asyncio.create_task(crash_on_bug(retry(lambda: poll(client), "the sync")))
        await asyncio.to_thread(state.save, "next_batch", state.positions())
        while not polling.done():
            await asyncio.wait([polling], timeout=60)
            notify("WATCHDOG=1")
        since, response = state.next_batch, polling.result()  # JSON, by Client._send
        state.next_batch = response["next_batch"]
        client.hold = SYNC_TIMEOUT
        client.invited = follow(client, response, since, client.invited)
        if not (is_ready and since):  # at first, or after a refused position
            notify("READY=1")
            await resume(client, since)
            is_ready = True
        # Let the replies keep up, and don't poll in a rush.
        if answering := hand_out(client, response, since):
            await asyncio.wait(answering, timeout=INTERVAL)
        else:
            await asyncio.sleep(began + INTERVAL - time.monotonic())
        client.sync_clock += min(time.monotonic() - began, SYNC_TIMEOUT / 1000)


async def poll(client: "Client") -> Any:
    """Return what came after next_batch; forget that once it is refused for a minute."""
    # After a failure short, and at a new URL each time: failures may be cached.
    since, hold = client.state.next_batch, client.hold or random.randrange(1, 1000)
    client.hold = 0
    # Set again below: only refusals in a row count.
    refused_since, client.refused_since = client.refused_since, NEVER
    try:
        return await client.sync(hold, sync_filter(since), since)
    except Failure as failure:
        if failure.status == 401:
            await log_in(client)  # Only here: others are repeated with the new token.
        if since and failure.status in (400, 404):
            # If this raises too, it is not the position that is refused.
            await client.sync(hold, sync_filter(""), "")
            client.refused_since = min(refused_since, time.monotonic())
        if time.monotonic() - client.refused_since >= 60:
            log.error("next_batch %s is refused: starting from now and what is known", since)
            client.state.next_batch = ""
        raise


def sync_filter(since: str) -> JSON:
    """Ask for timelines since a position; without one, for invitations alone."""
    nothing: JSON = {"types": []}
    room = dict.fromkeys(["timeline", "state", "ephemeral", "account_data"], nothing)
    if since:  # All types, or Dendrite changes the order.
        room["timeline"] = {"limit": 1000}
        # Else Synapse leaves out rooms that it has joined only in part.
        room["state"] = {**nothing, "lazy_load_members": True}
    # Without a position a new URL each time: Synapse repeats its answers.
    presence = nothing if since else {**nothing, "limit": random.randrange(1, 10**9)}
    return {"room": room, "presence": presence, "account_data": nothing}


async def resume(client: "Client", since: str) -> None:
    """Have rooms go on that owe replies, or of which this life has heard."""
    state = client.state
    if not since:
        for room in client.known_rooms.values():
            if room.done:
                state.behind.setdefault(room.id, "")
        # Before any join: a crash between that and a save would lose the room.
        state.save("next_batch", state.positions())
    # A room that it was just invited to goes on with its first timeline.
    resumed = [room for room in map(client.room, state.behind) if not room.joining]
    # Join first, unless that takes long: Conduit hides for good what was read from outside.
    older = asyncio.create_task(crash_on_bug(follow_older(client)))
    await asyncio.wait([older], timeout=5)
    for room in resumed:
        if not room.joining:
            hear(room, since, {"limited": True})


async def follow_older(client: "Client") -> None:
    """Follow the invitations from before the saved position."""
    sync = await retry(lambda: client.sync(1, sync_filter(""), ""), "the sync for old invitations")
    follow(client, sync, "", client.told)  # What polls have told meanwhile is newer.


def follow(client: "Client", response: JSON, since: str, old: set[str]) -> set[str]:
    """Follow the invitations in a sync response that are not old; return all of them."""
    invited = rooms_of(response, "invite")
    for room in map(client.room, invited.keys() - old):
        client.state.behind.setdefault(room.id, since)
        for task in filter(None, (room.joining, room.answering)):
            task.cancel()  # As after a crash, all that is not done will be read back.
        room.joining = asyncio.create_task(crash_on_bug(accept(room, invited[room.id])))
        room.answering, room.has_notice = None, False
    client.told |= invited.keys() | rooms_of(response, "join").keys()
    return set(invited)


def hand_out(client: "Client", response: JSON, since: str) -> list[Task]:
    """Hand each room its part of a sync response; return the tasks that answer news."""
    # Without a position timelines are history: not every homeserver heeds the filter.
    joined = rooms_of(response, "join") if since else {}
    heard = [hear(client.room(i), since, part(joined, i, "timeline", kind=dict)) for i in joined]
    return list(filter(None, heard))


def rooms_of(response: JSON, membership: str) -> JSON:
    """Return what a sync response has of the rooms with a membership, by room ID."""
    rooms = part(response, "rooms", membership, kind=dict)
    # An ID with a space could pass for another line of next_batch.
    return {i: rooms[i] for i in rooms if re.fullmatch(r"!\S+", i)}


class Room:
    """A room: what comes after its position in State.behind, up to `upto`, is to be answered.

    That is `events`; if it `has_gap`, these are only the newest, and the others have to be read.
    """

    upto, has_gap = "", False
    answering: Task | None = None
    joining: Task | None = None
    may_be_sent = False  # the reply under way: a response was lost
    failing_since = NEVER  # s, by Client.sync_clock
    has_notice = False  # that it is encrypted

    def __init__(self, client: "Client", room_id: str) -> None:
        self.client, self.id, self.events = client, room_id, Events()
        self.done: dict[str, None] = {}  # event IDs: later timelines may repeat them
        self.redacted = set[str]()  # event IDs, while replies are under way


def hear(room: Room, since: str, timeline: JSON) -> Task | None:
    """Have a room answer what a sync since a position brought; return its task if that is news."""
    owes_from = room.client.state.behind.setdefault(room.id, since)
    # It owes what is older than these, and no task has that in hand: follow has ended it.
    is_left = owes_from != since and not room.answering
    events = by_id(timeline, "events")
    is_new = any(i not in room.events and i not in room.done for i in events)
    if part(timeline, "limited", kind=bool) or is_left or len(room.events) > MAX_REMEMBERED:
        room.events, room.has_gap = Events(), True  # for read_back to fill
    room.events |= events
    room.upto = room.client.state.next_batch
    room.redacted |= {part(event, "redacts") for event in events.values()}
    room.answering = room.answering or asyncio.create_task(crash_on_bug(answer_room(room)))
    return room.answering if is_new else None


async def answer_room(room: Room) -> None:
    """Answer all that a room hears, and note the position up to which that is done."""
    client, behind = room.client, room.client.state.behind
    async with client.slots:
        while upto := room.upto:
            events, has_gap = room.events, room.has_gap
            # What is heard from now on is for the next turn.
            room.events, room.upto, room.has_gap = Events(), "", False
            if has_gap:
                events = await read_back(room, behind[room.id], upto, events)
            await answer_events(room, events)
            behind[room.id] = upto
        room.redacted.clear()
        room.answering = None
        del behind[room.id]


async def answer_events(room: Room, events: Events) -> None:
    """Answer what is new among events, each once and in order; a bug costs its event."""
    answered = answered_in(room, events)
    room.done |= dict.fromkeys(answered)
    for event_id, membership in memberships(room, events, answered).items():
        is_new = event_id not in room.done and event_id not in room.redacted
        try:
            if is_new and membership in ("invite", "join"):
                await answer(room, event_id, events[event_id])
        except BaseException as error:  # Whatever reply_to raises; its text may quote the message.
            if room.answering is not asyncio.current_task():  # Cancelled, by follow.
                raise asyncio.CancelledError from None  # Whatever reply_to made of that.
            frames = "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__
            log.error("Passed over %s in %s:\n%s", event_id, room.id, frames)
        room.done[event_id] = None
    if len(room.done) > MAX_REMEMBERED + 100:
        room.done = dict.fromkeys(list(room.done)[-MAX_REMEMBERED:])


def answered_in(room: Room, events: Events) -> set[str]:
    """Return the IDs of what the bot's own messages among events answer."""
    own = [e for e in events.values() if part(e, "sender") == room.client.user_id]
    return {part(event, "content", "echobot.answers") for event in own}


def memberships(room: Room, events: Events, answered: set[str]) -> dict[str, str]:
    """Return the bot's membership at each event: what came while it was out is not its business.

    Not every homeserver tells that. Else follow the changes, before the first of which it was the
    other way round; and where the bot has answered, it was in.
    """
    changes = filter(None, (own_membership(room, event) for event in events.values()))
    now = "leave" if next(changes, "") in ("invite", "join") else "join"
    result = {}
    for event_id, event in events.items():
        now = own_membership(room, event) or now
        now = "join" if event_id in answered else now
        result[event_id] = part(event, "unsigned", "membership") or now
    return result


def own_membership(room: Room, event: Any) -> str:
    """Return the membership that an event gives the bot, "" if that is no change."""
    if part(event, "type") != "m.room.member" or event.get("state_key") != room.client.user_id:
        return ""
    now = part(event, "content", "membership")
    return str(now) if now != part(event, "unsigned", "prev_content", "membership") else ""


async def answer(room: Room, event_id: str, event: JSON) -> None:
    """Answer an event if it calls for that; return once the reply is acknowledged."""
    content, answers, may_be_sent = None, event_id, False
    match event:
        case {"sender": room.client.user_id} | {"unsigned": {"redacted_because": _}}:
            return
        case {"content": {"m.relates_to": {"rel_type": "m.replace"}}}:
            return  # an edit
        case {"type": "m.room.encrypted"} if not room.has_notice:
            room.has_notice = True
            log.warning("%s is encrypted: its messages can't be read", room.id)
            content = {"msgtype": "m.notice", "body": ENCRYPTED, "m.mentions": {}}
            answers, may_be_sent = room.id, True  # One for all: look for that of an earlier life.
        case {"type": "m.room.message", "content": {"msgtype": "m.text", "body": str(body)}}:
            style = map(event["content"].get, ("formatted_body", "format"))
            source = {**event, "room_id": room.id}
            content = await reply_content(RoomMessageText(source, body, *style))
    if room.answering is not asyncio.current_task():  # reply_to has caught the cancellation.
        raise asyncio.CancelledError
    if content:
        content["echobot.answers"], room.may_be_sent = answers, may_be_sent
        tx_id = answers.encode(errors="replace").hex()  # safe in any URL
        what = f"the reply to {event_id} in {room.id}"
        if await retry(lambda: send(room, content, tx_id), what, room):
            log.info("Answered %s in %s", event_id, room.id)


async def reply_content(event: RoomMessageText) -> JSON | None:
    """Return the content of what reply_to answers, in the event's thread."""
    async with asyncio.timeout(REPLY_TIMEOUT):
        reply = await reply_to(event)
    if not reply:
        return None
    content: JSON = {"m.mentions": {}}  # Without it a body with @room would ping everybody.
    match event.source["content"].get("m.relates_to"):
        case {"rel_type": "m.thread", "event_id": str(root)} if root.isprintable():
            thread = {"rel_type": "m.thread", "event_id": root, "is_falling_back": True}
            content["m.relates_to"] = {**thread, "m.in_reply_to": {"event_id": event.event_id}}
    content |= {"msgtype": "m.text", "body": reply} if isinstance(reply, str) else reply
    # A lone surrogate can't be sent.
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return dict(json.loads(text.encode(errors="replace")))


async def send(room: Room, content: JSON, tx_id: str) -> Any:
    """Send a reply, unless it was sent before and only the answer was lost, or is unwanted now."""
    client, event_id = room.client, content["echobot.answers"]
    if event_id in room.redacted:
        return None
    if room.may_be_sent:
        page: Any = await client.room_messages(room.id, limit=100)
        if event_id in answered_in(room, by_id(page, "chunk")):
            return True
    return await client.room_send(room.id, "m.room.message", content, tx_id)


async def read_back(room: Room, since: str, upto: str, timeline: Events) -> Events:
    """Return what came between two positions, oldest first; a timeline is the newest of it.

    Pages are read from upto back to the oldest of what was known at since; or, if nothing was, to
    the bot's invitation, or to what has a reply.
    """
    # Conduit's positions are numbers, and its pages leave out the event at one.
    since, upto = [str(int(p) + 1) if p.isdecimal() else p for p in (since, upto)]
    known = await known_at(room, since) if since else []
    # To the oldest: what comes late from other homeservers is among these.
    ends, read = set(known[-1:]), dict(reversed(timeline.items()))  # newest first
    async for page in pages_before(room, upto, timeline):
        read |= page
        if not known:
            ends |= {i for i in page if own_membership(room, page[i]) == "invite"}
            ends |= answered_in(room, page) | room.done.keys()
        if page.keys() & ends or not (page or known):  # On an empty page, the rest is hidden.
            break
    starts = ends.union(known) & read.keys() or set(read)
    order = dropwhile(lambda i: i not in starts, reversed(read))
    # Skip what was known, up to the first that is new or answered. What follows stays: it may have
    # come late from other homeservers. State is not new: some pages leave it out.
    new = {i for i, e in read.items() if "state_key" not in e or own_membership(room, e)}
    new = (new - set(known)) | answered_in(room, read) | room.done.keys()
    return {i: read[i] for i in dropwhile(lambda i: i not in new, order)}


async def known_at(room: Room, position: str) -> list[str]:
    """Return 100 event IDs at most from before a position, newest first."""
    # First the newest alone: to read 100, Synapse may fetch newer ones, which then seem older.
    newest, _ = await read_page(room, position, 1)
    page, _ = await read_page(room, position, 100)
    # From the newest on; or all, if that is hidden; or it alone, if others fill the page.
    return list(dropwhile(lambda i: i not in (newest or page), page)) or list(newest)


async def pages_before(room: Room, position: str, timeline: Events) -> AsyncIterator[Events]:
    """Yield pages of the events before a position, newest first, until 100 have nothing new."""
    for attempt in range(1, 10):
        page, before = await read_page(room, position, 100)
        if not timeline or page.keys() & timeline.keys():
            break  # Else that worker lags: ask again.
        await asyncio.sleep(min(attempt / 4, 1))
    seen, useless = set[str](), 0
    while True:
        yield page
        useless = 0 if page.keys() - seen else useless + 1
        if not before or useless == 100:
            break
        seen |= page.keys()
        await asyncio.sleep(min(useless / 4, 1))
        page, before = await read_page(room, before, 100)


async def read_page(room: Room, start: str, limit: int) -> tuple[Events, str]:
    """Return events before a position, newest first, and the position before them."""
    # Dendrite alone heeds a limit in the filter; it loses events where its pages meet.
    only = {"limit": 1000} if limit > 1 else None
    client, what = room.client, f"reading {room.id}"
    page = await retry(
        lambda: client.room_messages(room.id, start, limit=limit, message_filter=only), what, room
    )
    return by_id(page, "chunk"), part(page, "end")


def by_id(whole: Any, name: str) -> Events:
    """Return a list of events by event ID; what has none is no event."""
    return {i: event for event in part(whole, name, kind=list) if (i := part(event, "event_id"))}


async def accept(room: Room, invited: JSON) -> None:
    """Join the room, or reject the invitation of one who is no inviter."""
    client, inviter = room.client, ""
    room.failing_since = NEVER
    for event in part(invited, "invite_state", "events", kind=list):
        if part(event, "state_key") == client.user_id:
            inviter = part(event, "sender")  # The bot's own homeserver puts the true one last.
    is_welcome = any(fnmatchcase(inviter, pattern) for pattern in client.inviters)
    async with client.join_slots:
        if is_welcome:
            result = await retry(lambda: client.join(room.id), f"joining {room.id}", room)
        else:
            result = await retry(lambda: client.room_leave(room.id), f"leaving {room.id}", room)
    room.joining = None
    if result is not None:
        log.info("%s %s, invited by %s", "Joined" if is_welcome else "Left", room.id, inviter)
        client.invited.discard(room.id)  # The next one is new.
    if not room.answering and not (is_welcome and result):
        client.state.behind.pop(room.id, None)  # Not joined; no answer_room will do it.


async def retry(request: Callable[[], Any], what: str, room: Room | None = None) -> Any:
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
        if room and gives_up(room, failure):
            log.warning("Gave up on %s: %s", what, failure)
            return None
        if str(failure) != cause:
            cause = str(failure)
            tell = log.info if failure.status == 429 and failure.retry_after else log.warning
            tell("Trouble with %s: %s; trying again", what, cause)
        is_quick = time.monotonic() - began < 5  # Else it was pause enough.
        delay = min(2 * delay, MAX_DELAY) if is_quick else 0.25
        await asyncio.sleep(failure.retry_after + delay * random.uniform(0.5, 1))
    if room:
        room.failing_since = NEVER
    if cause:
        log.info("No more trouble with %s", what)
    return response


def gives_up(room: Room, failure: "Failure") -> bool:
    """Note a failure; tell if its request is to be dropped."""
    if not failure.status:
        room.may_be_sent = True
    if failure.status in (400, 413, 429):  # It is the message, or has to wait: not the room.
        room.failing_since = NEVER
        return failure.status != 429
    # Once a room has failed for long, each request gets one attempt, until one succeeds.
    room.failing_since = min(room.failing_since, room.client.sync_clock)
    return room.client.sync_clock - room.failing_since >= PATIENCE


class Failure(Exception):
    """A request that failed; its text says why, and quotes no message."""

    status = 0  # of HTTP, if the homeserver itself says no; 429, whoever says it: wait
    retry_after = 0.0  # s, as told


def failure_of(response: aiohttp.ClientResponse, content: Any) -> Failure:
    """Return what an answer that is no success says, in the homeserver's own words."""
    status, headers = response.status, response.headers
    errcode, error = part(content, "errcode"), part(content, "error")
    cause = f"HTTP {status} {errcode} ({error[:200]})" if errcode else f"HTTP {status}"
    if "Location" in headers:
        cause += f", moved to {headers['Location'].partition('/_matrix/')[0]}"
    failure = Failure("".join(c if c.isprintable() else " " for c in cause))
    if errcode and 400 <= status < 500:  # A proxy's "no" has none, and may pass.
        failure.status = status
    if status == 429 or errcode in BLOCKED:
        failure.status = 429
    told, now = headers.get("Retry-After", ""), headers.get("Date", "")
    seconds = max(0.0, min(part(content, "retry_after_ms", kind=int), 10**6)) / 1000
    with suppress(ValueError):
        seconds = seconds or float(told)
    # A date counts by the server's clock: ours may be wrong.
    with suppress(ValueError, TypeError, OverflowError):
        seconds = (parsedate_to_datetime(told) - parsedate_to_datetime(now)).total_seconds()
    failure.retry_after = max(0, min(seconds, 2 * MAX_DELAY))
    return failure


class Client(AsyncClient):
    """nio's client, but each request is made once, and returns JSON or raises Failure."""

    def __init__(self) -> None:
        user = setting("MATRIX_USER", "", rf"(@[!-9;-~]*:{HOST})?", "@bot:example.org")
        self.password, self.given_token = setting("MATRIX_PASSWORD"), setting("MATRIX_ACCESS_TOKEN")
        if not user or not (self.password or self.given_token):
            stop(78, "set MATRIX_USER, and MATRIX_PASSWORD or MATRIX_ACCESS_TOKEN; see --help")
        super().__init__("", user)
        form = r"[ ,]*((?=[^ ,]*[:*])[@*?[][^\s,@:]*(:[^\s,@/]*[\w*?\]])?([ ,]+|$))+"
        inviters = setting("MATRIX_INVITERS", "*", form, "@me:example.org @*:example.com")
        self.inviters = inviters.replace(",", " ").split()
        self.state = State(Path(setting("STATE_DIRECTORY", ".")), user)
        token = self.given_token or part(self.state.session, "access_token")
        self.restore_login(user, part(self.state.session, "device_id") or "ECHOBOT", token)
        self.known_rooms: dict[str, Room] = {}
        self.invited = set[str]()  # rooms, by the last response: the next may repeat that
        self.told = set[str]()  # rooms that polls of this life have told of
        self.slots, self.join_slots = [asyncio.Semaphore(MAX_BUSY) for _ in range(2)]
        self.hold = 0  # ms, of the next poll
        self.refused_since = NEVER  # s: since when next_batch is refused
        self.sync_clock = 0.0  # s in syncs that succeeded: it stops in an outage, rooms fail by it
        # nio's session has 100 connections: as many sends that hang would stop the poll.
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout()
        self.http = aiohttp.ClientSession(connector=connector, timeout=timeout)

    def room(self, room_id: str) -> Room:
        """Return a room, the same each time."""
        return self.known_rooms.setdefault(room_id, Room(self, room_id))

    def use(self, homeserver: str) -> None:
        """Send requests to a base URL, through the environment's proxy for it."""
        if not (url := re.fullmatch(rf"(https?)://({HOST})(/[^?#\s]*)?", homeserver)):
            stop(78, f"the homeserver of {self.user} has no valid URL: set MATRIX_HOMESERVER")
        self.homeserver, proxies = homeserver.rstrip("/"), getproxies()
        proxy = "" if proxy_bypass(url[2]) else proxies.get(url[1]) or proxies.get("all", "")
        self.proxy = re.sub("^(?!.*://)", "http://", proxy) if proxy else None
        if self.proxy and not re.fullmatch(rf"https?://([^@/?#[\]]*@)?{HOST}/?", self.proxy):
            stop(78, f"{url[1].upper()}_PROXY or ALL_PROXY is not like http://proxy.example:3128")

    async def _send(
        self, response_class: Any, method: str, path: str, data: Any = None, *_: Any, **__: Any
    ) -> JSON:
        """Make one of nio's requests."""
        # nio's URLs have the access token, which logs on the way would keep.
        url, needs_token = re.subn(r"access_token=[^&]*&?", "", self.homeserver + path)
        headers = {"Authorization": f"Bearer {self.access_token}"} if needs_token else {}
        if method != "GET":  # Not every homeserver takes a body of another type, or none.
            data, headers["Content-Type"] = data or "{}", "application/json"
        # Redirected, a POST would become a GET, and the token would get lost.
        redirects, proxy = "/.well-known/" in url, self.proxy
        request = self.http.request(
            method, url, data=data, headers=headers, proxy=proxy, allow_redirects=redirects
        )
        try:
            async with request as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, UnicodeError) as error:
            text = str(error) if isinstance(error, OSError) else ""  # Others may quote a password.
            text = text or f"{type(error).__name__} {getattr(error, 'status', '')}"
            raise Failure(text.strip()) from None
        content: Any = None
        with suppress(ValueError, RecursionError):  # It is no JSON.
            content = json.loads(body.decode("utf-8-sig", errors="replace"))
        key = REQUIRED.get(response_class.__name__.removesuffix("Response"), "")
        if response.status == 200 and isinstance(content, dict):
            is_page = key == "chunk" and key in content  # It may be empty, or null.
            if not key or part(content, key) or is_page:
                return content
        raise failure_of(response, content)


async def discover(client: Client) -> str:
    """Return the base URL that the user's server publishes (spec: "Well-known URI")."""
    name, last = client.user.partition(":")[2], part(client.state.session, "homeserver")
    client.use("https://" + re.sub(r":\d+$", "", name))
    try:
        async with asyncio.timeout(20 if last else None):
            return str(part(await client.discovery_info(), "m.homeserver", "base_url") or last)
    except (Failure, TimeoutError) as failure:
        if not last and not str(failure).startswith("HTTP 404"):
            raise
        return str(last or f"https://{name}")  # It may be 404 for a moment.


async def log_in(client: Client) -> None:
    """Log in, on the same device as before, or end the process if that is refused."""
    token = client.given_token
    try:
        found: Any = await (client.whoami() if token else client.login(client.password))
    except Failure as failure:
        if failure.status in (0, 429):
            raise
        secret = "MATRIX_ACCESS_TOKEN" if token else "MATRIX_PASSWORD"
        why = f"{client.homeserver} refuses {client.user}: {failure}"
        stop(77, f"{why}; check MATRIX_USER and {secret}, and MATRIX_HOMESERVER")
    if (user_id := part(found, "user_id")) != client.user:
        stop(78, f"the login is of {user_id}: set MATRIX_USER to that")
    device = part(found, "device_id") or str(client.device_id)
    new_token = found.get("access_token", "")  # One that was given is not saved.
    client.restore_login(client.user, device, token or new_token)
    client.state.save_session(user_id=client.user, device_id=device, access_token=new_token)


class State:
    """The state directory, with next_batch and session.json."""

    def __init__(self, directory: Path, user: str) -> None:
        self.directory, self.unsaved = directory, set[str]()  # names of files
        try:
            paths = [directory / name for name in ("next_batch", "session.json", "echobot.lock")]
            for path in paths:
                path.touch(0o600)
            self.descriptor = os.open(directory, os.O_RDONLY)
            self.lock = paths[2].open("a")  # until the process ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # The latter is SMB's.
                stop(75, f"another copy is running on {directory}: stop it first")
            except OSError as error:  # Not every file system has locks.
                log.warning("Can't lock %s (%s): start no other copy", directory, error.strerror)
            text, session = [path.read_text(errors="replace") for path in paths[:2]]
        except OSError as error:
            stop(78, f"can't use {directory} ({error.strerror}): set another STATE_DIRECTORY")
        self.session: JSON = {}
        with suppress(ValueError):
            self.session = part(json.loads(session), kind=dict)
        owner = part(self.session, "user_id")
        if owner not in ("", user):
            log.warning("Not using the state of %s", owner)
            text, self.session = "", {}
        self.next_batch = text.partition("\n")[0].strip()
        if self.session and not self.next_batch:
            log.error("next_batch is missing or empty: starting from now")
        # By room ID, where what it owes begins; "" is the bot's invitation, or its last reply.
        self.behind = dict(re.findall(r"(?m)^(!\S+) ?(\S*)", text))

    def save_session(self, **changes: Any) -> None:
        """Change session.json."""
        if not self.session:  # Or another user's position would seem to be ours.
            self.save("next_batch", self.positions())
        self.session |= changes
        self.save("session.json", json.dumps(self.session))

    def positions(self) -> str:
        """Return the text of next_batch."""
        return "\n".join([self.next_batch, *map(" ".join, self.behind.items())])

    def save(self, name: str, text: str) -> None:
        """Replace a file atomically, or say once that it can't be done."""
        temporary = self.directory / f"{name}.tmp"
        try:
            temporary.touch(0o600)
            with temporary.open("w", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.directory / name)
            self.unsaved.discard(name)
        except OSError as error:
            if name not in self.unsaved:
                log.error("Can't save %s: %s; answering goes on", name, error.strerror)
            self.unsaved.add(name)
        with suppress(OSError):  # Not every file system can.
            os.fsync(self.descriptor)


def part(whole: Any, *path: str, kind: type = str) -> Any:
    """Return a part of untrusted JSON, empty if it is missing or of another kind."""
    for name in path:
        whole = whole.get(name) if isinstance(whole, dict) else None
    return whole if isinstance(whole, kind) else kind()


def notify(state: str) -> None:
    """Tell systemd the state of the service, if it asked (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.setblocking(False)  # Nobody may read it.
            unix.sendto(state.encode(), re.sub("^@", "\0", address))


if __name__ == "__main__":
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(Path(__file__).read_text().split('"""')[1])  # __doc__ is None under -OO.
    elif sys.argv[1:]:
        stop(2, "takes no arguments but --help; settings are environment variables")
    else:
        loop = asyncio.new_event_loop()
        running = loop.create_task(crash_on_bug(main()))
        while not running.done():
            with suppress(SystemExit, KeyboardInterrupt):  # of a task of reply_to's own
                loop.run_until_complete(running)
