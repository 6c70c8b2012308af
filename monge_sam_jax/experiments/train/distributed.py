"""A run of several processes, and how each of them ends when another is gone.

Where a process of a run dies, a collective of the others fails or hangs, and after some
`HEARTBEAT_SECONDS` without a sign of life JAX aborts them from C++, with a dump and out of Python's
reach. So the work is done in a child process, and its parent says in one line what happened.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from monge_sam_jax.experiments.common.errors import InputError, LostProcessError
from monge_sam_jax.experiments.train.options import Train

HEARTBEAT_SECONDS = 15
JOINING_SECONDS = 120
PATIENCE_SECONDS = 3
RESUME = "start all processes again with --resume to go on from the last checkpoint"


def supervise(options: Train) -> None:
    """Runs the command in a process of its own.

    Args:
      options: checked ones.

    Raises:
      InputError: the work raised it.
      LostProcessError: the work was ended from outside.
      SystemExit: the work failed, and has printed why.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(options, writer, log), daemon=True)
        with _deaf_to_interrupts():
            process.start()
        writer.close()
        try:
            process.join()
        finally:
            process.kill()  # where Ctrl-C ended the wait; its peers find out
            process.join()
        with contextlib.suppress(EOFError):  # nothing was sent
            raise reader.recv()
        if process.exitcode is not None and process.exitcode < 0:
            raise LostProcessError(_reason(process.exitcode, log.read_text(errors="replace")))
        sys.exit(process.exitcode)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; a child that is started here ignores it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _reason(exitcode: int, log: str) -> str:
    """Why the work was ended, by what the libraries under JAX have written to the log."""
    if "RegisterTask" in log:
        return f"not all processes of the run have joined it within {JOINING_SECONDS} seconds"
    if "JAX distributed service detected fatal errors" in log:
        # "... tasks are unhealthy (stopped sending heartbeats):", and a line for each that ends
        # with its number; the service itself is in process 0.
        lines = re.findall(r"unhealthy[^\n]*:\n((?:[^\n]*\d\n)+)", log)
        gone = sorted({int(n) for n in re.findall(r"(\d+)\n", "".join(lines))}) or [0]
        who = " and ".join(f"process {n}" for n in gone)
    elif "external/gloo" in log:
        who = "another process"
    else:
        print(log, file=sys.stderr)
        return f"the training was ended by {signal.Signals(-exitcode).name}; {RESUME}"
    return f"{who} of the run is gone or cannot be reached; {RESUME}"


def _work(options: Train, writer: Any, log: Path) -> None:
    """Joins the other processes and runs the command; hands the parent the user's errors."""
    _keep_native_output_in(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from monge_sam_jax.experiments.train import comparison

        _join(options)
        _run(comparison.run, options)
    except (InputError, ModuleNotFoundError) as error:
        writer.send(error)


def _run(command: Callable[[Train], None], options: Train) -> None:
    import jax

    try:
        command(options)
    except InputError:
        jax.distributed.shutdown()  # all processes raise it, so that they can part in good order
        raise
    except jax.errors.JaxRuntimeError:
        # A collective whose other end is gone: JAX will soon find out and abort. If nobody is gone
        # it is an error like any other.
        time.sleep(2 * HEARTBEAT_SECONDS)
        raise
    jax.distributed.shutdown()


def _say_that_it_waits(options: Train) -> threading.Timer:
    """Begins to wait for the others; process 0 says so, if they do not come soon."""

    def say() -> None:
        print(
            f"monge-sam: process 0 waits for the others, for up to {JOINING_SECONDS} seconds",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(PATIENCE_SECONDS, say)
    timer.daemon = True
    if _number(options.process_id, "JAX_PROCESS_ID") == 0:
        timer.start()
    return timer


def _join(options: Train) -> None:
    import jax

    timer = _say_that_it_waits(options)
    try:
        jax.distributed.initialize(
            options.coordinator_address,
            _number(options.num_processes, "JAX_NUM_PROCESSES"),
            _number(options.process_id, "JAX_PROCESS_ID"),
            initialization_timeout=JOINING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: {error} (--coordinator-address, --num-processes and --process-id, or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, say where to join)"
        ) from error
    finally:
        timer.cancel()


def _number(option: int | None, variable: str) -> int | None:
    """The option, or what the environment says; JAX itself reads the address alone."""
    if option is not None or variable not in os.environ:
        return option
    try:
        return int(os.environ[variable])
    except ValueError:
        raise InputError(f"${variable} must be an integer, got {os.environ[variable]}") from None


def _keep_native_output_in(log: Path) -> None:
    """Sends what JAX's libraries print past Python to a file: it is noise, or for the parent."""
    with log.open("w") as file:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            descriptor = stream.fileno()
            kept = os.dup(descriptor)
            os.dup2(file.fileno(), descriptor)
            setattr(sys, name, os.fdopen(kept, "w", 1, stream.encoding, stream.errors))


def _end_with_parent() -> None:
    """Leaves no worker behind whose parent was killed; its peers find out."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
