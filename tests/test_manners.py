"""How the command line behaves when it is interrupted, run twice, or run without a terminal."""

import os
import signal
import subprocess
import sys
import time

import pytest

from monge_sam_jax.__main__ import COMMANDS, main

PATIENCE = 120
SMALL = {
    "train": (
        *("--optimizers", "sgd", "monge_sam", "--epochs", "400", "--seeds", "1"),
        *("--checkpoint-every", "1"),
    ),
    "figures": (),
    "bench": ("--preset", "tiny"),
    "quality": ("--tasks", "label-noise"),
    "bad-minimum": ("--preset", "smoke"),
    "clip": ("--preset", "smoke"),
}
BEGUN = {  # what is there when the work is under way, in the output folder
    "train": "checkpoints/epoch_*",
    "figures": "figure_1.png",
    "bench": "",
    "quality": "",
    "bad-minimum": "kept/start*.npz",
    "clip": "finished/*/start*.npz",
}


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "monge_sam_jax", *args],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt(process):
    """As Ctrl-C in a terminal does: all processes of the group are told."""
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err, err
    assert process.returncode == 130, err
    (line,) = [line for line in err.splitlines() if line.startswith("monge-sam: ")]
    assert err.splitlines()[-1] == line
    return line.removeprefix("monge-sam: interrupted: ")


def alive_in(group):
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True)
    rows = map(str.split, listed.stdout.splitlines())
    return [pgid for pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


def wait_for(process, folder, pattern):
    end = time.monotonic() + PATIENCE
    while not [path for path in folder.glob(pattern) if "tmp" not in path.name]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_ends_a_command_with_one_line(command, tmp_path):
    output = tmp_path / "out"
    process = start(command, *SMALL[command], "--output", str(output))
    if BEGUN[command]:
        wait_for(process, output, BEGUN[command])
    else:
        wait_for(process, tmp_path, "out")
        time.sleep(2)
    line = interrupt(process)
    if BEGUN[command]:
        assert str(output) in line
    else:
        assert line == "nothing is kept; the same command begins anew"
    if command in ("bad-minimum", "clip"):
        assert "the same command goes on" in line
    if command == "train":
        assert "the same command with --resume goes on" in line
        process = start(command, *SMALL[command], "--output", str(output), "--resume")
        last = max(int(p.name.split("_")[1]) for p in output.glob("checkpoints/epoch_*[0-9]"))
        wait_for(process, output, f"checkpoints/epoch_{last + 1}")
        interrupt(process)


@pytest.mark.parametrize("delay", [0.8, 1.4])
def test_an_interrupt_during_imports_and_parsing(delay, tmp_path):
    process = start("bench", "--preset", "tiny", "--output", str(tmp_path / "out"))
    time.sleep(delay)
    assert interrupt(process).startswith("nothing ")


def test_the_processes_of_a_distributed_run_end_together(tmp_path):
    options = ("--distributed", "--num-processes", "1", "--process-id", "0")
    address = ("--coordinator-address", f"127.0.0.1:{20000 + os.getpid() % 10000}")
    output = tmp_path / "out"
    process = start("train", *SMALL["train"], *options, *address, "--output", str(output))
    wait_for(process, output, BEGUN["train"])
    assert "--resume" in interrupt(process)
    end = time.monotonic() + PATIENCE
    while alive_in(process.pid):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_interrupt_in_this_process(monkeypatch, tmp_path, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("monge_sam_jax.__main__.run", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["quality", "--output", str(tmp_path)])
    assert exit_.value.code == 130
    err = capsys.readouterr().err
    assert err == "monge-sam: interrupted: nothing is kept; the same command begins anew\n"
