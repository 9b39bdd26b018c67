"""No event and no answer that nio can't parse stops the bot, or costs any other command.

ECHOBOT_EXAMPLES=500 tries so many new contents and answers instead of the same few.
"""

import copy
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import support.proxy as faults
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.homeserver import Homeserver, MatrixError
from support.scene import SECRET, Scene, new_scene

EXAMPLES = int(os.environ.get("ECHOBOT_EXAMPLES", "0"))

Change = tuple[str, Any]


def each(name: str, *values: Any) -> list[dict[str, Any]]:
    """Return objects with a field of that name, one for each value."""
    return [{name: value} for value in values]


# Events with what is here in place of their own fields; an ellipsis leaves the field out.
ODD_EVENTS: list[Any] = [
    *(None, True, 5, "text", [], {}, [{}]),
    *each("origin_server_ts", None, "1", -1, 1.5, ...),
    *each("sender", None, 5, [], "nobody", ...),
    *each("event_id", None, 5, {}, ...),
    *each("type", None, 5, ["m.room.message"], ...),
    *each("content", None, 5, [], "text", {}, {"body": "!replybot"}, {"msgtype": "m.text"}, ...),
    *each(
        "content", *({"msgtype": "m.text", **odd} for odd in each("body", None, 5, True, [], {}))
    ),
    *each("content", *({"body": "!replybot", **odd} for odd in each("msgtype", None, 5, [], {}))),
    *each("unsigned", None, 5, [], "redacted_because", {"transaction_id": 5}),
    {"unsigned": {"redacted_because": None}, "content": ...},
    {"type": "m.room.encrypted", "content": ...},
    {"type": "m.room.encrypted", "content": {"algorithm": 5, "sender_key": None}},
    {"type": "m.room.member", "state_key": None, "content": None},
    {"type": "m.call.invite", "content": {"version": {}}},
]

# Commands all the same, with what is here in place of their own content.
ODD_COMMANDS: list[dict[str, Any]] = [
    *each("m.relates_to", None, 5, [], {}, "m.replace"),
    *each("m.relates_to", *each("rel_type", None, 5, [], {}, "")),
    *each("m.relates_to", *({"rel_type": "m.thread", **o} for o in each("event_id", None, 5, {}))),
    {"unknown": [[[[[[[[[[[[[[[[{"a": {"b": {"c": {"d": {}}}}}]]]]]]]]]]]]]]]]},
    {"body": "!replybot " + "x" * 60_000},
    {"body": "!replybot zero\0byte"},
    {"body": "!replybot \u202eright to left\u2066 and \u200fback"},
    {"body": "!replybot \U0001f600 \ufffd \u2028 \x7f"},
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
ODD_VALUES: list[Any] = [None, [], {}, 5, "text", [None], {"events": [{}]}, {"state": [SECRET]}]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT
KEYS = TEXT | st.sampled_from(["events", "content", "type", "sender", "unsigned", "state_key"])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=6
)


def any_of(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for objects with some of these fields, some of them of any type."""
    return st.fixed_dictionaries(
        {}, optional={name: value | JSON for name, value in fields.items()}
    )


EVENT_IDS = st.just("$event") | TEXT
REL_TYPES = st.sampled_from(["m.thread", "m.replace", "m.annotation", "m.reference"])
RELATIONS = st.fixed_dictionaries({"rel_type": REL_TYPES, "event_id": st.just("$event")}) | any_of(
    rel_type=REL_TYPES,
    event_id=EVENT_IDS,
    is_falling_back=st.booleans(),
    **{"m.in_reply_to": any_of(event_id=EVENT_IDS)},
)
CONTENTS = st.fixed_dictionaries(
    {
        "body": TEXT.map(f"!replybot {SECRET} ".__add__) | TEXT,
        "msgtype": st.sampled_from(["m.text", "m.text", "m.text", "m.notice", "m.image", ""]),
    },
    optional={
        "m.relates_to": RELATIONS | RELATIONS | JSON,
        "formatted_body": JSON,
        "format": JSON,
        "m.new_content": JSON,
        "m.mentions": JSON,
        "url": JSON,
    },
)
ODD_EVENT = JSON | any_of(
    content=any_of(body=TEXT, msgtype=st.just("m.text"), **{"m.relates_to": RELATIONS}),
    sender=st.just("@carol:echobot.test"),
    type=st.sampled_from(["m.room.message", "m.room.encrypted", "m.room.member"]),
    event_id=EVENT_IDS,
    origin_server_ts=st.integers(),
    unsigned=any_of(membership=JSON, redacted_because=JSON, transaction_id=JSON),
)
ODD_PART = st.one_of(
    JSON,
    st.fixed_dictionaries({"events": JSON}),
    st.fixed_dictionaries({"timeline": any_of(events=JSON, limited=JSON)}),
    st.fixed_dictionaries({"invite_state": any_of(events=st.lists(JSON))}),
)
ODD_CHANGES = st.one_of(
    st.tuples(st.sampled_from(f"{WIDE} {DEEP}".split()), ODD_PART),
    st.tuples(st.just("rooms/join/*/timeline/an event"), ODD_EVENT),
)
BOUNDED = settings(
    max_examples=EXAMPLES or 30,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    # One bot has them all, one after the other.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def put(part: Any, path: str, value: Any) -> None:
    """Put a value into an answer, at a path whose parts are made if they are not there."""
    name, _, rest = path.partition("/")
    if not isinstance(part, dict):
        return
    if rest:
        put(part.setdefault(name, {}), rest, value)
    elif name == "an event":
        part["events"] = with_odd_events(part["events"], [value])
    else:
        part[name] = copy.deepcopy(value)


def with_odd_events(events: list[Any], odd_events: list[Any]) -> list[Any]:
    """Return events with odd ones after the first; those that are objects are like the first."""
    first = copy.deepcopy(events[0])
    first["content"]["body"] = "!replybot odd"
    made = [{**first, "event_id": "$odd", **e} if isinstance(e, dict) else e for e in odd_events]
    for event in made:
        if isinstance(event, dict):
            for name in [name for name, value in event.items() if value is ...]:
                del event[name]
    return [events[0], *made, *events[1:]]


def spoilt(answer: Any, changes: list[Change]) -> Any:
    """Return a sync answer with changes, if it has commands."""
    rooms = answer.get("rooms", {}).get("join", {})
    busy = [room_id for room_id in rooms if rooms[room_id].get("timeline", {}).get("events")]
    if busy:
        for path, value in changes:
            for room_id in busy if "*" in path else [""]:
                put(answer, path.replace("*", room_id), value)
    return answer


@pytest.fixture
async def scene(homeserver: Homeserver) -> AsyncIterator[Scene]:
    """A scene whose bot was never started, but will answer what is said from now on."""
    async with new_scene(homeserver, LOG_LEVEL="DEBUG") as new:
        position = (await new.people.account.request("GET", "/sync"))["next_batch"]
        (new.bot.state / "next_batch").write_text(position)
        yield new


@pytest.mark.parametrize("paths", [WIDE, DEEP], ids=["wide", "deep"])
async def test_odd_answers_cost_no_command(scene: Scene, paths: str) -> None:
    """With every sync answer spoilt, in one way after the other, all in them is answered once."""
    await scene.say_everywhere(2)
    for value in ODD_VALUES:
        print(f"With {value!r} at each of {paths}:")
        spoil = partial(spoilt, changes=[(path, value) for path in paths.split()])
        with scene.proxy.inject(faults.rewrite(spoil), faults.POLL) as odd:
            await scene.start()
            await scene.say_everywhere(1)
            await scene.check()
            assert odd.happened


async def test_null_rooms_stop_nothing(scene: Scene) -> None:
    """A sync answer with a position but no usable rooms is passed over."""
    odd_rooms: list[Any] = [None, [], {"join": None}, {"join": []}]
    for rooms in odd_rooms:
        spoil = partial(lambda odd, answer: {**answer, "rooms": odd}, rooms)
        with scene.proxy.inject(faults.rewrite(spoil), faults.POLL, times=1) as odd:
            await scene.start()
            await scene.rooms[0].say("this ends the poll")
            await odd.happens()
            await scene.say_everywhere(1)
            await scene.check()
        await scene.bot.kill()


async def test_answer_without_position_is_asked_for_again(scene: Scene) -> None:
    """What says nothing of where it ends costs no command, and is no reason to hurry."""
    odd: Iterator[Any] = iter([None, [], {}, {"next_batch": None}])
    await scene.say_everywhere(3)
    with scene.proxy.inject(faults.rewrite(lambda _: next(odd)), faults.POLL, times=4) as useless:
        started = time.monotonic()
        await scene.start()
        await scene.check()
        assert time.monotonic() - started > 1.5
        assert useless.happened == 4


async def test_odd_events_cost_no_other_command(scene: Scene) -> None:
    """Events among commands that nio fails on are passed over."""
    await scene.say_everywhere(3)
    changes = [("rooms/join/*/timeline/an event", event) for event in ODD_EVENTS]
    with scene.proxy.inject(faults.rewrite(partial(spoilt, changes=changes)), faults.POLL) as odd:
        await scene.start()
        await scene.check()
        await scene.say_everywhere(1)
        await scene.check()
        assert odd.happened > 1


async def test_odd_page_costs_no_other_command(scene: Scene) -> None:
    """Pages of a gap with odd events and null fields are read to the end."""
    await scene.say_everywhere(3)

    def spoil(page: Any) -> Any:
        if page["chunk"]:
            page["chunk"] = with_odd_events(page["chunk"], ODD_EVENTS)
        return {"end": None, **page, "state": None, "unknown": None}

    limited = partial(spoilt, changes=[("rooms/join/*/timeline/limited", True)])
    with (
        scene.proxy.inject(faults.rewrite(limited), faults.POLL),
        scene.proxy.inject(faults.rewrite(spoil), faults.MESSAGES) as odd,
    ):
        await scene.start()
        await scene.check()
        await scene.say_everywhere(1)
        await scene.check()
        assert odd.happened >= 4


async def test_odd_contents_are_passed_over_and_odd_commands_answered(scene: Scene) -> None:
    """Odd relations and characters cost no reply; what is no text gets none."""
    await scene.start()
    room = scene.rooms[0]
    for odd in ({"body": ""}, {"msgtype": ""}, {"msgtype": "m.unknown"}, {"body": "x" * 64_000}):
        content = {"body": "!replybot no text", "msgtype": "m.text", **odd}
        await scene.alice.send_event(room.room_id, "m.room.message", content)
    bodies = [content.get("body", f"!replybot {n}") for n, content in enumerate(ODD_COMMANDS)]
    for body, content in zip(bodies, ODD_COMMANDS, strict=True):
        await room.say(body, **{key: value for key, value in content.items() if key != "body"})
    replies = await room.replies(len(bodies))
    assert replies == [body.removeprefix("!replybot ") for body in bodies]
    assert "ERROR" not in scene.bot.log


@BOUNDED
@given(st.lists(CONTENTS, min_size=1, max_size=6))
async def test_any_content(scene: Scene, contents: list[dict[str, Any]]) -> None:
    """Of whatever Synapse takes as content, commands are answered, once and in order."""
    room = scene.rooms[0]
    await scene.start()
    event_id = await room.say("not a command")
    for content in contents:
        relation = content.get("m.relates_to")
        if isinstance(relation, dict) and relation.get("event_id") == "$event":
            relation["event_id"] = event_id
        # What Synapse refuses never reaches the bot.
        with suppress(MatrixError):
            await scene.alice.send_event(room.room_id, "m.room.message", content)
            if is_command(content):
                scene.expect(room, content["body"].replace("!replybot", "").strip())
    await scene.say_everywhere(1)
    await scene.check()


def is_command(content: dict[str, Any]) -> bool:
    """Tell whether a message with this content is to be answered."""
    relation = content.get("m.relates_to")
    is_edit = isinstance(relation, dict) and relation.get("rel_type") == "m.replace"
    is_text = content["msgtype"] == "m.text" and isinstance(content["body"], str)
    return is_text and not is_edit and content["body"].startswith("!replybot")


@BOUNDED
@given(st.lists(ODD_CHANGES, min_size=1, max_size=4))
async def test_any_answer(scene: Scene, changes: list[Change]) -> None:
    """Whatever else is in sync answers, the commands in them are answered, once and in order."""
    with scene.proxy.inject(faults.rewrite(partial(spoilt, changes=changes)), faults.POLL):
        await scene.start()
        await scene.say_everywhere(1)
        await scene.check()
