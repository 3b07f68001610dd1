"""Asks `forks` for a process; as a script, it is a `python` whose processes are forks.

FOLDER ARGUMENTS: as `python ARGUMENTS`, with this process's environment, folder and open files.
"""

import array
import contextlib
import json
import os
import signal
import socket
import struct
import sys
from typing import Any

NAME = "python"


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A process's description, and the files that are to be its standard ones."""
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    files = array.array("i")
    for _, _, data in ancillary:
        files.frombytes(data)
    (size,) = struct.unpack("!I", head)
    text = b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text), list(files)


def has_ended(folder: str) -> RuntimeError:
    """That `forks` is no more, and what it said at last."""
    with open(os.path.join(folder, "errors")) as errors:
        return RuntimeError(f"the process that forks has ended:\n{errors.read()[-3000:]}")


class Fork:
    """A process that `forks` has been asked for.

    Raises:
        RuntimeError: `forks` has ended.
    """

    def __init__(
        self,
        folder: str,
        stage: str,
        arguments: list[str],
        environment: dict[str, str],
        cwd: str,
        files: tuple[int, int, int],
    ) -> None:
        self.folder = folder
        self.connection = socket.socket(socket.AF_UNIX)
        try:
            self.connection.connect(os.path.join(folder, stage))
        except ConnectionRefusedError:
            raise has_ended(folder) from None
        job = {
            "arguments": arguments,
            "environment": environment,
            "cwd": cwd,
            "python": os.path.join(folder, NAME),
        }
        text = json.dumps(job).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
        self.connection.sendmsg([struct.pack("!I", len(text))], rights)
        self.connection.sendall(text)

    def fileno(self) -> int:
        """What can be read from once the process has ended."""
        return self.connection.fileno()

    def wait(self) -> int:
        """The exit status; minus the signal where one ended it."""
        try:
            text = self.connection.recv(16)
        except ConnectionResetError:  # it ended before it had read what was asked
            text = b""
        self.connection.close()
        if not text:
            raise has_ended(self.folder)
        return int(text)

    def kill(self) -> None:
        """End it, and what it has started."""
        with contextlib.suppress(OSError):  # it has ended meanwhile
            self.connection.shutdown(socket.SHUT_WR)


def stage_of(arguments: list[str]) -> str:
    """The stage that has imported no more than such a command does."""
    begin = [word for word in arguments if word != "-u"][:3]
    on_cpu = (["-m", "megatron_mhc.run", "--cpu"], ["-m", "megatron_mhc", "convert"])
    dry = begin == ["-m", "megatron_mhc", "doctor"] and "--args" in arguments
    return "megatron" if dry or begin in on_cpu else "torch"


def main() -> None:
    """Be that process for who started this one: its status is this one's."""
    folder, *arguments = sys.argv[1:]
    stage = stage_of(arguments)
    status = Fork(folder, stage, arguments, dict(os.environ), os.getcwd(), (0, 1, 2)).wait()
    if status < 0:
        with contextlib.suppress(OSError):  # of what cannot be handled anyway
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
