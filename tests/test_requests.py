"""What the bot sends is what nio's own client sends, but for what is named here."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from aiohttp import web
from nio import AsyncClient, MessageDirection
from support.homeserver import PASSWORD
from support.proxy import ALL, Proxy, running_proxy
from support.scripted import ALICE, BOT, CONDUIT, Field, field_of
from test_settings import RESOLVER, new_certificate

KINDS = {
    "discovery": r"GET /\.well-known/matrix/client$",
    "login": r"POST .*/login$",
    "whoami": r"GET .*/whoami$",
    "first sync": r"GET .*/sync\?(?!.*since=)",
    "sync": r"GET .*/sync\?.*since=",
    "join": r"POST .*/join/",
    "leave": r"POST .*/leave$",
    "messages": r"GET .*/messages\?",
    "send": r"PUT .*/send/",
}
# Each difference, and why. nio has a Content-Type even where nothing is sent; and it sends nothing
# with a POST that needs no parameters, which the Conduit family refuses.
READING = ("discovery", "whoami", "first sync", "sync", "messages")
MEANT = {kind: {"Content-Type"} for kind in READING}
MEANT |= {"join": {"body"}, "leave": {"body"}, "login": set(), "send": set()}


@dataclass
class Sent:
    """A request as it came in."""

    line: str  # method and path
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: str

    def differences(self, other: "Sent") -> set[str]:
        """Return what is not the same in another request: names of headers, or parts."""
        names = self.headers.keys() | other.headers.keys()
        parts = ("line", "query", "body")
        return {n for n in names if self.headers.get(n) != other.headers.get(n)} | {
            part for part in parts if getattr(self, part) != getattr(other, part)
        }


class Recorder:
    """Passes requests on, and keeps the first of each kind."""

    def __init__(self) -> None:
        self.first: dict[str, Sent] = {}

    async def __call__(self, proxy: Proxy, request: web.Request) -> web.StreamResponse:
        """Keep a request, and pass it on."""
        path, _, query = request.raw_path.partition("?")
        name = f"{request.method} {request.raw_path}"
        kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, name)]
        # These two go without saying.
        headers = {k: v for k, v in request.headers.items() if k not in ("Host", "Content-Length")}
        body = (await request.read()).decode()
        sent = Sent(f"{request.method} {unquote(path)}", parse_qs(query), headers, body)
        for kind in kinds:
            self.first.setdefault(kind, sent)
        return await proxy.forward(request)


async def test_requests_differ_from_those_of_nio_only_as_meant(tmp_path: Path) -> None:
    """Header by header, in method, path, query and body; and none has a token in its URL."""
    async with field_of(CONDUIT) as field:
        ours, theirs = Recorder(), Recorder()
        with field.proxy.inject(ours, ALL):
            await have_all_sent(field, ours, tmp_path)
        assert ours.first.keys() == KINDS.keys()
        with field.proxy.inject(theirs, ALL):
            await send_with_nio(field.proxy.url, ours.first)
        for kind, sent in ours.first.items():
            # The access token is another one after another login.
            of_nio = theirs.first[kind]
            for headers in (sent.headers, of_nio.headers):
                assert headers.get("Authorization", "Bearer ").startswith("Bearer ")
                headers.update(dict.fromkeys(headers.keys() & {"Authorization"}, "Bearer ..."))
            assert sent.differences(of_nio) == MEANT[kind], kind
            assert "access_token" not in sent.query


async def have_all_sent(field: Field, recorder: Recorder, directory: Path) -> None:
    """Have the bot send a request of each kind."""
    field.bot.environment["MATRIX_INVITERS"] = ALICE
    room = field.server.room()
    await field.bot.run()
    await field.bot.kill()
    room.command(*range(12))
    invited, rejected = [field.server.room("leave") for _ in range(2)]
    for inviter, new in {ALICE: invited, "@mallory:echobot.test": rejected}.items():
        new.set_membership("invite", inviter)
    field.bot.environment["MATRIX_ACCESS_TOKEN"] = field.bot.session["access_token"]
    # Where discovery asks is the host of the user ID; it needs TLS.
    tls = new_certificate(field.bot, directory, "echobot.test")
    async with running_proxy(field.proxy.url, tls=tls) as server:
        with server.inject(recorder, KINDS["discovery"]):
            field.bot.customize = RESOLVER.format(port=server.url.rpartition(":")[2])
            field.bot.environment["MATRIX_HOMESERVER"] = ""
            await field.bot.start()
            await room.answers(*range(12))
            await field.bot.logs("Joined")
            await field.bot.logs("Left")
            await field.bot.kill()


async def send_with_nio(url: str, sent: dict[str, Sent]) -> None:
    """Send the same requests with nio's own client."""
    client = AsyncClient(url, BOT, device_id=json.loads(sent["login"].body)["device_id"])

    def query(kind: str, name: str) -> Any:
        return sent[kind].query[name][0]

    try:
        await client.discovery_info()
        await client.login(PASSWORD)
        await client.whoami()
        for kind in ("first sync", "sync"):
            only, since = json.loads(query(kind, "filter")), sent[kind].query.get("since", [None])
            await client.sync(int(query(kind, "timeout")), only, since[0])
        join, leave, messages, send = [
            sent[kind].line.split("/") for kind in ("join", "leave", "messages", "send")
        ]
        await client.join(join[-1])
        await client.room_leave(leave[-2])
        filter_ = sent["messages"].query.get("filter")
        await client.room_messages(
            messages[-2],
            query("messages", "from"),
            direction=MessageDirection(query("messages", "dir")),
            limit=int(query("messages", "limit")),
            message_filter=json.loads(filter_[0]) if filter_ else None,
        )
        content = json.loads(sent["send"].body)
        await client.room_send(send[-4], send[-2], content, send[-1])
    finally:
        await client.close()
