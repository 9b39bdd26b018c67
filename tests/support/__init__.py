"""What the tests are built from: a homeserver, a proxy that hurts, the bot as a process."""
