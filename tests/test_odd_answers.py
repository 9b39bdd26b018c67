"""No event and no answer that nio can't parse stops the bot, or costs any other command.

ECHOBOT_EXAMPLES=500 tries so many new contents and answers instead of the same few.
"""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial, reduce
from typing import Any

import pytest
import support.proxy as faults
from hypothesis import example, given
from hypothesis import strategies as st
from support.homeserver import Homeserver, MatrixError
from support.scene import SECRET, Scene, new_scene, tries

ODD: list[Any] = [None, True, 5, -1.5, "text", [], {}, [None], [{}]]
ODD += [{"events": [{}]}, {"state": [SECRET]}]


def each(names: str, **others: Any) -> list[dict[str, Any]]:
    """Return objects in which each of these fields has each odd value, or is left out (...)."""
    return [{**others, name: odd} for name in names.split() for odd in (*ODD, ...)]


# Events with what is here in place of their own fields.
FIELDS = {
    "m.room.message": "body msgtype m.relates_to",
    "m.room.encrypted": "algorithm ciphertext",
    "m.room.member": "membership",
    "m.call.invite": "version",
}
ODD_EVENTS: list[Any] = [
    *ODD,
    *each("type sender origin_server_ts state_key unsigned"),
    *each("event_id", content={"body": "!replybot odd", "msgtype": "m.text"}),
    *each("state_key", type="m.room.member", content=None),
    *each("content", unsigned={"redacted_because": None}),
    *({"unsigned": odd} for odd in each("membership redacted_because transaction_id")),
]
for kind, names in FIELDS.items():
    for content in (*ODD, *each(names, body="!replybot", msgtype="m.text")):
        ODD_EVENTS.append({"type": kind, "content": content})

# What is in messages that Synapse takes, in place of an ordinary body or beside it.
RELATED = [*ODD, "m.replace", *each("rel_type"), *each("event_id", rel_type="m.thread")]
RELATED += [
    {"rel_type": kind, "event_id": "$event"}
    for kind in ("m.thread", "m.replace", "m.annotation", "m.reference")
]
STRANGE = ["x" * 60_000, "zero\0byte", "\u202eright to left\u2066 and \u200fback"]
STRANGE += ["\U0001f600 \ufffd \u2028 \x7f"]
ODD_CONTENTS: list[dict[str, Any]] = [
    *({"m.relates_to": odd} for odd in RELATED),
    *({"body": f"!replybot {SECRET} {text}"} for text in STRANGE),
    *each("body msgtype"),
    {"unknown": [[[[[[[[[[[[[[[[{"a": {"b": {"c": {"d": {}}}}}]]]]]]]]]]]]]]]]},
    *({"body": ""}, {"msgtype": ""}, {"msgtype": "m.unknown"}, {"body": "x" * 64_000}),
]

# Parts of a sync answer beside the commands in it; "*" stands for each room with commands. nio has
# other rules for room IDs without a server name, which those of version 12 are.
WIDE = (
    "account_data presence to_device device_lists device_one_time_keys_count unknown rooms/leave"
    " rooms/invite rooms/knock rooms/join/!d rooms/join/!d:e"
)
DEEP = (
    "account_data/events presence/events to_device/events rooms/leave/!a rooms/leave/!c:d"
    " rooms/invite/!a rooms/invite/!b:c rooms/invite/!e/invite_state/events rooms/join/!d/timeline"
    " rooms/join/!e:f/timeline rooms/join/!g/timeline/events rooms/join/!h:i/timeline/events"
    " rooms/join/*/summary rooms/join/*/state rooms/join/*/ephemeral rooms/join/*/account_data"
    " rooms/join/*/unread_notifications rooms/join/*/unread_thread_notifications"
    " rooms/join/*/timeline/prev_batch rooms/join/*/timeline/limited"
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT
NAMES = "events content type sender unsigned state_key body msgtype m.relates_to event_id rel_type"
KEYS = st.sampled_from(NAMES.split()) | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=6
)
ODD_EVENT = st.sampled_from(ODD_EVENTS) | JSON | st.dictionaries(KEYS, JSON)
ODD_PART = JSON | st.fixed_dictionaries({"events": JSON}) | st.dictionaries(KEYS, JSON)
CHANGE = st.tuples(st.sampled_from(f"{WIDE} {DEEP}".split()), ODD_PART)
CONTENT = st.sampled_from(ODD_CONTENTS) | st.fixed_dictionaries(
    {
        "body": TEXT.map(f"!replybot {SECRET} ".__add__) | TEXT,
        "msgtype": st.sampled_from(["m.text", "m.text", "m.text", "m.notice", "m.image", ""]),
    },
    optional={
        "m.relates_to": st.sampled_from(RELATED) | JSON,
        **dict.fromkeys(["formatted_body", "format", "m.new_content", "m.mentions", "url"], JSON),
    },
)


def examples(*cases: dict[str, Any]) -> Callable[[Any], Any]:
    """Have a test try these cases before those that chance brings."""
    return lambda test: reduce(lambda tried, case: example(**case)(tried), reversed(cases), test)


def complete(whole: Any) -> Any:
    """Return a copy of JSON without the fields that are to be left out."""
    if not isinstance(whole, dict):
        return whole
    return {name: complete(value) for name, value in whole.items() if value is not ...}


def put(part: Any, path: str, value: Any) -> None:
    """Put a value into an answer, at a path whose parts are made if they are not there."""
    name, _, rest = path.partition("/")
    if isinstance(part, dict) and rest:
        put(part.setdefault(name, {}), rest, value)
    elif isinstance(part, dict):
        part[name] = complete(value)


def with_odd(odd_events: list[Any], events: list[Any]) -> list[Any]:
    """Return events after odd ones; those that are objects are like the first, but no command."""
    odd_events = odd_events if events else []
    like = {**events[0], "content": {"body": "odd", "msgtype": "m.text"}} if events else {}
    return [
        complete({**like, "event_id": f"$odd{n}", **odd}) if isinstance(odd, dict) else odd
        for n, odd in enumerate(odd_events)
    ] + events


def spoilt(answer: Any, changes: list[Any], events: list[Any], is_limited: bool) -> Any:
    """Return a sync answer with changes and odd events, if it has messages."""
    for room_id, room in list(answer.get("rooms", {}).get("join", {}).items()):
        if messages := room.get("timeline", {}).get("events"):
            room["timeline"]["events"] = with_odd(events, messages)
            for path, value in changes:
                put(answer, path.replace("*", room_id), value)
            if is_limited:
                room["timeline"]["limited"] = True
    return answer


@pytest.fixture
async def scene(homeserver: Homeserver) -> AsyncIterator[Scene]:
    """A scene whose bot was never started, but will answer what is said from now on."""
    async with new_scene(homeserver, speed=10, LOG_LEVEL="DEBUG") as new:
        position = (await new.people.account.request("GET", "/sync"))["next_batch"]
        (new.bot.state / "next_batch").write_text(position)
        yield new


@pytest.mark.long
@tries(few=8)
@given(changes=st.lists(CHANGE, max_size=8), events=st.lists(ODD_EVENT), is_limited=st.booleans())
@examples(
    {"changes": [], "events": ODD_EVENTS, "is_limited": False},
    {"changes": [], "events": ODD_EVENTS, "is_limited": True},
    *(
        {"changes": [(path, odd) for path in paths.split()], "events": [], "is_limited": False}
        for paths in (WIDE, DEEP)
        for odd in ODD
    ),
)
async def test_odd_answers_cost_no_command(
    scene: Scene, changes: list[Any], events: list[Any], is_limited: bool
) -> None:
    """With every sync answer and every page spoilt, all commands are answered once and in order."""

    def spoil_page(page: Any) -> Any:
        chunk = with_odd(events, page["chunk"])
        return {"end": None, **page, "chunk": chunk, "state": None, "unknown": None}

    spoil = partial(spoilt, changes=changes, events=events, is_limited=is_limited)
    with (
        scene.proxy.inject(faults.rewrite(spoil), faults.POLL) as polls,
        scene.proxy.inject(faults.rewrite(spoil_page), faults.MESSAGES) as pages,
    ):
        await scene.start()
        await scene.rooms[0].say("this ends the poll before")
        await polls.happens()
        await scene.say_everywhere(2)
        await scene.check()
        assert pages.happened or not is_limited


async def test_answers_without_rooms_or_position(scene: Scene) -> None:
    """They cost no command, and what has no position is asked for again, but not in a hurry."""
    odd_rooms: Iterator[Any] = iter([None, [], {"join": None}, {"join": []}])
    useless: Iterator[Any] = iter([None, [], {}, {"next_batch": None}])
    spoil = faults.rewrite(lambda answer: {**answer, "rooms": next(odd_rooms)})
    with (
        scene.proxy.inject(spoil, faults.POLL, times=4),
        scene.proxy.inject(faults.rewrite(lambda _: next(useless)), faults.POLL, times=4) as again,
    ):
        await scene.start()
        for polls in range(2, 6):
            await scene.rooms[0].say("this ends the poll")
            await scene.proxy.counts(faults.POLL, polls)
        await scene.say_everywhere(3)
        started = time.monotonic()
        await scene.check()
        assert (time.monotonic() - started) * scene.bot.speed > 1.5
        assert again.happened == 4


@tries(few=15)
@given(contents=st.lists(CONTENT, min_size=6, max_size=10))
@example(
    contents=[
        {"body": f"!replybot {SECRET} {n}", "msgtype": "m.text", **odd}
        for n, odd in enumerate(ODD_CONTENTS)
    ]
)
async def test_any_content(scene: Scene, contents: list[dict[str, Any]]) -> None:
    """Of whatever Synapse takes as content, commands are answered, once and in order."""
    room = scene.rooms[0]
    await scene.start()
    event_id = await room.say("not a command")
    for content in map(complete, contents):
        content = json.loads(json.dumps(content).replace("$event", event_id))
        relation = content.get("m.relates_to")
        # What Synapse refuses never reaches the bot.
        with suppress(MatrixError):
            await scene.people.alice.send_event(room.room_id, "m.room.message", content)
            is_edit = isinstance(relation, dict) and relation.get("rel_type") == "m.replace"
            is_command = content.get("msgtype") == "m.text" and not is_edit
            if is_command and str(content.get("body")).startswith("!replybot"):
                scene.expect(room, content["body"].replace("!replybot", "").strip())
    await scene.say_everywhere(1)
    await scene.check()
    assert "ERROR" not in scene.bot.log
