"""A real Dendrite on loopback (SQLite, one process), if ECHOBOT_DENDRITE names its program."""

import os
from typing import Any

from support.homeserver import SERVER_NAME, Homeserver

DENDRITE = os.environ.get("ECHOBOT_DENDRITE", "")


class Dendrite(Homeserver):
    """A Dendrite process and its directory; it can be stopped, killed and started again."""

    name = "Dendrite"
    room_versions = ("10", "11")
    from_the_beginning = {"from": "t0_1"}

    def write_keys(self, seed: str) -> None:
        """Write the key that signs its events."""
        kind = "MATRIX PRIVATE KEY"
        lines = [f"-----BEGIN {kind}-----", "Key-ID: ed25519:test", "", seed + "="]
        (self.directory / "signing.pem").write_text("\n".join([*lines, f"-----END {kind}-----\n"]))

    def command(self) -> list[str]:
        """Return the command that starts it."""
        address = f"127.0.0.1:{self.port}"
        options = ["-config", "homeserver.yaml", "-http-bind-address", address]
        return [DENDRITE, *options, "-really-enable-open-registration"]

    def configuration(self) -> dict[str, Any]:
        """Return its configuration: no rate limits, no federation, quick passwords."""

        def database(name: str) -> dict[str, Any]:
            return {"connection_string": f"file:{name}.db"}

        parts = ("federation_api", "key_server", "mscs", "relay_api", "room_server", "sync_api")
        return {
            "version": 2,
            **{part: {"database": database(part)} for part in parts},
            "media_api": {"database": database("media_api"), "base_path": "./media"},
            "global": {
                "server_name": SERVER_NAME,
                "private_key": "signing.pem",
                "disable_federation": True,
                "jetstream": {"storage_path": "./"},
                "cache": {"max_size_estimated": "64mb"},
            },
            "client_api": {
                "registration_disabled": False,
                "rate_limiting": {"enabled": False},
            },
            "user_api": {"account_database": database("user_api"), "bcrypt_cost": 4},
            "logging": [{"type": "std", "level": "warn"}],
        }
