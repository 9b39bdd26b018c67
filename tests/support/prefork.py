"""Processes that are forked off one which has imported already what takes long.

Half a second of each start of a bot is the import of nio, and the tests start one 600 times.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# For each request it forks one that forks the new process, tells its ID, and how it ended.
PARENT = """
import gc, json, os, signal, socket, sys
import aiohttp, nio
requests = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
gc.freeze()
while True:
    request, descriptors, *_ = socket.recv_fds(requests, 2**20, 2)
    if not request:
        sys.exit()
    if not os.fork():
        break
    for descriptor in descriptors:
        os.close(descriptor)
output, report = descriptors
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
if child := os.fork():
    os.write(report, b"%d\\n" % child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(report, b"%d\\n" % status)
    os._exit(0)
os.dup2(output, 1)
os.dup2(output, 2)
requests.close()
os.closerange(3, 100)
request = json.loads(request)
os.environ.clear()
os.environ.update(request["environment"])

def become(script, first):
    sys.argv, sys.path[0] = [script], os.path.dirname(script)
    with open(script, "rb") as file:
        code = compile(file.read(), script, "exec")
    exec(first, dict())
    here = globals()
    for name in [name for name in here if not name.startswith("__")]:
        del here[name]
    here["__file__"] = script
    exec(code, here)

become(request["script"], request["first"])
"""


class Forked:
    """A process, as asyncio's are: its ID, its exit status once it has ended, or None."""

    def __init__(self, pid: int, report: asyncio.StreamReader) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.end = asyncio.create_task(self.ends(report))

    async def ends(self, report: asyncio.StreamReader) -> int:
        """Wait for the end of the process, return its exit status."""
        self.returncode = int(await report.readline())
        return self.returncode

    async def wait(self) -> int:
        """Wait for the end of the process, return its exit status."""
        return await asyncio.shield(self.end)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Parent:
    """The process that has imported what takes long; there is at most one that is `running`."""

    running: "Parent | None" = None

    def __init__(self, requests: socket.socket) -> None:
        self.requests = requests

    async def start(
        self, script: Path, environment: dict[str, str], output: int, first: str
    ) -> Forked:
        """Start a script in a process of its own, and in there the code `first` before it."""
        request = {"script": str(script), "environment": environment, "first": first}
        here, there = os.pipe()
        try:
            socket.send_fds(self.requests, [json.dumps(request).encode()], [output, there])
        finally:
            os.close(there)
        report = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(report), os.fdopen(here, "rb")
        )
        return Forked(int(await report.readline()), report)


@contextmanager
def preforking() -> Iterator[None]:
    """Have a parent for the length of the block, where there are such sockets: on Linux."""
    if sys.platform != "linux":
        yield
        return
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here:
        with there:
            process = subprocess.Popen(
                [sys.executable, "-c", PARENT, str(there.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,
            )
        Parent.running = Parent(here)
        try:
            yield
        finally:
            Parent.running = None
            here.close()
            process.wait()
