"""What the command line says: help, slips, and what is missing."""

import os
import re
import subprocess
import sys

import pytest

import monge_sam_jax
from monge_sam_jax.__main__ import COMMANDS, main
from monge_sam_jax.experiments.bad_minimum.options import PRESETS as BAD_MINIMUM
from monge_sam_jax.experiments.bench.options import SIZES
from monge_sam_jax.experiments.clip.options import PRESETS as CLIP
from monge_sam_jax.experiments.quality.options import RADII

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


def test_help_is_the_same_on_a_pipe():
    environment = os.environ | {"COLUMNS": str(WIDTH)}
    command = [sys.executable, "-m", "monge_sam_jax", "--help"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "\x1b" not in found.stdout
    assert max(map(len, found.stdout.splitlines())) < WIDTH


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
    assert "quality" not in text


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
        ("quality", {"radii": RADII}),
    ],
)
def test_help_has_the_values_of_presets(command, presets, capsys):
    text = spoken(capsys, command, "--help")
    for name, preset in presets.items():
        (line,) = re.findall(rf"^(?:Preset|Default) {name}: (.*)\.$", text, re.M)
        words = re.split(r"[ ,()]+", line)
        for leaf in leaves(preset):
            assert (f"{leaf:g}" if isinstance(leaf, float) else str(leaf)) in words
