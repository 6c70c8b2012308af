"""`monge-sam train --distributed` with real processes on this machine, and what ends them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import xla_flags

from monge_sam_jax.experiments.train import distributed

PATIENCE = 600  # seconds for a run that takes ten on an idle machine: only a hang takes them all
OPTIONS = (
    *("--optimizers", "monge_sam", "--rho", "0.5", "--learning-rate", "0.2"),
    *("--epochs", "4", "--seeds", "1", "--batch-size", "20", "--checkpoint-every", "1"),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """90 samples, so that the devices do not divide the test set of 45."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 6)) + y[:, None]
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """The results of one process with one device."""
    output = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "monge_sam_jax", "train", *OPTIONS, "--data", str(dataset)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, "--output", str(output)], env=environment, check=True)
    return results_in(output)


def results_in(output):
    return json.loads((output / "results.json").read_text())["optimizers"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """Processes of one run, each with a working folder of its own and shared checkpoints."""

    def __init__(self, folder, dataset):
        self.folders = [folder / str(i) for i in range(2)]
        self.data = ("--data", str(dataset), "--output", "out")
        self.started = []
        shared = self.folders[0] / "out" / "checkpoints"
        shared.mkdir(parents=True)
        (self.folders[1] / "out").mkdir(parents=True)
        (self.folders[1] / "out" / "checkpoints").symlink_to(shared)

    def start(self, *options, differ=((), ())):
        port = free_port()
        self.started = []
        for i, folder in enumerate(self.folders):
            command = [sys.executable, "-m", "monge_sam_jax", "train", "--distributed"]
            command += [*OPTIONS, *self.data, *options, *differ[i]]
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": xla_flags.with_devices(2),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            }
            self.started.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )

    def finish(self):
        """Of every process the exit code, and what it printed."""
        ended = []
        for process in self.started:
            out, err = process.communicate(timeout=PATIENCE)
            ended.append((process.returncode, out, err))
        return ended

    def wait_for(self, path):
        end = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < end
            assert all(process.poll() is None for process in self.started), self.finish()
            time.sleep(0.01)

    def kill(self):
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def processes(tmp_path, dataset):
    processes = Processes(tmp_path, dataset)
    yield processes
    processes.kill()


def assert_same_results(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, entry in expected.items():
        (seed,), (expected_seed,) = actual[name]["seeds"], entry["seeds"]
        assert seed["curves"].keys() == expected_seed["curves"].keys()
        for quantity, curve in expected_seed["curves"].items():
            np.testing.assert_allclose(seed["curves"][quantity], curve, rtol=tolerance)
        sharpness = expected_seed["final"]["sharpness"]
        np.testing.assert_allclose(seed["final"]["sharpness"], sharpness, rtol=20 * tolerance)


@pytest.mark.slow
def test_two_processes_train_fully_sharded_as_one_alone(processes, alone):
    processes.start("--sharding", "fsdp")
    (code, out, err), (other_code, *printed) = processes.finish()
    assert (code, other_code) == (0, 0), (err, printed)
    assert "M-SAM" in out
    assert printed == ["", ""]
    assert os.listdir(processes.folders[1] / "out") == ["checkpoints"]
    assert_same_results(results_in(processes.folders[0] / "out"), alone, 1e-5)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_resume_completes_it(processes, alone):
    processes.start()
    output = processes.folders[0] / "out"
    processes.wait_for(output / "checkpoints" / "epoch_2")
    os.kill(processes.started[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    (code, out, err), (killed_code, *_) = processes.finish()
    assert time.monotonic() - killed < 4 * distributed.HEARTBEAT_SECONDS
    assert (code, killed_code) == (3, -signal.SIGKILL)
    assert not out
    assert re.fullmatch(
        r"(seed 0, epoch \d: .* left, about .*\n)*monge-sam: error: (process 1|"
        "another process) of the run is gone or cannot be reached; "
        "start all processes again with --resume to go on from the last checkpoint\n",
        err,
    )
    assert not (output / "results.json").exists()

    processes.start("--resume")
    assert [code for code, *_ in processes.finish()] == [0, 0]
    assert_same_results(results_in(output), alone, 1e-5)


@pytest.mark.slow
def test_processes_with_different_options_part_in_good_order(processes):
    processes.start(differ=((), ("--rho", "0.1")))
    for code, out, err in processes.finish():
        assert (code, out) == (2, "")
        assert "processes 0 and 1 have not been given the same options or data" in err
        assert err.count("\n") == 1


FATAL = "Terminating process because the JAX distributed service detected fatal errors. "
UNHEALTHY = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
LEADER = "Either the leader task was preempted/died/restarted unexpectedly or this task"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (f"{UNHEALTHY}1\nThe tasks have crashed.\n{FATAL}{UNHEALTHY}1\nThe", "process 1 of the"),
        (f"{FATAL}{UNHEALTHY}12\n3\nThe tasks have crashed", "process 3 and process 12 of the"),
        (f"{FATAL}{UNHEALTHY}/job:jax_worker/replica:0/task:1\nThe", "process 1 of the run"),
        (f"{FATAL}UNAVAILABLE: {LEADER}", "process 0 of the run"),
        (f"{FATAL}DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.X/RegisterTask", "have joined it"),
        ("[enforce fail at external/gloo/gloo/transport/tcp/pair.cc:1]", "another process of the"),
        ("Check failed: x == y", "the training was ended by SIGABRT"),
    ],
)
def test_what_jax_writes_before_it_aborts_is_said_in_one_line(log, reason, capsys):
    assert reason in distributed._reason(-signal.SIGABRT, log)
    assert ("Check failed" in capsys.readouterr().err) == ("Check failed" in log)
