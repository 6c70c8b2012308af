"""How the package is divided into modules, and which of them may import which."""

import ast
import collections
import graphlib
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import monge_sam_jax
from monge_sam_jax.__main__ import COMMANDS

PACKAGE = Path(monge_sam_jax.__file__).parent
EXPERIMENTS = "monge_sam_jax.experiments"
MOST_LINES = 400
MOST_MODULES = 14


def name_of(path):
    parts = ("monge_sam_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PUBLIC = [
    name
    for name, path in FILES.items()
    if path.parent == PACKAGE and path.stem not in ("__init__", "__main__")
]


def imported(tree, modules):
    """The modules that a syntax tree imports, in functions and under conditions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {whole if whole in modules else node.module} & modules
    return found


def circle_in(graph):
    """Modules that import one another, or None."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


GRAPH = {
    name: imported(ast.parse(path.read_text("utf-8")), set(FILES)) for name, path in FILES.items()
}
IMPORTS = [(name, other) for name, others in GRAPH.items() for other in sorted(others)]


def room(name):
    """The folder below experiments that a module is in, or None."""
    parts = name.removeprefix(EXPERIMENTS).split(".")
    return parts[1] if name.startswith(EXPERIMENTS) and len(parts) > 1 else None


def test_the_graph_has_what_is_imported_in_functions_and_under_conditions():
    modules = {"p", "p.a", "p.b", "p.c", "p.d"}
    code = """
import p.a
from p import b
if TYPE_CHECKING:
    from p.c import something
def run():
    def deeper():
        from p import d, other
"""
    assert imported(ast.parse(code), modules) == modules
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert len(IMPORTS) > 200


def test_no_modules_import_one_another():
    assert circle_in(GRAPH) is None


def test_options_import_nothing_that_runs():
    running = {"run", "training", "report", "plots"}
    options = {name for name in FILES if name.endswith(".options")}
    assert len(options) > len(COMMANDS)  # those in common too
    wrong = [
        (name, other)
        for name, other in IMPORTS
        if name in options and other.rpartition(".")[2] in running
    ]
    assert not wrong


def test_the_core_imports_no_experiments():
    wrong = [
        (name, other)
        for name, other in IMPORTS
        if other.startswith(EXPERIMENTS)
        and not name.startswith(EXPERIMENTS)
        and name != "monge_sam_jax.__main__"
    ]
    assert not wrong


def test_a_command_imports_nothing_from_another():
    wrong = [
        (name, other)
        for name, other in IMPORTS
        if room(name) and room(other) not in (None, "common", room(name))
    ]
    assert not wrong
    assert {room(name) for name in FILES} == {
        None,
        "common",
        *(command.replace("-", "_") for command in COMMANDS),
    }


def test_what_is_in_common_several_commands_use():
    users = {name: set() for name in FILES if name.startswith(f"{EXPERIMENTS}.common.")}
    for name, other in IMPORTS:
        if other in users and room(name):
            users[other].add(room(name))
    assert [n for n, rooms in users.items() if len(rooms) < 2 and "common" not in rooms] == []


def test_folders_and_modules_are_small():
    counts = collections.Counter(map(room, FILES))
    counts.pop(None)
    assert max(counts.values()) - 1 <= MOST_MODULES, counts  # beside __init__
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    assert [name for name, length in lengths.items() if length > MOST_LINES] == []


def test_every_command_has_its_runner():
    for command in COMMANDS.values():
        module, _, function = command.runner.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert room(module) == room(command.options.__module__)


def test_the_command_line_waits_for_no_heavy_import():
    """In a fresh interpreter: it loads the options of all commands, and nothing that runs."""
    script = (
        "import sys, monge_sam_jax.__main__\n"
        "heavy = {'flax', 'matplotlib', 'orbax', 'rich', 'sklearn', 'tyro'} & set(sys.modules)\n"
        "loaded = {name for name in sys.modules if name.startswith('monge_sam_jax.experiments.')}\n"
        "light = ('options', 'errors')\n"
        "heavy |= {n for n in loaded if n.count('.') > 2 and n.rpartition('.')[2] not in light}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_say_what_is_public(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__))
    assert [entry for entry in module.__all__ if not hasattr(module, entry)] == []
    assert dir(module) == module.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_help_shows_types_by_their_names(name):
    """As they are written: an alias for trees of arrays spelt out takes five lines."""
    module = importlib.import_module(name)
    functions = [getattr(module, entry) for entry in module.__all__]
    for function in filter(inspect.isfunction, functions):
        for parameter in inspect.signature(function).parameters.values():
            assert len(str(parameter.annotation)) < 100, (function, parameter)


def test_what_the_package_offers_its_modules_offer():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    offered = [
        (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "monge_sam_jax"  # whole modules
        for alias in node.names
    ]
    assert len(offered) > 20
    for module, name in offered:
        assert name in importlib.import_module(module).__all__, (module, name)


def test_nothing_private_is_at_the_top():
    assert [name for name in PUBLIC if name.rpartition(".")[2].startswith("_")] == []


def test_no_module_takes_the_name_of_a_function():
    """`monge_sam_jax.name` would be the module once that is imported."""
    for name in PUBLIC:
        importlib.import_module(name)
    functions = {x for x in vars(monge_sam_jax) if callable(getattr(monge_sam_jax, x))}
    assert {"layerwise", "monge"} <= functions
    assert not functions & {name.rpartition(".")[2] for name in PUBLIC}
    assert callable(monge_sam_jax.layerwise)
