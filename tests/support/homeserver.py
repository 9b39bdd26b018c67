"""A real Synapse on loopback (SQLite, a free port, a temporary directory) and users on it."""

import asyncio
import base64
import itertools
import json
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import aiohttp

SERVER_NAME = "echobot.test"
PASSWORD = "correct horse battery staple"

# Enough that no test meets a limit; a test that is about limits leaves these out.
UNLIMITED = {"per_second": 10_000, "burst_count": 10_000}
NO_RATE_LIMITS: dict[str, Any] = {
    **dict.fromkeys(("rc_message", "rc_registration", "rc_joins_per_room"), UNLIMITED),
    **dict.fromkeys(("rc_admin_redaction", "rc_room_creation"), UNLIMITED),
    "rc_login": dict.fromkeys(("address", "account", "failed_attempts"), UNLIMITED),
    "rc_joins": dict.fromkeys(("local", "remote"), UNLIMITED),
    "rc_invites": dict.fromkeys(("per_room", "per_user", "per_issuer"), UNLIMITED),
}


def free_port() -> int:
    """Find a port that nothing listens on, and that nobody gets who asks the system for any."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


class MatrixError(Exception):
    """An answer of the homeserver other than 200: `status` (HTTP) and `errcode`."""

    def __init__(self, status: int, answer: Any) -> None:
        super().__init__(f"{status} {answer}")
        self.status, self.answer = status, answer
        self.errcode = answer.get("errcode") if isinstance(answer, dict) else None


class User:
    """An account on the homeserver with one access token, spoken for over plain HTTP."""

    def __init__(self, homeserver: "Homeserver", answer: dict[str, Any]) -> None:
        self.homeserver = homeserver
        self.user_id: str = answer["user_id"]
        self.device_id: str = answer["device_id"]
        self.access_token: str = answer["access_token"]
        self.transaction_ids = (f"t{n}" for n in itertools.count())

    async def request(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """Request `/_matrix/client/v3` + path as this user; return JSON or raise MatrixError."""
        token = self.access_token
        return await self.homeserver.request(method, path, body, access_token=token, **query)

    async def create_room(self, *invite: str, **options: Any) -> str:
        """Create a room, return its ID."""
        body = {"preset": "private_chat", "invite": invite, **options}
        room_id: str = (await self.request("POST", "/createRoom", body))["room_id"]
        return room_id

    async def invite(self, room_id: str, user_id: str) -> None:
        """Invite somebody into a room."""
        await self.request("POST", f"/rooms/{quote(room_id)}/invite", {"user_id": user_id})

    async def join(self, room_id: str) -> None:
        """Join a room."""
        await self.request("POST", f"/join/{quote(room_id)}", {})

    async def send(self, room_id: str, body: str, **content: Any) -> str:
        """Send a text message, with `content` over the ordinary one; return its event ID."""
        message = {"msgtype": "m.text", "body": body, **content}
        return await self.send_event(room_id, "m.room.message", message)

    async def send_event(self, room_id: str, kind: str, content: Any) -> str:
        """Send any event; return its event ID."""
        path = f"/rooms/{quote(room_id)}/send/{kind}/{next(self.transaction_ids)}"
        event_id: str = (await self.request("PUT", path, content))["event_id"]
        return event_id

    async def members(self, room_id: str, membership: str = "join") -> set[str]:
        """Return the user IDs with that membership of the room."""
        answer = await self.request(
            "GET", f"/rooms/{quote(room_id)}/members", membership=membership
        )
        return {event["state_key"] for event in answer["chunk"]}

    async def events(self, room_id: str, *kinds: str) -> list[dict[str, Any]]:
        """Return all events of these types in the room (default: messages), oldest first."""
        # Dendrite loses events between two pages: it gives one, and its last event once more.
        kinds = kinds or ("m.room.message",)
        asked = {"types": kinds, "limit": 100_000}
        query = {"dir": "f", "limit": 1000, "filter": json.dumps(asked)}
        query |= self.homeserver.from_the_beginning
        events: dict[str, dict[str, Any]] = {}
        while True:
            page = await self.request("GET", f"/rooms/{quote(room_id)}/messages", **query)
            # Conduit heeds no types.
            events |= {e["event_id"]: e for e in page["chunk"] if e["type"] in kinds}
            if "end" not in page:
                return list(events.values())
            query["from"] = page["end"]

    async def devices(self) -> set[str]:
        """Return the IDs of the account's devices."""
        return {d["device_id"] for d in (await self.request("GET", "/devices"))["devices"]}


class Homeserver:
    """A Synapse process and its directory; it can be stopped, killed and started again."""

    name = "Synapse"
    room_versions: tuple[str, ...] = ("11", "12")
    from_the_beginning: dict[str, str] = {}  # what /messages wants, to read forward

    def __init__(
        self, directory: Path, http: aiohttp.ClientSession, settings: dict[str, Any]
    ) -> None:
        self.directory, self.http = directory, http
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "homeserver.log"
        self.process: asyncio.subprocess.Process | None = None
        self.write_keys(base64.b64encode(secrets.token_bytes(32)).decode().rstrip("="))
        # JSON is YAML.
        (directory / "homeserver.yaml").write_text(json.dumps(self.configuration() | settings))

    def write_keys(self, seed: str) -> None:
        """Write what the configuration refers to; `seed`: of the key that signs its events."""
        (self.directory / "signing.key").write_text(f"ed25519 a_test {seed}\n")
        log = {"version": 1, "root": {"level": "WARNING"}}
        (self.directory / "log.yaml").write_text(json.dumps(log))

    def command(self) -> list[str]:
        """Return the command that starts it."""
        configuration = str(self.directory / "homeserver.yaml")
        return [sys.executable, "-m", "synapse.app.homeserver", "-c", configuration]

    def configuration(self) -> dict[str, Any]:
        """Return what homeserver.yaml has for any test."""
        listener = {"port": self.port, "bind_addresses": ["127.0.0.1"], "type": "http"}
        resources = {"names": ["client", "federation"], "compress": True}
        database = {"database": str(self.directory / "homeserver.db")}
        return {
            "server_name": SERVER_NAME,
            "public_baseurl": self.url,
            "listeners": [{**listener, "resources": [resources]}],
            "database": {"name": "sqlite3", "args": database},
            "signing_key_path": str(self.directory / "signing.key"),
            "media_store_path": str(self.directory / "media"),
            "trusted_key_servers": [],
            "report_stats": False,
            "enable_registration": True,
            "enable_registration_without_verification": True,
            "registration_shared_secret": secrets.token_hex(),
            "macaroon_secret_key": secrets.token_hex(),
            "form_secret": secrets.token_hex(),
            "bcrypt_rounds": 4,
            "log_config": str(self.directory / "log.yaml"),
        }

    async def start(self) -> None:
        """Start it and return once it answers; raise RuntimeError if it does not come up."""
        with self.log.open("a") as log:
            self.process = process = await asyncio.create_subprocess_exec(
                *self.command(),
                cwd=self.directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in a terminal is for whoever started this, who then stops it in order.
                start_new_session=True,
            )
        while process.returncode is None:
            with suppress(OSError, aiohttp.ClientError, MatrixError):
                await self.request("GET", "/_matrix/client/versions")
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"{self.name} did not start: {self.log.read_text()[-2000:]}")

    async def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop it, in order unless told."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
            await self.process.wait()

    async def kill(self) -> None:
        """Stop it as a power cut would."""
        await self.stop(signal.SIGKILL)

    async def request(
        self, method: str, path: str, body: Any = None, access_token: str = "", **query: Any
    ) -> Any:
        """Make a request; return JSON; raise MatrixError (not 200) or aiohttp.ClientError."""
        base = "" if path.startswith("/_") else "/_matrix/client/v3"
        headers = {"Authorization": f"Bearer {access_token}"} if access_token else {}
        async with self.http.request(
            method, self.url + base + path, json=body, params=query, headers=headers
        ) as response:
            answer = await response.json(content_type=None)
            if response.status != 200:
                raise MatrixError(response.status, answer)
            return answer

    async def register(self, localpart: str, password: str = PASSWORD) -> User:
        """Create an account and log in to it."""
        body = {"username": localpart, "password": password, "auth": {"type": "m.login.dummy"}}
        return User(self, await self.request("POST", "/register", body))

    async def log_in(self, user_id: str, password: str = PASSWORD) -> User:
        """Log in to an account, on a new device."""
        body = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": user_id},
            "password": password,
        }
        return User(self, await self.request("POST", "/login", body))

    async def revoke(self, access_token: str) -> None:
        """Forget an access token, as if its user had logged that device out."""
        await self.request("POST", "/logout", {}, access_token=access_token)


@asynccontextmanager
async def running_homeserver(
    settings: dict[str, Any] | None = None, drop: Iterable[str] = ()
) -> AsyncIterator[Homeserver]:
    """Run a Synapse for the length of the block: no rate limits, but its own for `drop`."""
    limits = {name: limit for name, limit in NO_RATE_LIMITS.items() if name not in drop}
    async with running(Homeserver, limits | (settings or {})) as homeserver:
        yield homeserver


@asynccontextmanager
async def running(
    kind: type[Homeserver], settings: dict[str, Any] | None = None
) -> AsyncIterator[Homeserver]:
    """Run a homeserver for the length of the block, in a directory of its own."""
    with TemporaryDirectory(prefix="echobot-homeserver-") as directory:
        async with aiohttp.ClientSession() as http:
            homeserver = kind(Path(directory), http, settings or {})
            try:
                await homeserver.start()
                yield homeserver
            finally:
                await homeserver.stop()
