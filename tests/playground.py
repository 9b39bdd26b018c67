"""A homeserver, the bot and a chat prompt in one command, without an account.

    python tests/playground.py

What you type goes to a room that the bot is in; what it answers appears under it. Ctrl-D or Ctrl-C
ends it, and nothing is left behind. With input from a pipe only the answers go to stdout, and it
ends once all is answered.
"""

import asyncio
import contextlib
import json
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Self

try:
    from support.bot import Bot, eventually, new_bot
    from support.homeserver import PASSWORD, SERVER_NAME, Homeserver, User, running_homeserver
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}: install tests/requirements.txt, as the README says")

INTERACTIVE = sys.stdin.isatty()
PROMPT, CLEAR_LINE = ("> ", "\r\x1b[K") if INTERACTIVE else ("", "")

WELCOME = f"""
You are @alice:{SERVER_NAME}, in a room with @bot:{SERVER_NAME}.
It answers what starts with !replybot, and nothing else. Try: !replybot hello
Ctrl-D ends it. To try another bot, change reply_to in echobot.py and start this again.

To talk to it with a Matrix client on this machine, log in there with
    homeserver  {{url}}
    user        alice
    password    {PASSWORD}

"""


class Room:
    """A room with the bot, as seen by somebody in it, and how much of it was shown."""

    def __init__(self, user: User, bot: Bot, room_id: str) -> None:
        self.user, self.bot, self.room_id = user, bot, room_id
        self.shown = self.log_shown = 0

    @classmethod
    async def with_bot(cls, homeserver: Homeserver, bot: Bot) -> Self:
        """Register the accounts, start the bot and wait until it has joined a room."""
        account, user = [await homeserver.register(name) for name in ("bot", "alice")]
        room_id = await user.create_room(account.user_id, name="echobot playground")
        # Ctrl-C in a terminal is for the playground, which then stops the bot.
        await bot.start(start_new_session=True)

        async def joined_or_ended() -> bool:
            return not bot.running or account.user_id in await user.members(room_id)

        await eventually(joined_or_ended, 60, "the bot's join")
        return cls(user, bot, room_id)

    async def show(self) -> None:
        """Show what others have said, and what the bot has complained of, since the last time."""
        events = await self.user.events(self.room_id)
        for event in events[self.shown :]:
            if event["sender"] != self.user.user_id:
                name = f"{event['sender'][1:].partition(':')[0]}: " if INTERACTIVE else ""
                write(f"{CLEAR_LINE}{name}{event['content'].get('body')}\n{PROMPT}")
        lines = self.bot.log.splitlines()
        for line in lines[self.log_shown :]:
            if " INFO " not in line:
                tell(f"{CLEAR_LINE}echobot.py: {line}\n{PROMPT}")
        self.shown, self.log_shown = len(events), len(lines)

    async def is_answered(self) -> bool:
        """Tell whether the bot has saved a position past all that we said, and owes no reply."""
        only = json.dumps({"types": ["m.room.message"], "senders": [self.user.user_id]})
        query = {"from": self.bot.next_batch, "dir": "f", "limit": 1, "filter": only}
        path = f"/rooms/{self.room_id}/messages"
        is_past = not (await self.user.request("GET", path, **query))["chunk"]
        return is_past and not self.bot.unfinished


async def main() -> int:
    """Run the playground until its input ends; return the exit status."""
    playing = asyncio.current_task()
    assert playing is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, playing.cancel)
    try:
        async with contextlib.AsyncExitStack() as stack:
            tell("Starting a homeserver (some seconds) ...")
            homeserver = await stack.enter_async_context(running_homeserver())
            tell(" done\nStarting echobot.py ...")
            bot = await stack.enter_async_context(new_bot(homeserver.url))
            room = await Room.with_bot(homeserver, bot)
            tell(" done\n")
            tell(WELCOME.format(url=homeserver.url) if INTERACTIVE else "")
            await chat(room)
    except asyncio.CancelledError:
        return 0 if INTERACTIVE else 130
    except (AssertionError, RuntimeError) as error:
        tell(f"{error}\n")
        return 1
    finally:
        tell("\n" if INTERACTIVE else "")
    return 0


async def chat(room: Room) -> None:
    """Send what is typed and show what is said, until the input ends and all of it is answered."""
    talking = asyncio.create_task(talk(room))
    while not talking.done():
        await room.show()
        await asyncio.wait({talking}, timeout=0.2)
        if not room.bot.running:
            raise RuntimeError(f"echobot.py ended by itself:\n{room.bot.log}")
    await talking
    await room.show()


async def talk(room: Room) -> None:
    """Send what is typed; return once the bot has dealt with all of it."""
    write(PROMPT)
    async for line in typed_lines():
        if line:
            await room.user.send(room.room_id, line)
        write(PROMPT)
    await eventually(room.is_answered, float("inf"))


async def typed_lines() -> AsyncIterator[str]:
    """Yield the lines of stdin, whatever it is: a terminal, a pipe or a file."""
    lines: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        # Without a buffer: its lock, held while this waits, would hinder the end of the program.
        with open(0, "rb", buffering=0, closefd=False) as stdin, contextlib.suppress(RuntimeError):
            for line in stdin:
                loop.call_soon_threadsafe(lines.put_nowait, line.decode(errors="replace").strip())
                if not line.endswith(b"\n"):  # Ctrl-D twice after half a line ends it too.
                    break
            loop.call_soon_threadsafe(lines.put_nowait, None)

    threading.Thread(target=read, daemon=True).start()
    while (line := await lines.get()) is not None:
        yield line


def tell(text: str) -> None:
    """Write what is not part of the conversation."""
    print(text, end="", file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Write a part of the conversation."""
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
