"""Kernels and collectives of steps compiled for an H100 and for a slice of TPUs, without either.

Both compilers are installed where they are missing, as the extras `cuda` and `tpu` bring them.
Their counts are those of the devices; times are not known here.
"""

import importlib.util
import json
import subprocess
import sys

import pytest
from test_package import ROOT

pytestmark = pytest.mark.slow

METHODS = ("monge_by_hand", "monge_sam", "one_pass_gradient")
MODELS = ("deep_mlp", "resnet", "transformer")
SLICE = "v5e:2x4"

MOVED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from monge_sam_jax._core.numerics import LAUNCH_BYTES, euclidean_norm, scaled_norm
from monge_sam_jax.experiments.bench.counts import count
from monge_sam_jax.experiments.bench.targets import mesh_of
from monge_sam_jax.experiments.common.placement import AXIS

mesh = mesh_of("SLICE")
side = 2 * int(np.sqrt(LAUNCH_BYTES / 4))
leaves = [
    jax.ShapeDtypeStruct((side, side), "float32", sharding=NamedSharding(mesh, spec))
    for spec in (P(AXIS), P(None, AXIS), P())
]
for norm in (lambda t: scaled_norm(t).norm, lambda t: euclidean_norm(t, "float32")):
    counts = count(jax.jit(norm).lower(leaves).compile().as_text())
    print(counts.collectives, counts.large_collectives)
"""


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """An interpreter with the package and both compilers."""
    if all(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
        return sys.executable
    folder = tmp_path_factory.mktemp("accelerators")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", f"{ROOT}[cli,cuda,tpu]"]
    subprocess.run(install, check=True)
    return python


@pytest.fixture(scope="session")
def compiled(python, tmp_path_factory):
    """What `monge-sam bench --compile-for` counts: target -> programs of counts.json."""

    # With little effort a TPU's compiler takes a tenth of the time; newer ones know no such option.
    ask = "import jax; print(jax.__version_info__ < (0, 12))"
    result = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    effort = "little" if result.stdout.strip() == "True" else "full"

    def compile_for(target, *options):
        output = tmp_path_factory.mktemp("counts")
        command = [python, "-m", "monge_sam_jax", "bench", "--compile-for", target]
        command += ["--models", *MODELS, "--methods", *METHODS, "--output", output, *options]
        if target == SLICE:
            command += ["--effort", effort]
        subprocess.run(command, check=True)
        return json.loads((output / "counts.json").read_text())["programs"]

    return compile_for


def test_launches_on_an_h100(compiled):
    programs = compiled("h100")
    assert [program["model"] for program in programs] == list(MODELS)
    for program in programs:
        kernels = {name: method["kernels"] for name, method in program["methods"].items()}
        assert kernels["two_gradients"] < kernels["monge_sam"] <= kernels["monge_by_hand"]
        most = 1.2 if program["model"] == "resnet" else 1.06
        assert kernels["plain"] < kernels["one_pass_gradient"] <= most * kernels["plain"]


def test_kernels_and_collectives_on_a_slice_of_tpus(compiled):
    for program in compiled(SLICE, "--sharding", "data", "fsdp"):
        methods = program["methods"]
        assert methods["monge_sam"]["kernels"] <= methods["monge_by_hand"]["kernels"]
        for name, reference in (("monge_sam", "two_gradients"), ("one_pass_gradient", "plain")):
            ours, least = methods[name], methods[reference]
            assert ours["large_collectives"] <= least["large_collectives"]


def test_large_leaves_sharded_differently_are_not_moved_on_a_slice_of_tpus(python):
    script = MOVED.replace("SLICE", SLICE)
    result = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    counted = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(counted) == 2
    for collectives, large in counted:
        assert collectives >= 1
        assert large == 0
