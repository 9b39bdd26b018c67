"""A reverse proxy between bot and homeserver that hurts on command."""

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode

import aiohttp
import yarl
from aiohttp import web

from support.bot import eventually

Fault = Callable[["Proxy", web.Request], Awaitable[web.StreamResponse]]

# Which requests, as patterns on "METHOD /path?query".
ALL = ""
SYNC = r"/sync"
POLL = r"/sync\?.*since="
FIRST_SYNC = r"/sync\?(?!.*since=)"
SEND = r"PUT .*/send/"
JOIN = r"POST .*/join"
LOGIN = r"POST .*/login"
MESSAGES = r"/messages\?"

# What a homeserver says (with 401) of an access token that it does not know.
REFUSED = {"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown access token"}
SOFT_LOGOUT = {**REFUSED, "soft_logout": True}


@dataclass
class Injection:
    """A fault that is armed for requests that match a pattern, and what has come of it."""

    fault: Fault
    pattern: str
    times: float
    happened: int = 0

    def strikes(self, request: str) -> bool:
        """Decide whether it hits this request, and count it."""
        if self.happened >= self.times or not re.search(self.pattern, request):
            return False
        self.happened += 1
        return True

    async def happens(self, times: int = 1, seconds: float = 60) -> None:
        """Wait until it has hit so many requests."""
        what = f"the fault on {self.pattern!r}"
        await eventually(lambda: self.happened >= times, seconds, what)


class Proxy:
    """Listens on a free port of loopback, passes on what no fault hits, and counts.

    `speed`: that of the bot's clock; the homeserver is asked to hold polls so much shorter.
    `timeline_limit`: how many events a timeline may have, instead of what the bot asks for.
    """

    def __init__(self, upstream: str, http: aiohttp.ClientSession, speed: float) -> None:
        self.upstream, self.http, self.speed = upstream, http, speed
        self.timeline_limit: int | None = None
        self.url = ""
        self.requests: list[str] = []
        self.bytes_to_bot = 0
        self.injections: list[Injection] = []
        self.closing = asyncio.Event()

    @contextmanager
    def inject(
        self, fault: Fault, pattern: str = ALL, times: float = float("inf")
    ) -> Iterator[Injection]:
        """Hit matching requests with a fault for the length of the block, and count them."""
        injection = Injection(fault, pattern, times)
        self.injections.append(injection)
        try:
            yield injection
        finally:
            self.injections.remove(injection)

    def count(self, pattern: str) -> int:
        """Count the requests so far that match a pattern."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    async def counts(self, pattern: str, times: int) -> None:
        """Wait until so many requests have matched a pattern."""
        await eventually(lambda: self.count(pattern) >= times, what=f"{times} of {pattern!r}")

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer any request."""
        name = f"{request.method} {request.raw_path}"
        self.requests.append(name)
        await request.read()
        for injection in self.injections:
            if injection.strikes(name):
                return await injection.fault(self, request)
        return await self.forward(request)

    async def forward(self, request: web.Request, plain: bool = False) -> web.Response:
        """Have the homeserver answer a request; `plain` asks for an answer without compression."""
        headers = request.headers.copy()
        for name in ("Host", "Content-Length", "Transfer-Encoding", "Connection"):
            headers.pop(name, None)
        if plain or "Accept-Encoding" not in headers:
            headers["Accept-Encoding"] = "identity"
        try:
            async with self.http.request(
                request.method,
                yarl.URL(self.upstream + self._path(request.raw_path), encoded=True),
                data=await request.read() or None,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=300),
            ) as answer:
                body = await answer.read()
                names = ("content-type", "content-encoding", "retry-after")
                kept = {k: v for k, v in answer.headers.items() if k.lower() in names}
                self.bytes_to_bot += len(body)
                return web.Response(status=answer.status, body=body, headers=kept)
        except (OSError, aiohttp.ClientError):
            # The homeserver is not there: as without a proxy, the connection just ends.
            return cut(request)

    def _path(self, path: str) -> str:
        """Return the path and query to ask the homeserver for."""
        # To a proxy of HTTP_PROXY a request comes with a whole URL.
        path = re.sub(r"^http://[^/]*", "", path)
        endpoint, _, query = path.partition("?")
        if not endpoint.endswith("/sync"):
            return path
        asked = dict(parse_qsl(query))
        if self.timeline_limit:
            only = json.loads(asked["filter"])
            only["room"]["timeline"]["limit"] = self.timeline_limit
            asked["filter"] = json.dumps(only)
        if "timeout" in asked and self.speed != 1:
            timeout = int(asked["timeout"])
            asked["timeout"] = str(max(1, int(timeout / self.speed)))
            # Synapse repeats its answer to the same request: what was another has to stay so.
            asked["filter"] = asked.get("filter", "{}") + " " * (timeout % 1000)
        return f"{endpoint}?{urlencode(asked)}"


def cut(request: web.Request) -> web.Response:
    """Cut the connection of a request."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def answer(status: int, body: Any, **headers: str) -> Fault:
    """That status and JSON (or HTML, if it is a text) instead of the homeserver's answer."""

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        if isinstance(body, str):
            return web.Response(status=status, text=body, content_type="text/html")
        return web.json_response(body, status=status, headers=headers)

    return fault


def rate_limited(retry_after_ms: int) -> Fault:
    """429 with `retry_after_ms` in the body."""
    return answer(429, {"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": retry_after_ms})


def rate_limited_by_header(seconds: int) -> Fault:
    """429 with only a `Retry-After` header."""
    return answer(429, {"errcode": "M_LIMIT_EXCEEDED"}, **{"Retry-After": str(seconds)})


# As from a reverse proxy whose homeserver restarts, or that does not know it yet, from a homeserver
# in trouble, from a hotel's network, and from nobody knows what. What is refused without an errcode
# (here and below) is not refused by the homeserver.
bad_gateway = answer(502, "<html><body><h1>502 Bad Gateway</h1></body></html>")
not_found = answer(404, "<html>404 page not found</html>")
internal_error = answer(500, {"errcode": "M_UNKNOWN", "error": "Internal server error"})
not_json = answer(200, "<html>Please log in to the hotel's network</html>")
empty_object = answer(200, {})


async def cut_before(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The connection is cut before the request reaches the homeserver."""
    return cut(request)


async def cut_after(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The connection is cut after the homeserver did what it was asked: the answer is lost."""
    await proxy.forward(request)
    return cut(request)


async def cut_body(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The homeserver's answer is cut in the middle of its body."""
    await begin(await proxy.forward(request), request)
    return cut(request)


async def stall(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The homeserver's answer stops in the middle of its body and never goes on."""
    await begin(await proxy.forward(request), request)
    return await silence(proxy, request)


def in_turn(*course: Fault) -> Fault:
    """One fault after the other."""
    rest = iter(course)

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        return await next(rest)(proxy, request)

    return fault


async def begin(answer: web.Response, request: web.Request) -> None:
    """Send the first half of an answer."""
    if not isinstance(answer.body, bytes):
        return  # The homeserver was not there, the connection is cut already.
    half = web.StreamResponse(status=answer.status, headers=answer.headers)
    half.content_length = len(answer.body)
    await half.prepare(request)
    await half.write(answer.body[: len(answer.body) // 2])


async def silence(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The request is accepted and never answered."""
    await proxy.closing.wait()
    return cut(request)


async def done_but_silent(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """The homeserver does what it was asked, but its answer never comes."""
    await proxy.forward(request)
    return await silence(proxy, request)


def hold(until: Callable[[], Awaitable[object]]) -> Fault:
    """The request is passed on only after something was waited for."""

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        await until()
        return await proxy.forward(request)

    return fault


def withhold(until: Callable[[], Awaitable[object]]) -> Fault:
    """The request is forwarded at once, and its answer once this, called, has come true."""

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        answer = await proxy.forward(request)
        await until()
        return answer

    return fault


def delay(seconds: float) -> Fault:
    """The request is passed on only after a while."""
    return hold(partial(asyncio.sleep, seconds))


def slow(seconds: float) -> Fault:
    """The request is passed on only after so many s of the bot's clock, even if nobody waits."""
    return after(seconds, Proxy.forward)


def after(seconds: float, fault: Fault) -> Fault:
    """Another fault, so many s of the bot's clock late."""

    async def late(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds / proxy.speed)
        return await fault(proxy, request)

    return late


def impatient(seconds: float) -> Fault:
    """504, as from a proxy that waits only so many s of the bot's clock for the homeserver."""

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        try:
            return await asyncio.wait_for(proxy.forward(request), seconds / proxy.speed)
        except TimeoutError:
            return web.Response(status=504, text="<html>504 Gateway Time-out</html>")

    return fault


def rewrite(change: Callable[[Any], Any]) -> Fault:
    """The homeserver's JSON, as `change` returns it; what is not 200 passes as it is."""

    async def fault(proxy: Proxy, request: web.Request) -> web.StreamResponse:
        response = await proxy.forward(request, plain=True)
        if response.status != 200 or not isinstance(response.body, bytes):
            return response
        return web.json_response(change(json.loads(response.body)))

    return fault


@asynccontextmanager
async def served(
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]],
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """Serve HTTP on loopback for the length of the block, at a free port unless told; its URL."""
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def running_proxy(
    upstream: str, port: int = 0, tls: ssl.SSLContext | None = None, speed: float = 1
) -> AsyncIterator[Proxy]:
    """Run a proxy in front of a URL for the length of the block."""
    # Answers pass as they are: compressed stays compressed.
    http = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=0))
    proxy = Proxy(upstream, http, speed)
    async with http, served(proxy.handle, port, tls) as proxy.url:
        try:
            yield proxy
        finally:
            proxy.closing.set()


# Each kind of fault that can happen to any request, by name.
EVERY_FAULT: dict[str, Fault] = {
    "bad_gateway": bad_gateway,
    "not_found": not_found,
    "bad_request": answer(400, {}),
    "internal_error": internal_error,
    "cut_before": cut_before,
    "cut_after": cut_after,
    "cut_body": cut_body,
    "not_json": not_json,
    "empty_object": empty_object,
    "silence": silence,
    "stall": stall,
    "rate_limited": rate_limited(200),
    "rate_limited_by_header": rate_limited_by_header(1),
    "delay": delay(0.5),
}
