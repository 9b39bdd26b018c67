"""The function to rewrite: it may be slow, silent or broken, and other rooms go on."""

import asyncio
import random
import re

from aiohttp import web
from support.bot import Bot, fork, together
from support.people import People, Room
from support.proxy import MESSAGES, Proxy, served
from support.scripted import field_of

NAME = "localhost"

SLOW = """
async def reply_to(event: RoomMessageText) -> str | None:
    if event.body == "slow":
        await asyncio.sleep(5)
    return event.body.upper()
"""

BROKEN = """
async def reply_to(event: RoomMessageText) -> str | None:
    match event.body:
        case "secret":
            raise ValueError(f"can't cope with {event.body}")
        case "cancel":
            asyncio.current_task().cancel()
            await asyncio.sleep(1)
        case "usage":
            sys.exit(2)
        case "GeneratorExit" | "KeyboardInterrupt" | "SystemExit" | "StopAsyncIteration":
            raise getattr(__builtins__, event.body)
        case "CancelledError":
            raise asyncio.CancelledError
        case "own":
            raise type("Own", (BaseException,), {"__str__": None})
        case "secrets":
            raise BaseExceptionGroup(event.body, [KeyboardInterrupt(), ValueError(event.body)])
        case "Failure":
            raise Failure("as if a request had failed")
        case "TimeoutError":
            raise TimeoutError
        case "recursion":
            return await reply_to(event)
        case "number":
            return 42
        case "fine":
            return "FINE"
"""
# What each of its failures has in the log.
FAILURES = {
    **dict.fromkeys(["GeneratorExit", "KeyboardInterrupt", "SystemExit", "StopAsyncIteration"]),
    **dict.fromkeys(["CancelledError", "Failure", "TimeoutError"]),
    "secret": "ValueError",
    "cancel": "CancelledError",
    "usage": "SystemExit",
    "own": "Own",
    "secrets": "BaseExceptionGroup",
    "recursion": "RecursionError",
}

# A text is blocked for ever: as a thread, as one that does not wait for it would be, or never ends.
BLOCKING = """
async def reply_to(event: RoomMessageText) -> str | None:
    import threading
    if event.body == "thread":
        await asyncio.to_thread(threading.Event().wait)
    if event.body == "threads":
        waits = [asyncio.to_thread(threading.Event().wait) for _ in range(1100)]
        await asyncio.gather(*waits)
    if event.body == "executor":
        await asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
    if event.body == "never":
        await asyncio.Event().wait()
    return event.body.upper()
"""

# What it answers, by what it is asked.
CONTENTS = """
async def reply_to(event: RoomMessageText) -> str | JSON | None:
    rich = {"format": "org.matrix.custom.html", "formatted_body": "<b>5</b>"}
    circle = {}
    circle["circle"] = circle
    contents = {
        "notice": {"msgtype": "m.notice", "body": "5", **rich},
        "ping": {"msgtype": "m.text", "body": "@alice", "m.mentions": {"user_ids": ["@alice:x"]}},
        "relation": {"msgtype": "m.text", "body": "6", "m.relates_to": {"rel_type": "own"}},
        "surrogate": {"msgtype": "m.text", "body": "7", "deep": [{"k\\udc80": "\\ud83d"}]},
        "set": {"msgtype": "m.text", "body": {1, 2}},
        "circle": circle,
        "bytes": {b"msgtype": b"m.text"},
        "float": {"msgtype": "m.text", "body": "8", "half": 0.5},
        "nan": {"msgtype": "m.text", "body": "9", "half": float("nan")},
        "huge": {"msgtype": "m.text", "body": "x" * 70_000},
        "list": ["m.text"],
        "number": 42,
        "silence": None,
        "empty": "",
        "room": event.source["room_id"],
        "who": f"{event.sender} {event.event_id}",
        "html": f"{event.format} {event.formatted_body}",
    }
    return contents[event.body]
"""

# The two that people write first: one asks a server, the other answers with formatted text.
WEATHER = """
async def reply_to(event: RoomMessageText) -> str | None:
    if not event.body.startswith("!weather "):
        return None
    place = event.body.removeprefix("!weather ")
    async with aiohttp.ClientSession() as http:
        async with http.get("{url}", params={{"place": place}}) as response:
            response.raise_for_status()
            return (await response.json())["sky"]
"""
BOLD = """
async def reply_to(event: RoomMessageText) -> JSON | None:
    import html
    if not event.body.startswith("!bold "):
        return None
    text = event.body.removeprefix("!bold ")
    bold = f"<b>{html.escape(text)}</b>"
    style = {"format": "org.matrix.custom.html", "formatted_body": bold}
    return {"msgtype": "m.notice", "body": text, **style}
"""

SECRETARY = """
async def reply_to(event: RoomMessageText) -> str | None:
    await asyncio.sleep(random.uniform(0, 0.1))
    mentions = event.source["content"].get("m.mentions")
    if not isinstance(mentions, dict) or BOT not in mentions.get("user_ids", []):
        return None
    return f"{event.body} is number {random.randint(1, 10**6)}"
"""


async def test_slow_reply_to_holds_up_no_other_room(people: People, bot: Bot) -> None:
    """While it works on one room's message, another room is answered; order stays in the first."""
    slow, quick = [await people.room() for _ in range(2)]
    bot.script = fork(bot.directory, SLOW)
    await bot.run()
    await slow.say("slow", "behind it")
    await quick.say(*[f"quick {n}" for n in range(5)])
    assert await quick.replies(5) == [f"QUICK {n}" for n in range(5)]
    assert await slow.bodies() == []
    assert await slow.replies(2) == ["SLOW", "BEHIND IT"]


async def test_bug_in_reply_to_costs_one_reply(room: Room, bot: Bot) -> None:
    """Whatever it raises or returns is logged with event ID and traceback, without the message."""
    bot.script = fork(bot.directory, BROKEN)
    await bot.run()
    failed = {await room.say(body): name or body for body, name in FAILURES.items()}
    number = await room.say("number")
    await room.say("quiet", "fine")
    assert await room.replies(1) == ["FINE"]
    for event_id, name in failed.items():
        # From the line with its ID on, up to the next line with a time: a traceback, and its name.
        told = bot.log.partition(event_id)[2].partition(" ERROR ")[0].partition(" INFO ")[0]
        assert re.search(r"line \d+, in reply_to", told), f"no traceback for {name}: {told}"
        assert re.search(rf"(?m)\b{name}\b", told), f"{name} is not told: {told}"
    assert number in bot.log
    line = 1 + bot.script.read_text().splitlines().index(BROKEN.splitlines()[4])
    assert re.search(rf"\b{line}\b.*reply_to", bot.log), "no traceback down to that line"
    assert "secret" not in bot.log
    assert bot.running
    assert await bot.stop() == 0


async def test_reply_to_that_blocks_costs_what_it_blocks() -> None:
    """Six rooms or forty, in threads or not: others go on, names resolve, positions are saved.

    After ten minutes it costs the one reply, and its room goes on too.
    """

    async def costs_only_itself(body: str, count: int) -> None:
        async with field_of(speed=60) as field:
            blocked, good = [field.server.room() for _ in range(count)], field.server.room()
            field.bot.script = fork(field.bot.directory, BLOCKING)
            # By its name: each new connection asks for its address.
            field.bot.environment["MATRIX_HOMESERVER"] = field.proxy.url.replace("127.0.0.1", NAME)
            await field.bot.run()
            began = field.now()
            for room in blocked:
                room.say(body, "behind it")
            for n in range(5):
                before = field.bot.next_batch
                good.say(f"good {n}")
                await good.answers(*(f"GOOD {m}" for m in range(n + 1)), seconds=5)
                await field.bot.saves(other_than=before, seconds=5)
            assert field.now() - began < 590
            assert not any(room.replies for room in blocked)
            await together(*(room.answers("BEHIND IT") for room in blocked))
            assert 590 < field.now() - began < 900
            assert field.bot.log.count("Passed over") == count
            assert "Cannot connect" not in field.bot.log
            assert await field.bot.stop() == 0

    kinds = [("thread", 6), ("thread", 40), ("threads", 1), ("executor", 40), ("never", 40)]
    await together(*(costs_only_itself(*kind) for kind in kinds))


async def test_reply_to_gets_the_event_and_its_room(
    room: Room, proxied_bot: Bot, proxy: Proxy
) -> None:
    """Its room ID, which sync responses leave out, formatted text; also when it is read back."""
    bot = proxied_bot
    bot.script = fork(bot.directory, CONTENTS)
    proxy.timeline_limit = 1
    await bot.run()
    formatted = {"format": "org.matrix.custom.html", "formatted_body": "<i>who</i>"}
    expected = []
    for _ in range(2):
        await room.say("room")
        asked = await room.say("who")
        await room.say("html", **formatted)
        expected += [room.room_id, f"{room.user.user_id} {asked}", " ".join(formatted.values())]
        await bot.start() if not bot.running else None
        assert await room.replies(len(expected)) == expected
        await bot.stop()
    assert proxy.count(MESSAGES)


async def test_content_is_sent_as_it_is(room: Room, bot: Bot) -> None:
    """It only gets what is not in it: no mentions, the thread, and the ID of what it answers."""
    bot.script = fork(bot.directory, CONTENTS)
    await bot.run()
    root = await room.say("silence")
    thread = {"m.relates_to": {"rel_type": "m.thread", "event_id": root}}
    asked = [await room.say("notice"), await room.say("ping")]
    asked += [await room.say("notice", **thread), await room.say("relation", **thread)]
    await room.replies(4)
    notice, ping, threaded, related = [event["content"] for event in await room.events()]
    answers = [content.pop("echobot.answers") for content in (notice, ping, threaded, related)]
    assert answers == asked
    style = {"format": "org.matrix.custom.html", "formatted_body": "<b>5</b>"}
    assert notice == {"msgtype": "m.notice", "body": "5", **style, "m.mentions": {}}
    assert ping["m.mentions"] == {"user_ids": ["@alice:x"]}
    relation = threaded.pop("m.relates_to")
    assert threaded == notice
    assert (relation["rel_type"], relation["event_id"]) == ("m.thread", root)
    assert related["m.relates_to"] == {"rel_type": "own"}


async def test_content_that_cannot_be_sent_costs_one_reply(room: Room, bot: Bot) -> None:
    """It is no JSON, or none that the homeserver takes: that is told once, and the room goes on."""
    bot.script = fork(bot.directory, CONTENTS)
    await bot.run()
    bodies = ["set", "circle", "bytes", "float", "nan", "huge", "list", "number"]
    failed = [await room.say(body) for body in bodies]
    await room.say("empty", "surrogate", "room")
    # Half a character is replaced, wherever it is.
    assert await room.replies(2) == ["7", room.room_id]
    for body, event_id in zip(bodies, failed, strict=True):
        told = [s for s in bot.log.splitlines() if event_id in s and "rouble" not in s]
        assert len(told) == 1, (body, told)
        assert re.search("ERROR Passed over|WARNING Gave up on", told[0])
    assert bot.running


async def test_fork_that_asks_a_server_waits_for_it(people: People, bot: Bot) -> None:
    """While one answer takes long, other rooms get theirs; one that fails costs one reply."""
    come = asyncio.Event()

    async def sky(request: web.Request) -> web.Response:
        match request.query["place"]:
            case "Reykjavik":
                await come.wait()
            case "Atlantis":
                return web.Response(status=404)
        return web.json_response({"sky": f"{request.query['place']}: clear & cold"})

    async with served(sky) as url:
        bot.script = fork(bot.directory, WEATHER.format(url=url))
        await bot.run()
        slow, quick = [await people.room() for _ in range(2)]
        await slow.say("!weather Reykjavik", "!weather Rome")
        await quick.say("!weather Atlantis", "!weather São Tomé", "fine today")
        assert await quick.replies(1) == ["São Tomé: clear & cold"]
        assert await slow.bodies() == []
        come.set()
        expected = ["Reykjavik: clear & cold", "Rome: clear & cold"]
        assert await slow.replies(2) == expected
        await bot.kill()
    assert bot.log.count("Passed over") == 1
    assert "ClientResponseError" in bot.log


async def test_fork_answers_with_formatted_text(room: Room, bot: Bot) -> None:
    """Killed after each reply, it sends none again."""
    bot.script = fork(bot.directory, BOLD)
    await bot.run()
    texts = ["a < b", "<script>", "ü & \N{HONEYBEE}"]
    for n, text in enumerate(texts, 1):
        await room.say(f"!bold {text}")
        assert await room.replies(n) == texts[:n]
        await bot.kill()
        await bot.start()
    formatted = [event["content"]["formatted_body"] for event in await room.events()]
    assert formatted == ["<b>a &lt; b</b>", "<b>&lt;script&gt;</b>", "<b>ü &amp; \N{HONEYBEE}</b>"]
    assert {event["content"]["msgtype"] for event in await room.events()} == {"m.notice"}


async def test_fork_answers_mentions_in_their_threads_once(people: People, bot: Bot) -> None:
    """Slow, silent to most and with random replies, and killed meanwhile, it doubles none."""
    bot.script = fork(bot.directory, SECRETARY.replace("BOT", repr(people.bot_id)))
    await bot.run()
    mention = {"m.mentions": {"user_ids": [people.bot_id]}}

    async def talk(room: Room) -> None:
        roots = [await room.say(f"topic {n}") for n in range(4)]
        for n in range(30):
            thread = {"m.relates_to": {"rel_type": "m.thread", "event_id": roots[n % 4]}}
            await room.say(f"chat {n}", **thread)
            await room.say(f"task {n}", **thread, **mention)
        replies = await room.replies(30)
        assert [reply.partition(" is ")[0] for reply in replies] == [f"task {n}" for n in range(30)]
        threads = [event["content"]["m.relates_to"]["event_id"] for event in await room.events()]
        assert threads == [roots[n % 4] for n in range(30)]

    async def kill() -> None:
        for _ in range(3):
            await asyncio.sleep(random.uniform(0.2, 1))
            await bot.kill()
            await bot.start()

    await together(kill(), *[talk(await people.room()) for _ in range(2)])
