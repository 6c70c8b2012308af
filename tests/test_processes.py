"""Twenty steps on two processes of four devices each."""

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xla_flags
from trajectories import NAMES, assert_chain, assert_functional_form

WORKER = Path(__file__).with_name("process_worker.py")
PROCESSES, DEVICES = 2, 4
LIMIT = 600  # seconds until both are killed, which only a hang takes: the machine may be busy


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_workers(folder, modes):
    """What process 0 wrote; raises if a process fails or takes too long."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags.with_devices(DEVICES),
        "NO_PROXY": "127.0.0.1",
    }
    port, output = str(free_port()), folder / "ends.pickle"
    log = folder / "log"
    with log.open("w") as file:
        workers = [
            subprocess.Popen(
                [sys.executable, WORKER, port, str(PROCESSES), str(process), output, *modes],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for process in range(PROCESSES)
        ]
        try:
            deadline = time.monotonic() + LIMIT
            while any(worker.poll() is None for worker in workers):
                if any(worker.poll() for worker in workers) or time.monotonic() > deadline:
                    break  # the others would wait for the one that failed
                time.sleep(0.1)
            codes = [worker.poll() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    assert codes == [0] * PROCESSES, f"exit codes {codes} (None: killed)\n{log.read_text()}"
    return pickle.loads(output.read_bytes())


@pytest.mark.parametrize(
    "modes",
    [
        ("fully sharded", "shard_map"),
        pytest.param(("data parallel", "per_shard"), marks=pytest.mark.slow),
    ],
)
def test_two_processes(tmp_path, modes):
    """In one pair of processes, since they are slow to start."""
    ends = run_workers(tmp_path, modes)
    assert {mode: len(runs) for mode, runs in ends.items()} == dict.fromkeys(modes, len(NAMES) + 2)
    for mode in modes:
        if mode in ("data parallel", "fully sharded"):
            assert_chain(ends[mode], 1, mode=mode)
        else:
            assert_functional_form(ends[mode], PROCESSES * DEVICES, mode=mode)
        if mode == "shard_map":
            assert_chain(ends[mode], PROCESSES * DEVICES, mode=mode)
