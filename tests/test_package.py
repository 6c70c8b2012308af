"""The package as a whole: what it imports, what its README says, the versions it allows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_import_is_light():
    """In a fresh interpreter: neither Flax nor the plotting and data libraries are loaded."""
    script = (
        "import sys, monge_sam_jax\n"
        "heavy = {'flax', 'matplotlib', 'sklearn', 'rich', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_readme_blocks_run():
    """Every Python block, one after another in one namespace, as a reader would type them."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert len(blocks) >= 3
    namespace = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"README block {i}", "exec"), namespace)


def test_readme_commands_are_those_that_exist():
    readme = (ROOT / "README.md").read_text()
    main, test = re.findall(r"^python3 -m venv .*$", readme, re.M)[:2]
    assert main.endswith("monge-sam train")
    assert ".[cli]" in main
    assert test.endswith("pytest -n auto")
    assert ".[test]" in test
    assert {"cli", "test"} <= set(PROJECT["optional-dependencies"])
    assert "monge-sam" in PROJECT["scripts"]


@pytest.mark.parametrize("file", [".ci/run", ".github/workflows/tests.yml"])
def test_other_machines_run_the_test_command_of_the_readme(file):
    readme = (ROOT / "README.md").read_text()
    test = re.findall(r"^python3 -m venv .*$", readme, re.M)[1]
    (pattern,) = re.findall(r"grep -m 1 '(.*)' README\.md", (ROOT / file).read_text())
    assert re.search(pattern, readme, re.M)[0] == test.removesuffix(" -n auto")


def test_the_workflow_begins_with_the_oldest_python():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    (matrix,) = re.findall(r"python: \[(.*)\]", workflow)
    versions = [tuple(map(int, version.split("."))) for version in re.findall(r'"(.*?)"', matrix)]
    assert f">={versions[0][0]}.{versions[0][1]}" == PROJECT["requires-python"]
    assert versions == [(3, minor) for minor in range(versions[0][1], versions[-1][1] + 1)]
    assert len(versions) > 1


def test_version_is_one_number():
    import monge_sam_jax

    assert re.fullmatch(r"\d+\.\d+\.\d+", monge_sam_jax.__version__)


@pytest.mark.slow
def test_oldest_allowed_versions(tmp_path):
    """Installs the lower bound of every dependency and runs the core tests with them."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    oldest = [requirement.replace(">=", "==") for requirement in PROJECT["dependencies"]]
    jaxlib = [r.replace("jax==", "jaxlib==") for r in oldest if r.startswith("jax==")]
    cli = PROJECT["optional-dependencies"]["cli"]
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *oldest, *jaxlib, *cli, "pytest", "hypothesis"], check=True)
    subprocess.run([*install, "--no-deps", ROOT], check=True)
    core = (
        "suite metrics composite norms averaged preconditioning contract promises wrappers when "
        "transforms gradients one_pass nnx parallel cost train"
    )
    files = [ROOT / "tests" / f"test_{name}.py" for name in core.split()]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    subprocess.run(command, check=True, cwd=tmp_path)
