"""The loop of the well-known matrix-nio tutorial, in our own words, to measure by.

It saves the sync token as soon as it has it, answers afterwards and looks at timelines alone.
"""

import asyncio
import os
from pathlib import Path

from nio import AsyncClient, RoomMessageText

COMMAND = "!replybot"


async def main(token_file: Path) -> None:
    """Log in, then sync and answer for ever."""
    client = AsyncClient(os.environ["MATRIX_HOMESERVER"], os.environ["MATRIX_USER"])
    await client.login(os.environ["MATRIX_PASSWORD"])
    client.next_batch = load(token_file)
    while True:
        answer = await client.sync(30000)
        save(token_file, answer.next_batch)
        for room_id in answer.rooms.invite:
            await client.join(room_id)
        for room_id, room in answer.rooms.join.items():
            for event in room.timeline.events:
                if isinstance(event, RoomMessageText) and event.body.startswith(COMMAND):
                    reply = event.body.replace(COMMAND, "").strip()
                    content = {"msgtype": "m.text", "body": reply}
                    await client.room_send(room_id, "m.room.message", content)


def load(token_file: Path) -> str:
    """Return the saved sync token, if there is one."""
    return token_file.read_text() if token_file.exists() else ""


def save(token_file: Path, next_batch: str) -> None:
    """Save the sync token."""
    token_file.write_text(next_batch)


asyncio.run(main(Path(os.environ["STATE_DIRECTORY"], "next_batch")))
