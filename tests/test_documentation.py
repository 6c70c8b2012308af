"""What the first page, the guides, the docstrings and the help say of the same things agrees."""

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import jax
import jupytext
import numpy as np
import pytest
import tyro

import monge_sam_jax as ms
from monge_sam_jax.__main__ import COMMANDS
from monge_sam_jax.experiments.common.report import PLACES
from monge_sam_jax.experiments.study.kinds import Size
from monge_sam_jax.experiments.study.options import PRESETS, Study
from monge_sam_jax.experiments.study.report import overview
from monge_sam_jax.experiments.study.tasks import TASKS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
STUDY = json.loads((NOTEBOOKS / "study.json").read_text("utf-8"))
LARGE = json.loads((NOTEBOOKS / "study_text.json").read_text("utf-8"))
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    **{path: path.read_text("utf-8") for path in NOTEBOOKS.rglob("*.md")},
    **{
        path.with_suffix(".ipynb"): "\n\n".join(
            cell.source for cell in jupytext.read(path).cells if cell.cell_type == "markdown"
        )
        for path in NOTEBOOKS.glob("[0-9][0-9]_*.py")
    },
}
TEXTS = {
    ROOT / "README.md": README,
    **{path: path.read_text("utf-8") for path in (ROOT / ".github").glob("*.md")},
    **PAGES,
}


def page(name):
    return next(text for path, text in PAGES.items() if path.stem == name)


def table(text, first):
    """Rows of the table whose first column has that name, as lists of cells."""
    lines = re.search(rf"^\| {re.escape(first)} \|.*?(?=\n\n|\Z)", text, re.S | re.M)[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines.splitlines()]
    return [[cell.strip() for cell in row] for row in rows if not set(row[0]) <= set("-")]


def linked(text):
    """A cell without its links."""
    return re.sub(r" ?\(?\[([^\]]*)\]\([^)]*\)\)?", "", text)


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", TEXTS[path], flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|mailto:", target):
            file, _, anchor = target.partition("#")
            place = path.parent / file
            assert place.exists(), target
            headings = re.findall(r"^#+ (.*)$", PAGES.get(place, ""), re.M)
            assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("study", [STUDY, LARGE], ids=["small", "of text"])
def test_what_pages_are_made_from_names_no_folder(study):
    assert not set(PLACES) & set(study["configuration"])


def test_the_index_has_every_page():
    index = PAGES[NOTEBOOKS / "README.md"]
    listed = re.findall(r"^- \[.*?\]\((.*?)\)", index, re.M)
    assert len(set(listed)) == len(listed)
    assert {NOTEBOOKS / name for name in listed} == set(PAGES) - {NOTEBOOKS / "README.md"}


def test_every_page_opens_with_its_name():
    for path, text in PAGES.items():
        assert re.match(r"# \S", text), path
        assert len(re.findall(r"^# ", text, re.M)) == 1, path


def test_the_reference_has_every_public_module_once():
    shown = [
        name
        for path in (NOTEBOOKS / "reference").glob("*.md")
        for name in re.findall(r"automodule:: monge_sam_jax\.(\w+)", PAGES[path])
    ]
    modules = {path.stem for path in (ROOT / "monge_sam_jax").glob("[!_]*.py")}
    parts = {"products", "spectrum", "landscape", "blocks", "edges", "slots"}  # shown by another
    assert len(shown) == len(set(shown))
    assert set(shown) == modules - parts
    public = {name: importlib.import_module(f"monge_sam_jax.{name}").__all__ for name in modules}
    entries = {entry for name in shown for entry in public[name]}
    assert all(set(public[name]) <= entries for name in parts)


def test_first_radii_are_the_defaults():
    rows = table(page("10_choosing"), "method")
    assert rows == table(README, "method")
    for method, radius, *_ in rows[1:]:
        builder = getattr(ms, re.match(r"`(\w+)`", method)[1])
        default = inspect.signature(builder).parameters["rho"].default
        assert float(re.match(r"[\d.]+", radius)[0]) == default, method


def test_gradients_per_step_are_those_of_the_table_of_methods():
    counted = {row[0]: row[5] for row in table(page("07_methods"), "method")[1:]}
    shown = {row[0]: row[2] for row in table(README, "method")[1:]}
    assert counted["SAM"] == shown["`sam`"]
    assert counted["Monge SAM"] == shown["`monge_sam`"]
    assert counted["ASAM"] == shown["`adaptive_sam`"]
    assert "1 |" in next(r for r in page("07_methods").splitlines() if "ms.one_pass_sam(" in r)
    assert shown["`one_pass_sam`"] == "1"
    assert shown["`sam`, `when=` the last tenth"] == "1.1"


def test_results_are_those_of_the_study():
    header, *rows = table("\n".join(overview(STUDY)), "gain over plain training")
    assert table(page("study"), "gain over plain training") == [header, *rows]
    (_, *tasks), *shown = table(README, "gain over plain training")
    cells = {label: dict(zip(header[1:], of_it, strict=True)) for label, *of_it in rows}
    assert len(shown) > 4
    for label, *gains in shown:
        assert gains == [cells[label][task] for task in tasks]


def test_the_study_of_text_is_that_of_the_command_on_its_page():
    """Of a model of over a million params, and what is said of its figures."""
    text = " ".join(page("09_study").split())
    said = re.search(r"`monge-sam study (--tasks forgetting .*?)`", text)
    options = tyro.cli(Study, args=said[1].split())
    configuration = LARGE["configuration"]
    given = dataclasses.asdict(options) | options.size._asdict()
    decisive = {name: x for name, x in given.items() if name not in PLACES}
    assert configuration == json.loads(json.dumps(decisive))
    size = Size(1, 1, 1, 4, options.size.text_width, options.size.text_layers)
    problem = TASKS["forgetting"].make(0, size)
    assert 1.3e6 < sum(x.size for x in jax.tree.leaves(problem.params)) < 1.35e6
    rows = {row["method"]: row for row in LARGE["tasks"]["forgetting"]["rows"]}
    assert {len(row["ends"]) for row in rows.values()} == {8}
    gains = {name: row["over_plain"] for name, row in rows.items() if row["over_plain"]}
    shown = {name: round(gain["difference"], 3) for name, gain in gains.items()}
    assert [shown[name] for name in ("sam", "monge_sam")] == [-0.187, -0.179]
    assert [name for name, gain in gains.items() if gain["verdict"] == "open"] == ["late_sam"]
    curves = {name: {k: np.array(x) for k, x in row["after"].items()} for name, row in rows.items()}
    forgotten = [curve["before"][-1] - curve["old"][-1] for curve in curves.values()]
    assert 0.11 < min(forgotten) < max(forgotten) < 0.13  # "about 0.12"
    lost = {name: curve["old"][-1] - curve["4 bits"][-1] for name, curve in curves.items()}
    assert lost["sam"] < lost["monge_sam"] < 0.031 < 0.038 < lost["plain"]


def test_the_study_is_that_of_its_default_options():
    configuration = STUDY["configuration"]
    assert configuration["preset"] == "small"
    assert configuration == configuration | json.loads(json.dumps(PRESETS["small"]._asdict()))
    assert list(STUDY["tasks"]) == list(TASKS)
    for task, entry in STUDY["tasks"].items():
        assert [row["method"] for row in entry["rows"]] == list(TASKS[task].methods)
        assert {len(row["ends"]) for row in entry["rows"]} == {10}
    assert "ten seeds" in page("study")
    assert "ten seeds" in page("09_study")


def test_commands_are_those_that_exist():
    here, there = (
        [[linked(cell) for cell in row] for row in table(text, "command")[1:]]
        for text in (README, page("commands"))
    )
    assert here == there
    assert [row[0].strip("`") for row in here] == list(COMMANDS)


def test_commands_have_the_options_that_pages_give_them():
    for path, text in TEXTS.items():
        for command, rest in re.findall(r"monge-sam ([a-z-]+)([^`\n]*)", text):
            for option in re.findall(r"--([a-z-]+)", rest):
                fields = COMMANDS[command].options.__dataclass_fields__
                assert option == "help" or option.replace("-", "_") in fields, (path, option)


@pytest.mark.parametrize(
    ("command", "table_says", "help_says", "guide", "guide_says"),
    [
        ("bad-minimum", "8 minutes", "eight minutes", "claims", "bad-minimum` (8 minutes"),
        ("clip", "10 minutes", "ten minutes", "claims", "clip` (10 minutes"),
        ("bench", "a quarter of an hour", "a quarter of an hour", "cost", "tiny` in half a minute"),
        ("study", "75 minutes", "75 minutes", "study", "75 minutes on two cores"),
    ],
)
def test_times_agree(command, table_says, help_says, guide, guide_says):
    (row,) = (row for row in table(README, "command") if row[0] == f"`{command}`")
    assert table_says in row[2]
    assert help_says in " ".join(inspect.getdoc(COMMANDS[command].options).split())
    assert guide_says in page(guide)


def test_numbers_of_the_table_of_methods():
    rows = len(table(page("07_methods"), "method")) - 1
    assert 36 <= rows <= 49, "the first page says some forty"


def test_versions_are_those_that_the_package_takes():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    floors = dict(re.findall(r'"(jax|optax|flax)>=([\d.]+)"', project))
    floors["python"] = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    for name, floor in floors.items():
        said = re.search(rf"\b{name} ([\d.]+\d)", README, re.I)[1]
        assert re.fullmatch(rf"{re.escape(said)}(\.0)?", floor), name
    assert f"version = {{{ms.__version__}}}" in README
    assert f"## {ms.__version__}" in (ROOT / ".github" / "CHANGELOG.md").read_text("utf-8")
