"""The loop of the well-known matrix-nio tutorial, in our own words, to measure by.

It saves the sync token as soon as it has it, answers afterwards and looks at timelines alone.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from nio import AsyncClient, RoomMessageText

COMMAND = "!replybot"
TOKEN_FILE = Path(os.environ["STATE_DIRECTORY"], "next_batch")


async def main(next_batch: str, save: Callable[[str], object]) -> None:
    """Log in, then sync and answer for ever."""
    client = AsyncClient(os.environ["MATRIX_HOMESERVER"], os.environ["MATRIX_USER"])
    await client.login(os.environ["MATRIX_PASSWORD"])
    client.next_batch = next_batch
    while True:
        answer = await client.sync(30000)
        save(answer.next_batch)
        for room_id in answer.rooms.invite:
            await client.join(room_id)
        for room_id, room in answer.rooms.join.items():
            for event in room.timeline.events:
                if isinstance(event, RoomMessageText) and event.body.startswith(COMMAND):
                    content = {"msgtype": "m.text", "body": event.body.replace(COMMAND, "").strip()}
                    await client.room_send(room_id, "m.room.message", content)


asyncio.run(main(TOKEN_FILE.read_text() if TOKEN_FILE.exists() else "", TOKEN_FILE.write_text))
