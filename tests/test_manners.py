"""How the command line behaves when it is interrupted, run twice, or run without a terminal."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_restore

from monge_sam_jax.__main__ import COMMANDS, main
from monge_sam_jax.experiments.bad_minimum.options import BadMinimum
from monge_sam_jax.experiments.bench.options import Bench
from monge_sam_jax.experiments.clip.options import Clip
from monge_sam_jax.experiments.common import progress, report
from monge_sam_jax.experiments.train import outputs
from monge_sam_jax.experiments.train.checkpoints import Checkpoints
from monge_sam_jax.experiments.train.models import MODELS

PATIENCE = 600  # seconds, which only a hang takes: the machine may be busy
SMALL = {
    "train": (
        *("--optimizers", "sgd", "monge_sam", "--epochs", "400", "--seeds", "1"),
        *("--checkpoint-every", "1"),
    ),
    "figures": (),
    "bench": ("--preset", "tiny"),
    "study": ("--preset", "smoke", "--tasks", "regression"),
    "edges": ("--seeds", "2"),
    "bad-minimum": ("--preset", "smoke"),
    "clip": ("--preset", "smoke"),
    "pairs": ("openclipart",),
}
# What is there when the work is under way, in the output folder; pairs needs packages to begin.
BEGUN = {
    "train": "checkpoints/epoch_*",
    "figures": "figure_1.png",
    "bench": "",
    "study": "finished/*start*.npz",
    "edges": "",
    "bad-minimum": "finished/start*.npz",
    "clip": "finished/start*.npz",
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


@pytest.mark.parametrize(
    "command",
    [name if name == "study" else pytest.param(name, marks=pytest.mark.slow) for name in BEGUN],
)
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
        main(["study", "--output", str(tmp_path)])
    assert exit_.value.code == 130
    err = capsys.readouterr().err
    assert err == "monge-sam: interrupted: nothing is kept; the same command begins anew\n"


@pytest.mark.parametrize(
    ("args", "streams"),
    [
        pytest.param(["bench", "--help"], ("stdout",), marks=pytest.mark.slow),
        (["--help"], ("stdout",)),
        pytest.param(["figures", "3", "--output", "{tmp}"], ("stdout",), marks=pytest.mark.slow),
        (["figures", "3", "--output", "{tmp}"], ("stdout", "stderr")),
        (["train", "--rounds", "3"], ("stderr",)),
    ],
)
def test_a_closed_pipe_ends_a_command_quietly(args, streams, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    others = {"stdout", "stderr"} - set(streams)
    process = subprocess.run(
        [sys.executable, "-m", "monge_sam_jax", *(arg.format(tmp=tmp_path) for arg in args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        **dict.fromkeys(streams, writing),
        **dict.fromkeys(others, subprocess.PIPE),
        check=False,
        timeout=PATIENCE,
    )
    os.close(writing)
    assert process.returncode == 141
    told = (process.stderr or b"").decode()
    assert all(line.startswith("figure 3 is drawn") for line in told.splitlines()), told
    assert not process.stdout
    if args[0] == "figures" and "stderr" not in streams:
        assert (tmp_path / "figures.json").exists()


# --- nothing is lost ---

OTHER = {  # options that differ from `SMALL`, and what the refusal calls them
    "train": (("--rho", "0.2"), "--rho (was the default, is 0.2)"),
    "figures": (("1", "2"), "the numbers of the figures (was 3, is 1 2)"),
    "bench": (("--rounds", "3"), "--rounds (was 9, is 3)"),
    "study": (("--rho", "0.3"), "--rho (was the default, is 0.3)"),
    "edges": (("--rho", "0.3"), "--rho (was 0.03 0.1 0.3 0.5 0.7 1.0, is 0.3)"),
    "bad-minimum": (("--momentum", "0.5"), "--momentum (was 0.9, is 0.5)"),
    "clip": (("--k", "5"), "--k (was 8, is 5)"),
    "pairs": (("--side", "32"), "--side (was 64, is 32)"),
}


class Begun(Exception):  # noqa: N818
    """The work would begin."""


@pytest.fixture
def only_prepare(monkeypatch):
    """Runs end when the folder is prepared, and their results are their configuration alone."""
    prepare = report.prepare_output

    def prepare_and_end(folder, configuration, *args, file=report.RESULTS, **options):
        prepare(folder, configuration, *args, file=file, **options)
        report.write_json(folder / file, {"configuration": configuration})
        raise Begun

    monkeypatch.setattr(report, "prepare_output", prepare_and_end)


@pytest.mark.parametrize("command", COMMANDS)
def test_results_of_other_options_are_not_overwritten_in_silence(
    command, tmp_path, capsys, only_prepare
):
    small = ("3",) if command == "figures" else SMALL[command]
    common = ("--output", str(tmp_path))
    other, named = OTHER[command]
    other = other if command == "figures" else (*small, *other)
    for _ in range(2):  # the same options may
        with pytest.raises(Begun):
            main([command, *small, *common])
    with pytest.raises(SystemExit) as exit_:
        main([command, *other, *common])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--output {tmp_path}: its " in line
    assert named in line
    assert "--overwrite" in line
    with pytest.raises(Begun):
        main([command, *other, *common, "--overwrite"])
    (file,) = tmp_path.glob("*.json")
    file.write_text("{}")
    with pytest.raises(SystemExit):
        main([command, *small, *common])
    assert "does not say of what options" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bad-minimum", "clip"])
def test_more_seeds_go_on_in_the_same_folder(command, tmp_path, capsys, only_prepare):
    first = [command, *SMALL[command], "--output", str(tmp_path)]
    for seeds in ("--seed 1 --seeds 2", "--seed 1 --seeds 3", "--seeds 4"):
        with pytest.raises(Begun):
            main([*first, *seeds.split()])
    other, named = OTHER[command]
    for options, told in (
        ("--seeds 3", "differ in --seeds (was 4, is 3);"),
        ("--seeds 4 --seed 1", "differ in --seed (was 0, is 1);"),
        (f"--seeds 5 {' '.join(other)}", f"differ in {named};"),
    ):
        with pytest.raises(SystemExit):
            main([*first, *options.split()])
        assert told in capsys.readouterr().err


def test_compiled_programs_of_other_options_are_not_overwritten(tmp_path, capsys, only_prepare):
    pytest.importorskip("jax_cuda12_plugin")
    command = ["bench", "--compile-for", "h100", "--output", str(tmp_path)]
    with pytest.raises(Begun):
        main(command)
    with pytest.raises(SystemExit):
        main([*command, "--models", "mlp"])
    assert "--models (was" in capsys.readouterr().err


def test_the_results_hold_the_configuration_that_is_compared(tmp_path, capsys):
    command = ["figures", "3", "--output", str(tmp_path)]
    main(command)
    main(command)
    with pytest.raises(SystemExit):
        main(["figures", "2", "--output", str(tmp_path)])
    assert "--overwrite" in capsys.readouterr().err


def test_embeddings_and_training_do_not_overwrite_each_other(tmp_path, capsys, only_prepare):
    points = np.random.default_rng(0).normal(size=(20, 4))
    np.savez(tmp_path / "e.npz", image=points, text=points)
    common = ["--output", str(tmp_path / "out")]
    with pytest.raises(Begun):
        main(["clip", "--embeddings", str(tmp_path / "e.npz"), *common])
    with pytest.raises(SystemExit):
        main(["clip", *common])
    assert "--embeddings (was" in capsys.readouterr().err


def test_every_preset_has_a_folder_of_its_own():
    assert Clip(preset="smoke").output == Path("runs/clip/smoke")
    assert BadMinimum().output == Path("runs/bad-minimum/digits")
    assert Bench().output == Path("runs/bench/small")
    assert Bench(compile_for="h100").resolved().output == Path("runs/bench/gpu")
    assert Clip(output=Path("x")).output == Path("x")


RATES = {
    "train": ("--learning-rate",),
    "edges": ("--learning-rate",),
    "bad-minimum": ("--learning-rate", "--confusion-learning-rate", "--fitting-learning-rate"),
    "clip": ("--sgd-rates", "--adam-rates"),
}
RADII = {
    "train": ("--rho", "--alpha", "--sharpness-rho"),
    "study": ("--rho",),
    "edges": ("--rho", "--momentum"),
    "bad-minimum": ("--rho", "--momentum"),
    "clip": ("--rho",),
}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (command, option, value)
        for table, values in ((RATES, ("0", "nan", "-1", "inf")), (RADII, ("nan", "-1", "inf")))
        for command, options in table.items()
        for option in options
        for value in values
    ],
)
def test_numbers_that_cannot_be_used_are_refused(command, option, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, option, value, "--output", str(tmp_path / "out")])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"monge-sam: error: {option} ")
    assert "finite" in line
    assert not (tmp_path / "out").exists()


# --- what training leaves ---

TRAINING = (
    *("--optimizers", "sgd", "monge_sam", "--epochs", "2", "--seeds", "2"),
    *("--checkpoint-every", "1"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    output = folder / "runs" / "digits"
    main(["train", *TRAINING, "--output", str(output)])
    return folder, output


def block_of_the_guide():
    guide = (Path(__file__).parents[1] / "notebooks" / "commands.md").read_text("utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", guide, re.S | re.M)
    return block


def test_the_guide_loads_params_and_predicts(trained, monkeypatch):
    folder, output = trained
    monkeypatch.chdir(folder)
    namespace = {}
    exec(block_of_the_guide(), namespace)
    labels = namespace["handwritten_digits"]().test.y
    accuracy = 100 * float(np.mean(namespace["digits"] == labels))
    results = json.loads((output / "results.json").read_text())
    final = results["optimizers"]["monge_sam"]["seeds"][0]["final"]
    assert accuracy == pytest.approx(final["test_accuracy"], abs=0.2)  # a sample is 0.11 %


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_that_was_logged_is_in_the_table(trained):
    _, output = trained
    rows = rows_of(output / "epochs.csv")
    assert len(rows) == 8
    results = json.loads((output / "results.json").read_text())["optimizers"]
    for row in rows:
        seed = results[row["optimizer"]]["seeds"][int(row["seed"])]
        epoch = int(row["epoch"]) - 1
        for quantity, values in seed["curves"].items():
            assert float(row[quantity]) == values[epoch]
        assert float(row["seconds_per_step"]) == seed["seconds_per_step"][epoch]
        assert (row["grad_norm"] == "") == (row["optimizer"] == "sgd")


def test_a_resumed_run_leaves_the_same(trained, tmp_path, monkeypatch):
    save = Checkpoints.save_if_due

    def save_and_end(self, stage):
        save(self, stage)
        if self.epochs_behind(stage) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_if_due", save_and_end)
        with pytest.raises(SystemExit) as exit_:
            main(["train", *TRAINING, "--output", str(tmp_path)])
        assert exit_.value.code == 130
    main(["train", *TRAINING, "--output", str(tmp_path), "--resume"])
    whole = {path.name: path.read_bytes() for path in (trained[1] / "params").iterdir()}
    assert len(whole) == 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "params").iterdir()} == whole
    expected, actual = (rows_of(folder / "epochs.csv") for folder in (trained[1], tmp_path))
    for row in (*expected, *actual):
        del row["seconds_per_step"]
    assert actual == expected


@pytest.mark.slow
def test_params_in_bfloat16_with_statistics_and_in_shards_are_whole(tmp_path, eight_devices):
    options = ("--model", "cnn", "--dtype", "bfloat16", "--optimizers", "sgd", "--epochs", "1")
    main(["train", *options, "--seeds", "1", "--sharding", "fsdp", "--output", str(tmp_path)])
    variables = msgpack_restore((tmp_path / "params" / "sgd_seed0.msgpack").read_bytes())
    assert set(variables) == {"params", "batch_stats"}
    model = MODELS["cnn"](10, dtype=jnp.bfloat16)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8), jnp.bfloat16))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variables)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), dict(like))


@pytest.mark.slow
def test_files_for_tensorboard_are_written_on_the_way(tmp_path, monkeypatch):
    written = {}

    class SummaryWriter:
        def __init__(self, folder):
            self.scalars = written.setdefault(Path(folder).name, [])

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def flush(self):
            self.scalars.append("flushed")

        def close(self):
            self.scalars.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    save = Checkpoints.save_if_due

    def save_and_end(self, stage):
        save(self, stage)
        if self.epochs_behind(stage) == 4:
            raise KeyboardInterrupt

    command = ["train", *TRAINING, "--output", str(tmp_path), "--tensorboard"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_if_due", save_and_end)
        with pytest.raises(SystemExit):
            main(command)
    # What was logged until the end is there already, but for the epoch that was interrupted.
    assert [s[2] for s in written["sgd_seed1"] if s[0] == "test_loss"] == [1]
    assert written["sgd_seed1"][-1] == "closed"
    written.clear()
    main([*command, "--resume"])
    results = json.loads((tmp_path / "results.json").read_text())["optimizers"]
    assert set(written) == {f"{o}_seed{s}" for o in ("sgd", "monge_sam") for s in (0, 1)}
    losses = [s[1:] for s in written["sgd_seed1"] if s[0] == "test_loss"]
    curve = results["sgd"]["seeds"][1]["curves"]["test_loss"]
    assert losses == [(value, epoch + 1) for epoch, value in enumerate(curve)]
    assert written["sgd_seed1"][-2:] == ["flushed", "closed"]


def test_what_tensorboard_needs_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outputs, "WRITERS", ("there_is_no_such_package",))
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--tensorboard", "--output", str(tmp_path)])
    assert exit_.value.code == 2
    assert "pip install tensorboardX" in capsys.readouterr().err


# --- how far it is ---


def test_without_a_terminal_there_is_a_line_for_every_epoch(tmp_path, capsys):
    main(["train", *TRAINING, "--output", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    number = r"\d[\d.e-]*"
    for line, (seed, epoch) in zip(lines, [(0, 1), (0, 2), (1, 1), (1, 2)], strict=True):
        left = 4 - 2 * seed - epoch
        pattern = (
            rf"seed {seed}, epoch {epoch}: train loss (sgd|monge_sam) {number}, "
            rf"(sgd|monge_sam) {number}, {left} of 4 epochs left, about \d+ s"
        )
        assert re.fullmatch(pattern, line), line


def test_without_a_terminal_there_is_a_line_for_every_stage(tmp_path, capsys):
    main(["figures", "3", "--output", str(tmp_path)])
    err = capsys.readouterr().err
    assert re.fullmatch(r"figure 3 is drawn, 0 of 1 figure left, about 0 s\n", err)


def tell(**options):
    with progress.steps("study", 10, completed=4, unit="epoch", **options) as told:
        told.begin("seed 0")
        told.begin_part("part", 2, "piece")
        told.end_part(0.125)
        told.end("epoch 5", 0.25)


def test_bars_tell_unit_loss_and_time_left(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    tell()
    err = capsys.readouterr().err
    for told in ("study: seed 0", " 5/10", "epochs", "loss 0.25", "1/2", "pieces", "loss 0.125"):
        assert told in err, told
    assert "5 of 10" not in err


def test_bars_have_room_on_a_terminal_of_eighty_columns(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with progress.steps("", 145, unit="run") as told:
        told.begin("seed 4, M-SAM, rate 0.0001, rho 0.03")
        told.begin_part("", 100, "epoch")
        told.end_part(0.01234)
        told.end(loss=0.01234)
    err = capsys.readouterr().err
    assert "rho 0.03" in err
    assert "…" not in err


def test_lines_tell_what_is_left_and_other_processes_nothing(capsys):
    tell()
    assert capsys.readouterr().err == "study: epoch 5, 5 of 10 epochs left, about 0 s\n"
    tell(silent=True)
    assert capsys.readouterr().err == ""


def test_a_first_process_that_is_alone_says_once_that_it_waits(tmp_path):
    options = ("--distributed", "--num-processes", "2", "--process-id", "0")
    address = ("--coordinator-address", f"127.0.0.1:{20000 + (os.getpid() + 1) % 10000}")
    process = start("train", *SMALL["train"], *options, *address, "--output", str(tmp_path / "out"))
    try:
        line = process.stderr.readline()
        assert line == "monge-sam: process 0 waits for the others, for up to 120 seconds\n"
    finally:
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err == "monge-sam: interrupted: nothing is kept; the same command begins anew\n"
