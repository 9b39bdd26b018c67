"""The same job as bare as aiohttp allows: no library, no state, no care.

It asks for nothing that it does not need, so nothing in Python that does one thing after another is
much faster.
"""

import asyncio
import json
import os
from itertools import count
from typing import Any
from urllib.parse import quote

import aiohttp

COMMAND = "!replybot"
NOTHING: dict[str, Any] = {"types": []}


async def main() -> None:
    """Log in, then sync and answer for ever."""
    user, base = os.environ["MATRIX_USER"], "/_matrix/client/v3"
    timeline = {"types": ["m.room.message"], "not_senders": [user]}
    quiet = {"state": NOTHING, "ephemeral": NOTHING, "account_data": NOTHING}
    everywhere = {"presence": NOTHING, "account_data": NOTHING}
    sync_filter = json.dumps({**everywhere, "room": {**quiet, "timeline": timeline}})
    login = {
        "type": "m.login.password",
        "identifier": {"type": "m.id.user", "user": user},
        "password": os.environ["MATRIX_PASSWORD"],
    }
    async with aiohttp.ClientSession(os.environ["MATRIX_HOMESERVER"]) as http:
        async with http.post(f"{base}/login", json=login) as response:
            http.headers["Authorization"] = "Bearer " + (await response.json())["access_token"]
        query = {"timeout": "30000", "filter": sync_filter}
        for transaction_ids in count():
            async with http.get(f"{base}/sync", params=query) as response:
                answer = await response.json()
            rooms = answer.get("rooms", {})
            for room_id in rooms.get("invite", {}):
                await http.post(f"{base}/join/{quote(room_id)}", json={})
            joined = rooms.get("join", {}).items() if "since" in query else ()
            for room_id, room in joined:
                for number, event in enumerate(room["timeline"]["events"]):
                    body = event["content"].get("body", "")
                    if body.startswith(COMMAND):
                        path = f"{base}/rooms/{quote(room_id)}/send/m.room.message"
                        content = {"msgtype": "m.text", "body": body.replace(COMMAND, "").strip()}
                        url = f"{path}/{transaction_ids}.{number}"
                        async with http.put(url, json=content):
                            pass
            query["since"] = answer["next_batch"]


asyncio.run(main())
