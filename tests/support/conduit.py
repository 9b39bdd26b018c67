"""A real Conduit on loopback (SQLite), if ECHOBOT_CONDUIT names its program."""

import os
from typing import Any

from support.homeserver import PASSWORD, SERVER_NAME, Homeserver, MatrixError, User

CONDUIT = os.environ.get("ECHOBOT_CONDUIT", "")


class Conduit(Homeserver):
    """A Conduit process and its directory; it can be stopped, killed and started again."""

    name = "Conduit"
    room_versions = ("10", "11")

    def write_keys(self, seed: str) -> None:
        """Write nothing: it makes its own."""

    def command(self) -> list[str]:
        """Return the command that starts it."""
        return ["env", "CONDUIT_CONFIG=homeserver.toml", CONDUIT]

    def configuration(self) -> dict[str, Any]:
        """Write its configuration: no federation, anybody may register."""
        lines = [
            "[global]",
            f'server_name = "{SERVER_NAME}"',
            'address = "127.0.0.1"',
            f"port = {self.port}",
            'database_backend = "sqlite"',
            f'database_path = "{self.directory}/data"',
            "allow_registration = true",
            "allow_federation = false",
            "allow_check_for_updates = false",
            "trusted_servers = []",
            'log = "warn,state_res=warn"',
        ]
        (self.directory / "data").mkdir()
        (self.directory / "homeserver.toml").write_text("\n".join(lines) + "\n")
        return {}

    async def start(self) -> None:
        """Start it; its first user, who becomes its administrator, is nobody of a test."""
        is_new = self.process is None
        await super().start()
        if is_new:
            await self.register("administrator")

    async def register(self, localpart: str, password: str = PASSWORD) -> User:
        """Create an account and log in to it."""
        body = {"username": localpart, "password": password}
        try:
            return User(self, await self.request("POST", "/register", body))
        except MatrixError as error:
            session = error.answer["session"]
        auth = {"type": "m.login.dummy", "session": session}
        return User(self, await self.request("POST", "/register", {**body, "auth": auth}))
