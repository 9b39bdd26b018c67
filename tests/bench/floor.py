"""The same job as bare as aiohttp allows: no library, no state, no care, no invitations.

It asks for nothing that it does not need: what does one thing after another is hardly faster.
"""

import asyncio
import json
import os
from itertools import count
from urllib.parse import quote

import aiohttp

COMMAND = "!replybot"


async def main(user: str, base: str = "/_matrix/client/v3") -> None:
    """Log in, then sync and answer for ever."""
    nothing: dict[str, object] = {"types": []}
    timeline = {"types": ["m.room.message"], "not_senders": [user]}
    room = {"timeline": timeline, **dict.fromkeys(("state", "ephemeral", "account_data"), nothing)}
    only = {"room": room, "presence": nothing, "account_data": nothing}
    identifier = {"type": "m.id.user", "user": user}
    login = {"identifier": identifier, "password": os.environ["MATRIX_PASSWORD"]}
    async with aiohttp.ClientSession(os.environ["MATRIX_HOMESERVER"]) as http:
        async with http.post(f"{base}/login", json={"type": "m.login.password", **login}) as answer:
            http.headers["Authorization"] = "Bearer " + (await answer.json())["access_token"]
        query = {"timeout": "30000", "filter": json.dumps(only)}
        for number in count():
            async with http.get(f"{base}/sync", params=query) as answer:
                sync = await answer.json()
            for room_id, joined in sync.get("rooms", {}).get("join", {}).items() if number else ():
                for index, event in enumerate(joined["timeline"]["events"]):
                    body, event_id = event["content"].get("body", ""), event["event_id"]
                    if body.startswith(COMMAND):
                        content = {"msgtype": "m.text", "body": body.replace(COMMAND, "").strip()}
                        # Synapse's work for a reply grows with what is in it.
                        content |= {"m.mentions": {}, "echobot.answers": event_id}
                        path = f"{base}/rooms/{quote(room_id)}/send/m.room.message"
                        async with http.put(f"{path}/{number}.{index}", json=content):
                            pass
            query["since"] = sync["next_batch"]


asyncio.run(main(os.environ["MATRIX_USER"]))
