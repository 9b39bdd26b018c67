"""Measure echobot.py beside the tutorial's loop and beside the floor, in one run.

    python tests/bench.py [--only ROW ...] [--json] [--picture PATH] [--bot PATH]

Takes under four minutes on two cores. The table goes to stdout as Markdown, progress to stderr.
What costs time is interleaved and given as a ratio as well, since no two machines are alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from support.bot import ECHOBOT, Bot, new_bot
from support.homeserver import Homeserver, User, running_homeserver
from support.proxy import POLL, Proxy, running_proxy

HERE = Path(__file__).parent
ECHO, TUTORIAL, FLOOR = NAMES = ("echobot.py", "tutorial's loop", "floor")
ROUNDS = {"latency": 100, "share": 150, "throughput": 4, "slow": 3, "start": 3}
BURST, DOWNTIME, KILLS, PER_KILL = 200, 100, 10, 10
COMMANDS, SOAK, PER_ANSWER = 4_000, 36_000, 20
SLOW_COMMANDS, SLOW = 300, 0.005  # s that a homeserver takes to accept a message; Synapse: 10 ms
ROOMS, MESSAGES_PER_ROOM = 200, 3
IDLE = 20  # s

Figures = dict[str, float]


@dataclass
class Row:
    """A line of the table: what was measured of each, and the figure to reach."""

    name: str
    values: Figures
    unit: str = ""
    ratio_to: str = ""
    target: str = ""
    met: bool | None = None

    def cells(self) -> list[str]:
        """Return the line's cells."""
        return [self.name, *map(self.cell, NAMES), self.verdict()]

    def cell(self, name: str) -> str:
        """Return one value with its unit, and its ratio to the one that it is compared with."""
        if name not in self.values:
            return "-"
        value = self.values[name]
        text = f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"
        text += f" {self.unit}" if self.unit else ""
        if self.ratio_to:
            text += f" ({value / self.values[self.ratio_to]:.2f})"
        return text

    def verdict(self) -> str:
        """Return the figure to reach and whether it was."""
        return f"{self.target}: {'yes' if self.met else 'no'}" if self.target else ""


def progress(text: str) -> None:
    """Say on stderr what is being done, and how long it has been going on."""
    print(f"{time.perf_counter() - STARTED:4.0f} s  {text}", file=sys.stderr, flush=True)


STARTED = time.perf_counter()


def cpu_seconds(bot: Bot) -> float:
    """Return the CPU time of a bot's process so far, in user and kernel mode."""
    assert bot.process is not None
    fields = Path(f"/proc/{bot.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(bot: Bot) -> float:
    """Return the resident memory of a bot's process in MB."""
    assert bot.process is not None
    status = Path(f"/proc/{bot.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def median(samples: dict[str, list[float]]) -> Figures:
    """Return the median of each one's samples."""
    return {name: statistics.median(values) for name, values in samples.items()}


def p95(samples: dict[str, list[float]]) -> Figures:
    """Return the 95th percentile of each one's samples."""
    return {name: statistics.quantiles(values, n=20)[18] for name, values in samples.items()}


def at_most(values: Figures, factor: float, other: str) -> bool:
    """Tell whether echobot.py's value is at most so many times the other's."""
    return values[ECHO] <= factor * values[other]


def interleaved(rounds: int) -> list[tuple[int, str]]:
    """Return who is to be measured when: each once in a round, each time in another order."""
    turn = random.Random(1)
    return [(n, name) for n in range(rounds) for name in turn.sample(NAMES, len(NAMES))]


@dataclass
class Chat:
    """A bot on a real homeserver, in one room with people; one of them listens with a long poll."""

    bot: Bot
    bot_id: str
    room_id: str
    people: list[User]
    heard: dict[str, float] = field(default_factory=dict)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)
    readings: int = 0

    async def listen(self) -> None:
        """Note for ever what the bot says, and when it was heard."""
        room = {"timeline": {"types": ["m.room.message"], "limit": 100}}
        query = {"filter": json.dumps({"room": room}), "timeout": "30000"}
        while True:
            answer = await self.people[0].request("GET", "/sync", None, **query)
            now = time.perf_counter()
            query["since"] = answer["next_batch"]
            joined = answer.get("rooms", {}).get("join", {}).get(self.room_id, {})
            async with self.news:
                for event in joined.get("timeline", {}).get("events", []):
                    if event["sender"] == self.bot_id:
                        self.heard.setdefault(event["content"]["body"], now)
                self.news.notify_all()

    async def hear(self, text: str, seconds: float = 60) -> float:
        """Wait for a reply, return when it was heard."""
        async with self.news:
            await asyncio.wait_for(self.news.wait_for(lambda: text in self.heard), seconds)
        return self.heard[text]

    async def ask(self, text: str, number: int = 0) -> None:
        """Have one of the people send a command."""
        await self.people[number % len(self.people)].send(self.room_id, f"!replybot {text}")

    async def ask_all(self, prefix: str, count: int) -> None:
        """Send so many commands at once."""
        await asyncio.gather(*(self.ask(f"{prefix} {n}", n) for n in range(count)))

    async def ready(self) -> None:
        """Ask until the bot answers: as it does so in order, nothing older is then under way."""
        for _ in range(200):
            self.readings += 1
            text = f"ready {self.readings}"
            await self.ask(text)
            with suppress(asyncio.TimeoutError):
                await self.hear(text, 0.3)
                return
        raise RuntimeError(f"{self.bot.script.name} does not answer: {self.bot.log[-2000:]}")

    async def answered(self, prefix: str) -> tuple[int, int]:
        """Return how many commands with that prefix were answered, and how many more than once."""
        bodies = await self.people[0].bodies(self.room_id, self.bot_id)
        replies = Counter(body for body in bodies if body.startswith(f"{prefix} "))
        return len(replies), sum(count > 1 for count in replies.values())


class Scripted:
    """The scripted homeserver in a process of its own, and a bot on it of each kind."""

    def __init__(self, url: str, http: aiohttp.ClientSession, bots: dict[str, Bot]) -> None:
        self.url = url
        self.http = http
        self.bots = bots
        self.fed = dict.fromkeys(bots, 0)
        self.resident: dict[int, Figures] = {}

    async def feed(self, name: str, commands: int, delay: float = 0) -> dict[str, float]:
        """Send a bot commands, accept each reply after a delay in s; return what that took."""
        self.fed[name] += commands
        order: dict[str, Any] = {"name": account_name(name), "commands": commands}
        order |= {"batch": PER_ANSWER, "delay": delay}
        async with self.http.post(f"{self.url}/bench", json=order) as response:
            answer: dict[str, float] = await response.json()
            return answer

    def note_memory(self, commands: int) -> None:
        """Note how much memory each takes after so many commands."""
        self.resident[commands] = {name: resident(bot) for name, bot in self.bots.items()}


def account_name(name: str) -> str:
    """Return the localpart for the account of a bot."""
    return f"bot{NAMES.index(name)}"


class Bench:
    """What the rows are measured with; each part of it starts when it is first needed."""

    def __init__(self, stack: AsyncExitStack, echobot: Path) -> None:
        self.stack = stack
        self.scripts = dict(
            zip(NAMES, (echobot, HERE / "tutorial.py", HERE / "floor.py"), strict=True)
        )
        self.lock = asyncio.Lock()
        self._scripted: Scripted | None = None
        self._homeserver: Homeserver | None = None
        self._chats: dict[str, Chat] = {}
        self._veteran: User | None = None

    async def bot(self, name: str, url: str, user_id: str) -> Bot:
        """Return a bot of that kind that was never started."""
        bot = await self.stack.enter_async_context(new_bot(url, MATRIX_USER=user_id))
        bot.script = self.scripts[name]
        return bot

    async def scripted(self) -> Scripted:
        """Return the scripted homeserver with the three bots polling it."""
        async with self.lock:
            if self._scripted is None:
                progress("starting the scripted homeserver and a bot of each kind")
                url = await self.stack.enter_async_context(scripted_homeserver())
                timeout = aiohttp.ClientTimeout(total=None)
                http = await self.stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
                ids = {name: f"@{account_name(name)}:echobot.test" for name in NAMES}
                bots = {name: await self.bot(name, url, ids[name]) for name in NAMES}
                self._scripted = Scripted(url, http, bots)
                for name, bot in bots.items():
                    await bot.start()
                    await self._scripted.feed(name, 1)
                self._scripted.note_memory(0)
            return self._scripted

    async def homeserver(self) -> Homeserver:
        """Return a real Synapse."""
        if self._homeserver is None:
            progress("starting Synapse")
            running = running_homeserver()
            self._homeserver = await self.stack.enter_async_context(running)
        return self._homeserver

    async def chats(self) -> dict[str, Chat]:
        """Return for each bot a room with four people on a real Synapse, all of them running."""
        homeserver = await self.homeserver()
        if not self._chats:
            progress("a room with four people for each bot")
            for name in NAMES:
                self._chats[name] = await self._chat(homeserver, name)
            await asyncio.gather(*(chat.ready() for chat in self._chats.values()))
        return self._chats

    async def _chat(self, homeserver: Homeserver, name: str) -> Chat:
        account = await homeserver.register(account_name(name))
        people = [await homeserver.register(f"{account_name(name)}.user{n}") for n in range(4)]
        members = [account, *people[1:]]
        room_id = await people[0].create_room(*(member.user_id for member in members))
        for member in members:
            await member.join(room_id)
        bot = await self.bot(name, homeserver.url, account.user_id)
        chat = Chat(bot, account.user_id, room_id, people)
        listening = asyncio.create_task(chat.listen())
        self.stack.callback(listening.cancel)
        await bot.start()
        return chat

    async def veteran(self) -> User:
        """Return an account on a real Synapse that is in many rooms with history."""
        homeserver = await self.homeserver()
        if self._veteran is None:
            user = self._veteran = await homeserver.register("veteran")
            todo = iter(range(ROOMS))

            async def make_rooms() -> None:
                for number in todo:
                    room_id = await user.create_room()
                    for _ in range(MESSAGES_PER_ROOM):
                        await user.send(room_id, "Some words that were said here long ago")
                    if number % 50 == 49:
                        progress(f"{number + 1} rooms with history made")

            await asyncio.gather(*(make_rooms() for _ in range(4)))
        return self._veteran


@asynccontextmanager
async def scripted_homeserver() -> AsyncIterator[str]:
    """Run the scripted homeserver as a process; yield its URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / "scripted.py"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        await process.wait()


async def burst(bench: Bench) -> list[Row]:
    """Answered of so many commands sent at once."""
    answered: Figures = {}
    for name, chat in (await bench.chats()).items():
        progress(f"burst: {name}")
        await chat.ask_all("burst", BURST)
        await chat.ready()
        answered[name], _ = await chat.answered("burst")
    title = f"answered of {BURST} sent in one burst"
    return [Row(title, answered, "", "", "all", answered[ECHO] == BURST)]


async def downtime(bench: Bench) -> list[Row]:
    """Answered of what was sent while the bot was down."""
    answered: Figures = {}
    doubled: Figures = {}
    progress("downtime")

    async def go_down(name: str, chat: Chat) -> None:
        await chat.bot.stop()
        await chat.ask_all("downtime", DOWNTIME)
        await chat.bot.start()
        await chat.ready()
        answered[name], doubled[name] = await chat.answered("downtime")

    chats = await bench.chats()
    await asyncio.gather(*(go_down(name, chat) for name, chat in chats.items()))
    title = f"answered of {DOWNTIME} sent while it was down"
    return [
        Row(title, answered, "", "", "all", answered[ECHO] == DOWNTIME),
        Row("… of them doubled", doubled, "", "", "none", doubled[ECHO] == 0),
    ]


async def kills(bench: Bench) -> list[Row]:
    """Lost and doubled of what was sent while the bot was killed again and again."""
    lost: Figures = {}
    doubled: Figures = {}
    sent = KILLS * PER_KILL

    async def kill_again_and_again(name: str, chat: Chat) -> None:
        instants = random.Random(name)
        for kill in range(KILLS):
            progress(f"kill {kill + 1} of {KILLS}: {name}")
            sending = asyncio.create_task(ask_slowly(chat, kill * PER_KILL))
            await asyncio.sleep(instants.uniform(0, 0.4))
            if chat.bot.running:
                await chat.bot.kill()
            await sending
            await chat.bot.start()
            await chat.ready()
        answered, doubled[name] = await chat.answered("kill")
        lost[name] = sent - answered

    async def ask_slowly(chat: Chat, first: int) -> None:
        for number in range(first, first + PER_KILL):
            await chat.ask(f"kill {number}", number)
            await asyncio.sleep(0.02)

    chats = await bench.chats()
    await asyncio.gather(*(kill_again_and_again(name, chat) for name, chat in chats.items()))
    return [
        Row(f"lost of {sent} sent over {KILLS} SIGKILLs", lost, "", "", "none", lost[ECHO] == 0),
        Row("… of them doubled", doubled, "", "", "none", doubled[ECHO] == 0),
    ]


async def latency(bench: Bench) -> list[Row]:
    """From sending a command until a second client's long poll sees the reply, on Synapse."""
    chats = await bench.chats()
    samples: dict[str, list[float]] = {name: [] for name in NAMES}
    for number, name in interleaved(ROUNDS["latency"]):
        if number % 25 == 0:
            progress(f"echo latency: round {number + 1} of {ROUNDS['latency']}, {name}")
        text = f"latency {number}"
        sent_at = time.perf_counter()
        await chats[name].ask(text, 1)
        samples[name].append((await chats[name].hear(text) - sent_at) * 1000)
        # Let it come to rest: what it does after a reply is not part of the next one's time.
        await asyncio.sleep(0.02)
    middle = median(samples)
    met = at_most(middle, 1.05, FLOOR)
    return [
        Row("echo latency, median", middle, "ms", FLOOR, "≤ 1.05 of the floor", met),
        Row("echo latency, p95", p95(samples), "ms", FLOOR),
    ]


async def share(bench: Bench) -> list[Row]:
    """From the last byte of a scripted sync answer until the first byte of the reply."""
    scripted = await bench.scripted()
    samples: dict[str, list[float]] = {name: [] for name in NAMES}
    progress("its own share of the latency")
    for _, name in interleaved(ROUNDS["share"]):
        samples[name].append((await scripted.feed(name, 1))["share"] * 1000)
    middle = median(samples)
    met = at_most(middle, 0.7, TUTORIAL)
    return [
        Row("its own share of that, median", middle, "ms", TUTORIAL, "≤ 0.7 of the loop", met),
        Row("its own share of that, p95", p95(samples), "ms", TUTORIAL),
    ]


async def throughput(bench: Bench) -> list[Row]:
    """Commands answered per second and CPU time for each, from the scripted homeserver."""
    scripted = await bench.scripted()
    rounds = ROUNDS["throughput"]
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    cpu: dict[str, list[float]] = {name: [] for name in NAMES}
    for number, name in interleaved(rounds):
        progress(f"throughput: round {number + 1} of {rounds}, {name}")
        before = cpu_seconds(scripted.bots[name])
        seconds[name].append((await scripted.feed(name, COMMANDS // rounds))["seconds"])
        cpu[name].append((cpu_seconds(scripted.bots[name]) - before) / COMMANDS * rounds * 1000)
    scripted.note_memory(COMMANDS)
    slow_seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number, name in interleaved(ROUNDS["slow"]):
        progress(f"throughput, slower homeserver: round {number + 1} of {ROUNDS['slow']}, {name}")
        slow_seconds[name].append((await scripted.feed(name, SLOW_COMMANDS, SLOW))["seconds"])
    cost = median(cpu)
    met = at_most(cost, 0.7, TUTORIAL)
    return [
        throughput_row("throughput", COMMANDS // rounds, median(seconds)),
        throughput_row("… sends take 5 ms", SLOW_COMMANDS, median(slow_seconds)),
        Row("CPU per message", cost, "ms", TUTORIAL, "≤ 0.7 of the loop", met),
    ]


def throughput_row(title: str, commands: int, seconds: Figures) -> Row:
    """Return the row for what so many commands took."""
    rate = {name: commands / value for name, value in seconds.items()}
    met = rate[ECHO] >= 2 * rate[TUTORIAL] and rate[ECHO] >= 0.5 * rate[FLOOR]
    return Row(title, rate, "per s", TUTORIAL, "≥ 2 of the loop, ≥ half of the floor", met)


async def memory(bench: Bench) -> list[Row]:
    """Resident memory after the start, after 4,000 commands and after an hour's worth of them."""
    scripted = await bench.scripted()
    for name in NAMES:
        await scripted.feed(name, max(COMMANDS - scripted.fed[name], 1))
    scripted.note_memory(COMMANDS)
    for name in (ECHO, FLOOR):
        while scripted.fed[name] < SOAK:
            progress(f"an hour's worth of traffic: {scripted.fed[name]} of {SOAK}, {name}")
            await scripted.feed(name, min(8000, SOAK - scripted.fed[name]))
    scripted.note_memory(SOAK)
    del scripted.resident[SOAK][TUTORIAL]
    start, loaded, soaked = (scripted.resident[n] for n in (0, COMMANDS, SOAK))
    within = at_most(start, 1.1, TUTORIAL) and at_most(loaded, 1.1, TUTORIAL)
    flat = soaked[ECHO] <= 1.05 * loaded[ECHO]
    target = "≤ 1.1 of the loop"
    return [
        Row("resident memory after the start", start, "MB", TUTORIAL, target, within),
        Row(f"… after {COMMANDS:,} commands", loaded, "MB", TUTORIAL, target, within),
        Row(f"… after {SOAK:,} commands", soaked, "MB", "", "flat", flat),
    ]


async def idle(bench: Bench) -> list[Row]:
    """CPU time while nobody says anything."""
    scripted = await bench.scripted()
    progress(f"idle: {IDLE} s of silence")
    await asyncio.sleep(1)
    before = {name: cpu_seconds(bot) for name, bot in scripted.bots.items()}
    await asyncio.sleep(IDLE)
    spent = {name: cpu_seconds(bot) - before[name] for name, bot in scripted.bots.items()}
    met = spent[ECHO] < 0.05
    return [Row(f"CPU in {IDLE} s of silence", spent, "s", "", "< 0.05 s", met)]


async def start(bench: Bench) -> list[Row]:
    """From the start of the process to its first long poll, in an account with many rooms."""
    account, homeserver = await bench.veteran(), await bench.homeserver()
    times: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in NAMES} for kind in ("first start", "restart")
    }
    read: dict[str, Figures] = {kind: {} for kind in times}
    async with running_proxy(homeserver.url) as proxy:
        for number, name in interleaved(ROUNDS["start"]):
            progress(f"start: round {number + 1} of {ROUNDS['start']}, {name}")
            bot = await bench.bot(name, proxy.url, account.user_id)
            for kind, samples in times.items():
                seconds, read[kind][name] = await start_once(bot, proxy)
                samples[name].append(seconds)
    rows = []
    for kind, samples in times.items():
        middle = median(samples)
        met = middle[ECHO] <= middle[TUTORIAL] + 0.05
        target = "≤ 0.05 s above the loop"
        rows += [
            Row(f"{kind} to first long poll, {ROOMS} rooms", middle, "s", TUTORIAL, target, met),
            Row("… bytes read", read[kind], "kB", TUTORIAL),
        ]
    return rows


async def start_once(bot: Bot, proxy: Proxy) -> tuple[float, float]:
    """Start a bot until its first long poll; return the time in s and what it read in kB."""
    polled = asyncio.Event()

    async def note(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        polled.set()
        return await proxy.forward(request)

    read_before = proxy.bytes_to_bot
    with proxy.inject(note, POLL):
        started = time.perf_counter()
        await bot.start()
        await asyncio.wait_for(polled.wait(), 60)
        seconds = time.perf_counter() - started
    read = proxy.bytes_to_bot - read_before
    await asyncio.sleep(0.1)
    await bot.kill()
    return seconds, read / 1000


MEASUREMENTS: dict[str, Callable[[Bench], Awaitable[list[Row]]]] = {
    "burst": burst,
    "downtime": downtime,
    "kills": kills,
    "latency": latency,
    "share": share,
    "throughput": throughput,
    "start": start,
    "memory": memory,
    "idle": idle,
}
# What is in one line goes on at once; whatever is about time stands alone.
SCHEDULE = (
    ("idle", "veteran"),
    ("share",),
    ("throughput",),
    ("latency",),
    ("start",),
    ("burst",),
    ("downtime",),
    ("kills", "memory"),
)


async def measure(echobot: Path, chosen: list[str]) -> dict[str, list[Row]]:
    """Measure the chosen rows."""
    done: dict[str, list[Row]] = {}

    async def one(bench: Bench, name: str) -> None:
        if name in chosen:
            done[name] = await MEASUREMENTS[name](bench)
        elif name == "veteran" and "start" in chosen:
            await bench.veteran()

    async with AsyncExitStack() as stack:
        bench = Bench(stack, echobot)
        for names in SCHEDULE:
            await asyncio.gather(*(one(bench, name) for name in names))
        progress("done")
    return done


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [["", *NAMES, "to reach"], ["---", *["---:"] * len(NAMES), "---"]]
    lines += [row.cells() for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def environment() -> str:
    """Return the machine and the versions that the figures are of."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = [f"Python {platform.python_version()}"] + [
        f"{package} {metadata.version(package)}"
        for package in ("matrix-nio", "aiohttp", "matrix-synapse")
    ]
    machine = f"{os.cpu_count()} cores ({model[1] if model else platform.machine()})"
    return f"Linux, {machine}, {', '.join(versions)}; {time.perf_counter() - STARTED:.0f} s in all."


STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.good { fill: #1a7f37 } .bad { fill: #cf222e } .odd { fill: #bf8700 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .good { fill: #3fb950 } .bad { fill: #f85149 } .odd { fill: #d29922 }
}
"""


def picture(burst: list[Row], kills: list[Row]) -> str:
    """Draw what was answered of a burst, and lost or doubled over the kills, as SVG."""
    answered, (lost, doubled) = burst[0].values, (row.values for row in kills)
    sent = KILLS * PER_KILL
    drawing: list[str] = []
    said: list[str] = []

    def panel(y: int, title: str, unit: float, parts: Callable[[str], Figures], label: str) -> None:
        drawing.append(f'<text class="title" x="0" y="{y}">{title}</text>')
        for line, name in enumerate(NAMES):
            x, top = 120.0, y + 12 + 26 * line
            drawing.append(f'<text x="0" y="{top + 14}">{name}</text>')
            for kind, value in parts(name).items():
                width = value * unit
                size = f'width="{width:.1f}" height="18"'
                drawing.append(f'<rect class="{kind}" x="{x:.1f}" y="{top}" {size}/>')
                x += width
            text = label.format(answered=answered[name], lost=lost[name], doubled=doubled[name])
            drawing.append(f'<text x="530" y="{top + 14}">{text}</text>')
            said.append(f"{title}: {name} {text}")

    panel(
        16,
        f"Answered (green) of {BURST} commands sent in one burst",
        400 / BURST,
        lambda name: {"good": answered[name], "bad": BURST - answered[name]},
        f"{{answered:.0f}} of {BURST}",
    )
    panel(
        132,
        f"Lost (red) or doubled (yellow) of {sent} commands over {KILLS} kills",
        400 / sent,
        lambda name: {
            "good": sent - lost[name] - doubled[name],
            "odd": doubled[name],
            "bad": lost[name],
        },
        "{lost:.0f} lost, {doubled:.0f} doubled",
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 224" role="img">'
    title = f"<title>{'; '.join(said)}</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *drawing, "</svg>\n"])


def main() -> int:
    """Run the bench as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*MEASUREMENTS]
    rows = " ".join(names)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW", help=rows)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--picture", type=Path, help="draw burst and kills into this SVG file")
    parser.add_argument("--bot", type=Path, default=ECHOBOT, help="the bot to measure")
    options = parser.parse_args()
    if options.picture and not {"burst", "kills"} <= {*options.only}:
        parser.error("--picture needs the rows burst and kills")
    measured = asyncio.run(measure(options.bot.resolve(), options.only))
    rows_measured = [row for name in options.only for row in measured[name]]
    if options.json:
        print(json.dumps([asdict(row) for row in rows_measured], indent=1))
    else:
        print(table(rows_measured), environment(), sep="\n\n")
    if options.picture:
        options.picture.write_text(picture(measured["burst"], measured["kills"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
