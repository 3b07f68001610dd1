"""Python processes as forks of one that has imported what they import, so that each starts at once.

python -m tests.megatron.common.forks FOLDER

Serves two sockets in FOLDER until standard input ends: `torch` forks a process that has imported
PyTorch, `megatron` one that has Megatron too, with the CPU for CUDA, as `megatron_mhc.run --cpu`
imports it. `fork_client` says what goes over them.
"""

import argparse
import atexit
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import inspect
import multiprocessing.util
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: F401

from tests.megatron.common.fork_client import receive

PATH = list(sys.path)
# what a script imports before any patch of ours, and what the tests' own processes do
MEGATRON = (
    "megatron.training",
    "megatron.training.argument_utils",
    "megatron.training.arguments",
    "megatron.training.training",
    "megatron.core.datasets.gpt_dataset",
    # every tokenizer there is, and with them transformers: longer than a run of a few steps
    "megatron.core.tokenizers.text.libraries",
    "megatron_mhc.spec",
    "megatron_mhc.start.activate",
    "tests.megatron.common.train",
)


def import_megatron() -> None:
    """What `megatron_mhc.run --cpu` does before a script begins."""
    from megatron_mhc.patches import cpu

    cpu.enter()
    # a file is read for each of some hundred questions
    importlib.metadata.version = functools.cache(importlib.metadata.version)
    for module in MEGATRON:
        importlib.import_module(module)
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.training.arguments import add_megatron_arguments

    # a run of a few steps would shuffle ten million samples; a process of the stage before does
    MockGPTLowLevelDataset.size = 1000
    # Megatron reads its own sources for the help of its flags, twice a run
    inspect.getsource = functools.cache(inspect.getsource)
    add_megatron_arguments(argparse.ArgumentParser())


def run_to_the_end(program: Callable[[], object]) -> None:
    """Run it as Python runs a program, and end; but without taking all that was imported apart."""
    status = 0
    try:
        program()
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        if status and not isinstance(asked.code, int):
            print(asked.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError):  # multiprocessing's tracker closes its own
                stream.flush()
    finally:  # whatever else happens, the caller's frames are not this process's
        os._exit(status)


def spawn_as_fork(_: bytes, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """What multiprocessing spawns (Megatron's writers of checkpoints), without its imports."""
    process = os.fork()
    if process:
        return process
    for file in map(int, os.listdir("/proc/self/fd")):
        if file not in (0, 1, 2, *kept):
            with contextlib.suppress(OSError):  # what listed them
                os.close(file)
    code = list(arguments)[list(arguments).index("-c") + 1 :]
    sys.argv = ["-c", *code[1:]]
    atexit._clear()
    run_to_the_end(lambda: exec(code[0], {}))
    return 0


def become(job: dict[str, Any], files: list[int]) -> None:
    """Turn a fork into the process that `python ARGUMENTS` starts, and run it to its end."""
    multiprocessing.util.spawnv_passfds = spawn_as_fork  # type: ignore[attr-defined]
    os.setsid()  # a group of its own, by which `end` finds what it leaves
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.executable = job["python"]
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *(path for path in added if path not in PATH), *PATH[1:]]
    if any(Path(path, "sitecustomize.py").exists() for path in added):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    arguments = [word for word in job["arguments"] if word != "-u"]
    first, rest = arguments[0], arguments[1:]
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(first)), arguments
        runpy.run_path(first, run_name="__main__")


def end(process: int) -> None:
    """Kill a process, or what it has left: a killed one leaves its writers behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


class Server:
    """Forks a process for each connection, and tells its exit status there.

    Who closes the connection, or its writing half, ends the process.
    """

    def __init__(self, **listeners: socket.socket) -> None:
        self.listeners = listeners
        self.ready = selectors.DefaultSelector()
        self.ready.register(0, selectors.EVENT_READ, self.close)
        for name, listener in listeners.items():
            self.ready.register(listener, selectors.EVENT_READ, getattr(self, f"accept_{name}"))
        self.jobs: dict[int, socket.socket] = {}
        self.next_stage = 0
        self.is_open = True

    def serve(self) -> None:
        """Until standard input ends."""
        while self.is_open:
            for key, _ in self.ready.select():
                key.data()

    def close(self) -> None:
        """End everything."""
        self.is_open = False
        for process in self.jobs:
            end(process)
            os.waitpid(process, 0)
        if self.next_stage:
            os.waitpid(self.next_stage, 0)

    def forget(self) -> None:
        """In a fork: what is the parent's."""
        self.ready.close()
        for other in (*self.listeners.values(), *self.jobs.values()):
            other.close()

    def accept_megatron(self) -> None:
        """The next stage is wanted (or, in it, a process)."""
        if "torch" not in self.listeners:
            self.accept(self.listeners["megatron"])
            return
        listener = self.listeners.pop("megatron")
        self.ready.unregister(listener)
        self.next_stage = os.fork()
        if self.next_stage:
            listener.close()
            return
        self.forget()
        import_megatron()
        gc.freeze()
        Server(megatron=listener).serve()
        os._exit(0)

    def accept_torch(self) -> None:
        """A process is wanted."""
        self.accept(self.listeners["torch"])

    def accept(self, listener: socket.socket) -> None:
        """Fork it."""
        connection, _ = listener.accept()
        job, files = receive(connection)
        process = os.fork()
        if not process:
            self.forget()
            connection.close()
            run_to_the_end(lambda: become(job, files))
        for file in files:
            os.close(file)
        self.jobs[process] = connection
        handle = os.pidfd_open(process)

        def ended() -> None:
            self.ready.unregister(handle)
            os.close(handle)
            with contextlib.suppress(KeyError):  # who waits has said no more
                self.ready.unregister(connection)
            _, status = os.waitpid(process, 0)
            end(process)
            del self.jobs[process]
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            connection.close()

        def unwanted() -> None:
            if process in self.jobs:  # it has not ended in the same moment
                self.ready.unregister(connection)
                end(process)

        self.ready.register(handle, selectors.EVENT_READ, ended)
        self.ready.register(connection, selectors.EVENT_READ, unwanted)


def main() -> None:
    """Bind both sockets, and serve."""
    listeners = {}
    for name in ("torch", "megatron"):
        listeners[name] = socket.socket(socket.AF_UNIX)
        listeners[name].bind(str(Path(sys.argv[1], name)))
        listeners[name].listen(64)
    print("ready", flush=True)
    gc.freeze()
    Server(**listeners).serve()


if __name__ == "__main__":
    main()
