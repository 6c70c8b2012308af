"""What the command line says: help, slips, and what is missing."""

import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest

import monge_sam_jax
from monge_sam_jax.__main__ import COMMANDS, main
from monge_sam_jax.experiments.bad_minimum.claims import claims as bad_minimum_claims
from monge_sam_jax.experiments.bad_minimum.options import PRESETS as BAD_MINIMUM
from monge_sam_jax.experiments.bench import report as bench_report
from monge_sam_jax.experiments.bench.options import SIZES
from monge_sam_jax.experiments.clip import report as clip_report
from monge_sam_jax.experiments.clip.options import PRESETS as CLIP
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.study.options import PRESETS as STUDY

WIDTH = 80


def spoken(capsys, *args, code=0):
    """What a command prints on either stream before it leaves with the code."""
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == code
    return "".join(capsys.readouterr())


def test_the_version(capsys):
    assert spoken(capsys, "--version") == f"monge-sam {monge_sam_jax.__version__}\n"


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_a_sentence_for_each_command(option, capsys):
    lines = spoken(capsys, option).splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) < WIDTH
    for name in COMMANDS:
        (line,) = (line for line in lines if line.split()[:1] == [name])
        rest = " ".join([line, *lines[lines.index(line) + 1 :]])
        sentence = COMMANDS[name].options.__doc__.splitlines()[0]
        assert sentence.endswith(".")
        assert sentence in " ".join(rest.split())


def test_help_is_the_same_on_a_pipe_and_on_a_terminal():
    environment = os.environ | {"COLUMNS": str(WIDTH)}
    command = [sys.executable, "-m", "monge_sam_jax", "--help"]
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stdout
    assert max(map(len, piped.stdout.splitlines())) < WIDTH
    ours, theirs = pty.openpty()
    try:
        subprocess.run(command, env=environment, stdout=theirs, check=True)
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert shown.replace("\r\n", "\n") == piped.stdout


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (["trian"], "no command trian; did you mean train?"),
        (["bad_minimum"], "did you mean bad-minimum?"),
        (["xyz"], "no command xyz; it comes first and is one of train, "),
        (["--epochs", "3", "train"], "no command --epochs; it comes first"),
        ([], "a command is needed; it comes first and is one of train, "),
    ],
)
def test_a_slip_is_answered_in_one_line(args, answer, capsys):
    text = spoken(capsys, *args, code=2)
    assert answer in text
    assert text.count("\n") == 1


def test_a_slip_in_an_option_is_answered_with_this_commands_own(capsys):
    text = spoken(capsys, "train", "--epchs", "3", code=2)
    assert "--epochs INT" in text
    assert "study" not in text


def leaves(value):
    """The numbers and names in a table of presets."""
    if isinstance(value, dict):
        value = tuple(value.values())
    return (
        [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple) else [value]
    )


@pytest.mark.parametrize(
    ("command", "presets"),
    [
        ("bench", SIZES),
        ("bad-minimum", {name: vars(recipe) for name, recipe in BAD_MINIMUM.items()}),
        ("clip", CLIP),
        ("study", {name: preset._asdict() for name, preset in STUDY.items()}),
    ],
)
def test_help_has_the_values_of_presets(command, presets, capsys):
    text = spoken(capsys, command, "--help")
    for name, preset in presets.items():
        (line,) = re.findall(rf"^(?:Preset|Default) {name}: (.*)\.$", text, re.M)
        words = re.split(r"[ ,()]+", line)
        for leaf in leaves(preset):
            assert (f"{leaf:g}" if isinstance(leaf, float) else str(leaf)) in words


CLAIMS = [{"claim": "a is b", "measured": "+1.0 ± 0.1", "verdict": "yes"}]
HEADERS = {"claim": "claim", "verdict": "holds?", "measured": "by count"}


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        ({"preset": "smoke", "seeds": 5}, "No verdicts: preset smoke shows"),
        ({"preset": "digits", "seeds": 2}, "No verdicts from 2 seeds: they need at least 3."),
        ({"seeds": 1}, "No verdicts from 1 seed: they need at least 3."),
    ],
)
def test_too_little_is_not_judged(configuration, reason):
    claims = report.without_verdicts(CLAIMS, configuration)
    assert claims == [CLAIMS[0] | {"verdict": None}]
    lines = report.claims_table({"configuration": configuration, "claims": claims}, HEADERS)
    assert lines[0].startswith(reason)
    assert lines[2:] == ["| claim | by count |", "|---|---|", "| a is b | +1.0 ± 0.1 |"]


def test_enough_is_judged():
    configuration = {"preset": "default", "seeds": 3}
    claims = report.without_verdicts(CLAIMS, configuration)
    assert claims == CLAIMS
    lines = report.claims_table({"configuration": configuration, "claims": claims}, HEADERS)
    assert lines[-1] == "| a is b | yes | +1.0 ± 0.1 |"
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("high", "low", "text", "verdict"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "none", "not resolved"),
        ([1.5, 2.5, 3.5], [1.0, 2.0, 3.0], "+0.5", "cannot be told"),  # no spread is no error
        ([1.5], [1.0], "+0.5", "cannot be told"),
        ([1.5, np.nan], [1.0, 1.0], "diverged", "cannot be told"),
        ([1.0, 2.0, 4.5], [1.0, 2.0, 3.0], "+0.5 ± 0.5", "not resolved"),
        ([1.02, 2.02, 3.03], [1.0, 2.0, 3.0], "+0.023 ± 0.003", "yes"),
        ([0.98, 1.98, 2.97], [1.0, 2.0, 3.0], "-0.023 ± 0.003", "no"),
        ([2.0, 2.0, 2 + 1e-9], [1.0, 1.0, 1.0], "+1.0000 ± 3e-10", "yes"),
    ],
)
def test_an_error_is_never_shown_as_zero(high, low, text, verdict):
    difference = report.Difference.of(high, low)
    assert (difference.text(), difference.verdict()) == (text, verdict)


def test_ratios_of_a_benchmark_have_spreads_if_they_can():
    summary = {"median": 1.25, "lower": 1.2, "upper": 1.3}
    assert bench_report._with_spread(summary) == "1.250 ±0.050"
    assert bench_report._with_spread(summary, is_known=True) == "1"  # to itself
    assert bench_report._with_spread(dict.fromkeys(summary, 1.25)) == "1.250"  # of one round
    close = {"median": 1.25, "lower": 1.25, "upper": 1.2504}
    assert bench_report._with_spread(close) == "1.250 ±2e-04"
    assert bench_report._with_spread(None) == "-"


def same_runs(rho):
    """Results of bad-minimum in which no radius differs from another."""
    final = {"test_accuracy": 50.0, "validation_accuracy": 50.0, "train_accuracy": 100.0}
    final["lowest_train_accuracy"] = 100.0
    curves = {n: [1.0, 2.0] for n in ("grad_norm", "perturbation_norm", "test_accuracy")}
    seeds = [{"final": final, "curves": curves}] * 3
    cells = [("scratch", None), ("sgd", None), *((m, r) for r in rho for m in ("sam", "monge_sam"))]
    runs = [{"method": method, "rho": radius, "seeds": seeds} for method, radius in cells]
    return {"configuration": {"rho": rho, "seeds": 3}, "runs": runs}


@pytest.mark.parametrize("rho", [[0.1], [0.1, 2.0]])
def test_runs_that_are_the_same_make_no_claim(rho):
    found = [claim["claim"] for claim in bad_minimum_claims(same_runs(rho))]
    assert not [claim for claim in found if "better minimum" in claim or "larger rho" in claim]
    assert len(found) == 7
    assert not [claim for claim in bad_minimum_claims(same_runs(rho)) if "±" in claim["measured"]]
    assert clip_report._compare("", [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]) is None


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"images": np.zeros((5, 2)), "y": np.zeros(5, int)}, "found images (5, 2), y (5,), exp"),
        ({}, "found no arrays, expected an .npz file with numbers x (n, ...) and integer labels y"),
        ({f"a{i}": np.zeros(1) for i in range(10)}, "a7 (1,), 2 more, expected"),
    ],
)
def test_a_wrong_data_file_is_told_what_was_found(arrays, found, tmp_path, capsys):
    np.savez(tmp_path / "d.npz", **arrays)
    assert found in spoken(capsys, "train", "--data", str(tmp_path / "d.npz"), code=2)


def test_a_table_in_text_is_told_how_to_save_arrays(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("x,y\n1,2\n")
    text = spoken(capsys, "train", "--data", str(tmp_path / "x.csv"), code=2)
    assert "np.savez(path, x=x, y=y)" in text
    assert text.count("\n") == 1


def test_times_of_a_benchmark_have_the_same_decimals():
    assert bench_report._alike([0.0451, 0.12, 1.0]) == ["0.0451", "0.1200", "1.0000"]
    assert bench_report._alike([123.4, 1000.0]) == ["123", "1000"]
