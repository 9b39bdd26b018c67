"""Measure echobot.py beside the tutorial's loop and beside the floor; README.md tells more."""

import argparse
import asyncio
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import psutil
from aiohttp import web
from matplotlib import rc_context
from matplotlib.figure import Figure
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.bot import ECHOBOT, Bot, eventually, new_bot
from support.homeserver import User, running_homeserver
from support.people import Room, new_people
from support.proxy import POLL, running_proxy, served, silence
from support.scripted import BOT, JSON, SYNAPSE, Scripted, number

HERE = Path(__file__).parent
TUTORIAL, FLOOR = "tutorial's loop", "floor"
REFERENCES = {TUTORIAL: HERE / "tutorial.py", FLOOR: HERE / "floor.py"}
COMMANDS, SOAK = 4_000, 36_000
MANY_ROOMS, GAP, SYNCS = 3_000, 20_000, 3_000
COMPARE = {"=": operator.eq, "≤": operator.le, "≥": operator.ge}
README, MARKER = HERE / "README.md", "<!-- What --write writes stands between two of these. -->\n"
STARTED = time.perf_counter()

Figures = dict[str, float]
Scripts = dict[str, Path]
Sample = Callable[[str], Awaitable[float]]


@dataclass
class Row:
    """A figure for each column, and the target for the bots, or for their ratio to a column."""

    title: str
    figures: Figures
    unit: str
    target: str
    of: str = ""

    def cells(self) -> dict[str, str]:
        """Return the line's cells by the columns' names."""
        base = self.figures.get(self.of, 1)
        cells = {"": self.title}
        for column, figure in self.figures.items():
            number = f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
            ratio = f" ({figure / base:.2f})" if self.of else ""
            cells[column] = f"{number} {self.unit}".rstrip() + ratio
        sign, bound = self.target.split()
        ratios = [self.figures[column] / base for column in bots(self.figures)]
        met = ", ".join("met" if COMPARE[sign](bot, float(bound)) else "not met" for bot in ratios)
        of = f"of the {self.of}" if self.of else self.unit
        cells["target"] = f"{self.target} {of}".rstrip() + f": {met}"
        return cells


def bots(columns: Iterable[str]) -> list[str]:
    """Return the columns that are no references."""
    return [column for column in columns if column not in REFERENCES]


async def medians(scripts: Scripts, rounds: int, sample: Sample) -> Figures:
    """Return the median of each column's samples; in each round all have a turn, in any order."""
    samples: dict[str, list[float]] = {column: [] for column in scripts}
    turn = random.Random(1)
    for _ in range(rounds):
        for column in turn.sample([*samples], len(samples)):
            samples[column].append(await sample(column))
    return {column: statistics.median(each) for column, each in samples.items()}


async def start(stack: AsyncExitStack, script: Path, url: str, user_id: str) -> Bot:
    """Start a bot that runs until the end of the block."""
    bot = await stack.enter_async_context(new_bot(url, MATRIX_USER=user_id))
    bot.script = script
    return await bot.start()


@dataclass
class Chat:
    """A bot on Synapse, in a room with alice, who talks, and with bob, who listens."""

    bot: Bot
    room: Room
    bob: User
    since: str = ""

    async def ask(self, numbers: range) -> None:
        """Send a command for each number, all at once."""
        await asyncio.gather(*(self.room.command(number) for number in numbers))

    async def is_ready(self) -> bool:
        """Tell whether it answers: as it does so in order, nothing older is then under way."""
        with suppress(TimeoutError):
            return await self.echo(0.3) > 0
        return False

    async def echo(self, seconds: float = 60) -> float:
        """Send a command, return the ms until bob's long poll has the reply."""
        text = f"echo {time.perf_counter_ns()}"
        hearing = asyncio.create_task(self.hear(text))
        # So that his poll waits already, and what the bot does after a reply is done.
        await asyncio.sleep(0.02)
        sent_at = time.perf_counter()
        await self.room.command(text)
        return (await asyncio.wait_for(hearing, seconds) - sent_at) * 1000

    async def hear(self, text: str) -> float:
        """Poll as bob until the bot has said it, return when that was."""
        timeline = {"types": ["m.room.message"], "senders": [self.room.bot_id]}
        query = {"timeout": "30000", "filter": json.dumps({"room": {"timeline": timeline}})}
        while True:
            since = {"since": self.since} if self.since else {}
            answer = await self.bob.request("GET", "/sync", **query, **since)
            self.since = answer["next_batch"]
            if f'"{text}"' in json.dumps(answer):
                return time.perf_counter()


async def new_chats(stack: AsyncExitStack, scripts: Scripts) -> dict[str, Chat]:
    """Start Synapse and on it a bot for each column, each in a room of its own."""
    homeserver = await stack.enter_async_context(running_homeserver())
    chats = {}
    for column, script in scripts.items():
        people = await new_people(homeserver)
        bob = await people.user("bob")
        room = await people.room(bob)
        bot = await start(stack, script, homeserver.url, people.bot_id)
        chats[column] = Chat(bot, room, bob)
        await eventually(chats[column].is_ready, what=f"an answer of {script.name}")
    return chats


async def downtime(chat: Chat, numbers: range) -> None:
    """Send commands while the bot is down."""
    await chat.bot.stop()
    await chat.ask(numbers)
    await chat.bot.start()


async def kills(chat: Chat, numbers: range) -> None:
    """Send commands and kill the bot amid them, again and again."""
    for kill in range(10):
        asking = asyncio.create_task(chat.ask(numbers[kill::10]))
        await asyncio.sleep(random.uniform(0, 0.4))
        await chat.bot.kill()
        await asking
        await chat.bot.start()
        await eventually(chat.is_ready)


async def promise(stack: AsyncExitStack, scripts: Scripts) -> list[Row]:
    """What is answered, and what twice, of a burst, after a downtime and over kills."""
    chats = await new_chats(stack, scripts)
    rows = []
    for title, happen, numbers in (
        ("answered of 200 sent in one burst", Chat.ask, range(200)),
        ("answered of 100 sent in a downtime", downtime, range(200, 300)),
        ("answered of 100 sent over 10 kills", kills, range(300, 400)),
    ):
        await asyncio.gather(*(happen(chat, numbers) for chat in chats.values()))
        answered, doubled = Row(title, {}, "", f"= {len(numbers)}"), Row("… doubled", {}, "", "= 0")
        for column, chat in chats.items():
            await eventually(chat.is_ready)
            replies = await chat.room.bodies()
            answered.figures[column] = sum(str(number) in replies for number in numbers)
            doubled.figures[column] = sum(replies.count(str(number)) > 1 for number in numbers)
        rows += [answered, doubled]
    return rows


async def latency(stack: AsyncExitStack, scripts: Scripts) -> list[Row]:
    """From sending a command until a second client's long poll has the reply."""
    chats = await new_chats(stack, scripts)
    figures = await medians(scripts, 200, lambda column: chats[column].echo())
    return [Row("echo latency", figures, "ms", "≤ 1.05", FLOOR)]


async def first_start(stack: AsyncExitStack, scripts: Scripts) -> list[Row]:
    """From the start of the process to its first long poll, in an account with many rooms."""
    homeserver = await stack.enter_async_context(running_homeserver())
    people = await new_people(homeserver)
    for _ in range(200):
        await (await people.room()).say("Some words that were said here long ago")
    read = dict.fromkeys(scripts, 0.0)

    async def sample(column: str) -> float:
        async with running_proxy(homeserver.url) as proxy, AsyncExitStack() as stack:
            poll = stack.enter_context(proxy.inject(silence, POLL))
            started = time.perf_counter()
            await start(stack, scripts[column], proxy.url, people.bot_id)
            await poll.happens()
            read[column] = proxy.bytes_to_bot / 1000
            return time.perf_counter() - started

    return [
        Row("first start in 200 rooms", await medians(scripts, 3, sample), "s", "≤ 1.1", TUTORIAL),
        Row("… bytes read", read, "kB", "≤ 50"),
    ]


class Feeder(Scripted):
    """A homeserver that takes little time: it says so much in so many rooms in each response.

    `every`: of so many messages one is a command.
    """

    def __init__(self, rooms: int = 10, at_once: int = 20, every: int = 1) -> None:
        super().__init__(SYNAPSE)
        self.turns = itertools.cycle([self.room() for _ in range(rooms)])
        self.at_once, self.every, self.unsaid = at_once, every, 0
        self.hanging, self.hung = self.room(), 0  # What is sent there gets no answer.
        self.never = asyncio.Event()
        self.told_at: list[float] = []
        self.replies_at: list[float] = []
        self.pages = 0
        self.connections = set[asyncio.Transport | None]()  # that were opened

    async def run(self, stack: AsyncExitStack, script: Path) -> Self:
        """Start a bot that runs until the end of the block; wait until it has answered one."""
        url = await stack.enter_async_context(served(self.handle))
        self.bot = await start(stack, script, url, BOT)
        self.process = psutil.Process(self.bot.process.pid if self.bot.process else None)
        await eventually(lambda: self.told_at)  # What is said before the first sync is history.
        await self.feed(self.every)
        return self

    async def feed(self, messages: int) -> tuple[float, float]:
        """Say so much; return the s from the first response to the first reply and the last.

        They are infinite if replies are missing after a minute.
        """
        replies = messages // self.every
        await asyncio.sleep(0.005)  # So that what the bot does after a reply is done.
        self.unsaid, self.told_at, self.replies_at, self.pages = messages, [], [], 0
        self.say()
        with suppress(AssertionError):
            await eventually(lambda: len(self.replies_at) >= replies, 60)
        if len(self.replies_at) != replies:
            return math.inf, math.inf
        return self.replies_at[0] - self.told_at[0], self.replies_at[-1] - self.told_at[0]

    async def serve(self, script: Path, messages: int, peak: float) -> tuple[float, float]:
        """Feed a bot of its own; return the s until the last reply, and the most memory so far."""
        async with AsyncExitStack() as stack:
            await self.run(stack, script)
            _, seconds = await self.feed(messages)
            return seconds, max(peak, self.peak)

    def say(self) -> None:
        """Say what the next response has."""
        for n in range(self.unsaid, max(0, self.unsaid - self.at_once), -1):
            next(self.turns).say(f"{'' if n % self.every else '!replybot '}{n}")
        self.unsaid = max(0, self.unsaid - self.at_once)

    async def sync(self, query: Any) -> JSON:
        """Answer a poll, with new messages if there are any left."""
        self.say()
        response = await super().sync(query)
        self.told_at.append(time.perf_counter())
        return response

    def page(self, room: Any, query: JSON) -> JSON:
        """Return a page of messages; what is too old for it is not looked at."""
        start = int(number(query.get("from", f"t{self.position}")))
        to = max(0, start - 2 * int(query["limit"]) * len(self.rooms))
        return super().page(room, {"to": f"t{to}", **query})

    async def answer(self, request: web.Request, path: list[str]) -> JSON:
        """Answer any request; note what the rows are about."""
        self.connections.add(request.transport)
        self.pages += "messages" in path
        if "send" in path:
            if self.hanging.room_id in path:
                self.hung += 1
                await self.never.wait()
            self.replies_at.append(time.perf_counter())
        return await super().answer(request, path)

    @property
    def cpu(self) -> float:
        """The CPU time in s that its bot has used."""
        return sum(self.process.cpu_times()[:2])

    @property
    def memory(self) -> float:
        """The resident memory of its bot in MB."""
        return float(self.process.memory_info().rss / 1e6)

    @property
    def peak(self) -> float:
        """The most that this has been."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024 / 1e6

    async def hang(self) -> None:
        """Send a command to the room that hangs, wait until the bot tries to answer it."""
        self.hanging.command("hello")
        await eventually(lambda: self.hung)

    async def unsaved(self) -> int:
        """Return how many events the saved position is behind, once it is not or stays so."""

        def behind() -> int:
            return self.position - int(number(self.bot.next_batch.partition("\n")[0]))

        with suppress(AssertionError):
            await eventually(lambda: not behind(), 5)
        return behind()


async def feeders(stack: AsyncExitStack, scripts: Scripts) -> dict[str, Feeder]:
    """Start a bot for each column on a scripted homeserver; return these."""
    return {column: await Feeder().run(stack, script) for column, script in scripts.items()}


async def speed(stack: AsyncExitStack, scripts: Scripts) -> list[Row]:
    """How fast it is when the homeserver takes little time, and what that costs."""
    homeservers = await feeders(stack, scripts)
    cpu = dict.fromkeys(scripts, 0.0)

    async def share(column: str) -> float:
        return (await homeservers[column].feed(1))[0] * 1000

    async def throughput(column: str) -> float:
        before = homeservers[column].cpu
        _, seconds = await homeservers[column].feed(COMMANDS // 4)
        cpu[column] += (homeservers[column].cpu - before) / COMMANDS * 1000
        return COMMANDS / 4 / seconds

    return [
        Row("its own share", await medians(scripts, 150, share), "ms", "≤ 0.6", TUTORIAL),
        Row("throughput", await medians(scripts, 4, throughput), "per s", "≥ 2.2", TUTORIAL),
        Row("CPU per message", cpu, "ms", "≤ 0.55", TUTORIAL),
    ]


async def memory(stack: AsyncExitStack, scripts: Scripts) -> list[Row]:
    """Resident memory after the start and some thousand commands, and growth over many more."""
    homeservers = await feeders(stack, scripts)
    started = {column: each.memory for column, each in homeservers.items()}
    for homeserver in homeservers.values():
        await homeserver.feed(COMMANDS)
    loaded = {column: each.memory for column, each in homeservers.items()}
    growth = {}
    for column in bots(scripts):
        for _ in range(COMMANDS, SOAK, COMMANDS):
            await homeservers[column].feed(COMMANDS)
        growth[column] = homeservers[column].memory - loaded[column]
    return [
        Row("memory after the start", started, "MB", "≤ 1.1", TUTORIAL),
        Row(f"… after {COMMANDS:,} commands", loaded, "MB", "≤ 1.1", TUTORIAL),
        Row(f"… growth until {SOAK:,} commands", growth, "MB", "≤ 1"),
    ]


async def many_rooms(stack: AsyncExitStack, scripts: Scripts) -> list[Row]:
    """A command in each of thousands of rooms, all in one response."""
    connections, peaks = dict.fromkeys(scripts, 0.0), dict.fromkeys(scripts, 0.0)

    async def sample(column: str) -> float:
        homeserver = Feeder(MANY_ROOMS, MANY_ROOMS)
        seconds, peaks[column] = await homeserver.serve(scripts[column], MANY_ROOMS, peaks[column])
        connections[column] = max(connections[column], len(homeserver.connections))
        return seconds

    seconds = await medians(scripts, 3, sample)
    return [
        Row(f"{MANY_ROOMS:,} rooms at once", seconds, "s", "≤ 1.5", FLOOR),
        Row("… connections", connections, "", "≤ 512"),
        Row("… memory at most", peaks, "MB", "≤ 1.5", TUTORIAL),
    ]


async def gap(stack: AsyncExitStack, scripts: Scripts) -> list[Row]:
    """Thousands of messages that a timeline leaves out, every hundredth a command."""
    scripts = {column: script for column, script in scripts.items() if column != TUTORIAL}
    peaks, pages = dict.fromkeys(scripts, 0.0), dict.fromkeys(bots(scripts), 0.0)

    async def sample(column: str) -> float:
        # The floor reads no pages: it gets the same in as many responses.
        homeserver = Feeder(10, 100, 100) if column == FLOOR else Feeder(1, GAP, 100)
        seconds, peaks[column] = await homeserver.serve(scripts[column], GAP, peaks[column])
        if column in pages:
            pages[column] = max(pages[column], homeserver.pages)
        return seconds

    seconds = await medians(scripts, 3, sample)
    return [
        Row(f"a gap of {GAP:,} messages", seconds, "s", "≤ 3", FLOOR),
        Row("… memory at most", peaks, "MB", "≤ 80"),
        Row("… requests for pages", pages, "", f"≤ {GAP // 100 + 5}"),
    ]


async def hanging_room(stack: AsyncExitStack, scripts: Scripts) -> list[Row]:
    """Thousands of syncs beside a room in which a send hangs."""
    growth, unsaved = Figures(), Figures()
    for column in bots(scripts):
        homeserver = await Feeder(at_once=1).run(stack, scripts[column])
        await homeserver.feed(SYNCS)
        before = homeserver.memory
        await homeserver.hang()
        await homeserver.feed(SYNCS)
        growth[column] = homeserver.memory - before
        unsaved[column] = await homeserver.unsaved()
    return [
        Row(f"{SYNCS:,} syncs beside a hanging room: growth", growth, "MB", "≤ 1"),
        Row("… events that next_batch is behind", unsaved, "", "≤ 10"),
    ]


ROWS = {
    row.__name__: row
    for row in (promise, latency, speed, memory, many_rooms, gap, hanging_room, first_start)
}


async def measure(scripts: Scripts, chosen: list[str]) -> dict[str, list[Row]]:
    """Measure the chosen rows one after the other."""
    rows = {}
    for name in chosen:
        print(f"{time.perf_counter() - STARTED:4.0f} s  {name}", file=sys.stderr)
        async with AsyncExitStack() as stack:
            rows[name] = await ROWS[name](stack, scripts)
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Draw rows as bars; the same figures give the same file."""
    with rc_context({"svg.hashsalt": "echobot", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 1.2 * len(rows)), layout="constrained")
        for axes, row in zip(figure.subplots(len(rows)), rows, strict=True):
            axes.bar_label(axes.barh([*row.figures], [*row.figures.values()]), padding=3)
            axes.set_title(row.title, loc="left")
            axes.invert_yaxis()
        figure.savefig(path, metadata={"Date": None})


def environment() -> str:
    """Return the machine and the versions that the figures are of."""
    packages = ("matrix-nio", "aiohttp", "matrix-synapse")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    return f"{platform.system()}, {machine}, {versions}; {time.perf_counter() - STARTED:.0f} s."


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--bot", type=Path, action="append", help="a bot to measure, once more for another one")
    add("--only", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=" ".join(ROWS))
    add("--write", action="store_true", help="write the table into README.md, and bench.svg")
    options = parser.parse_args()
    bots = {path.name: path.resolve() for path in options.bot or [ECHOBOT]}
    if len(bots) < len(options.bot or bots) or (options.write and len(options.only) < len(ROWS)):
        parser.error("bots need different file names, and only all rows are written")
    measured = asyncio.run(measure(bots | REFERENCES, options.only))
    cells = [row.cells() for rows in measured.values() for row in rows]
    table = tabulate(cells, headers="keys", tablefmt="github", missingval="-")
    text = f"\n{table}\n\n{environment()}\n"
    print(text)
    if options.write:
        before, _, after = README.read_text().split(MARKER)
        README.write_text(f"{before}{MARKER}{text}{MARKER}{after}")
        draw(measured["promise"][::2], HERE / "bench.svg")


if __name__ == "__main__":
    main()
