"""`monge-sam edges`: training and what is measured on the way, by hand, and the files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from looks import check
from matplotlib.image import imread

from monge_sam_jax import __main__
from monge_sam_jax.curvature import hessian
from monge_sam_jax.experiments.edges import training
from monge_sam_jax.experiments.edges.options import Edges
from monge_sam_jax.experiments.edges.plots import edges_figure

OPTIONS = Edges(images=60, width=6, steps=30)


@pytest.fixture(scope="module")
def problem():
    return training.problem(3, OPTIONS)


def by_hand(problem, name, rho, steps, rate):
    """Unperturbed params after some steps, and |delta| / |g| of the perturbation of the last."""
    grad = jax.jit(jax.grad(lambda p: training.squared_error(p, problem.train)))
    monge = name.endswith("monge_sam")
    theta, delta, radius = problem.params, jax.tree.map(jnp.zeros_like, problem.params), 0.0

    def perturbation(g):
        n = optax.tree.norm(g)
        radius = rho / n / (jnp.sqrt(1 + n**2) if monge else 1)
        return jax.tree.map(lambda x: radius * x, g), radius

    for _ in range(steps):
        if name in ("sam", "monge_sam"):
            delta, radius = perturbation(grad(theta))
        g = grad(jax.tree.map(jnp.add, theta, delta))
        theta = jax.tree.map(lambda p, x: p - rate * x, theta, g)
        if name.startswith("one_pass"):
            delta, radius = perturbation(g)
    return theta, float(radius)


@pytest.mark.parametrize("name", training.METHODS)
def test_curves_are_those_of_a_loop(problem, name, monkeypatch):
    monkeypatch.setattr(training, "WINDOW", 1)
    curves = training.learn(problem, name, 0.1, OPTIONS)
    rate = OPTIONS.learning_rate
    for i, steps in enumerate(range(0, 31, 3)):
        if i in (0, 1, 10):
            theta, radius = by_hand(problem, name, 0.1, steps, rate)
            expected = training.squared_error(theta, problem.train)
            np.testing.assert_allclose(curves["loss"][i], expected, rtol=1e-4)
            if i:
                np.testing.assert_allclose(curves["effective_radius"][i], radius, rtol=1e-3)
    r, edge = curves["effective_radius"][1:], curves["edge"][1:]
    if name == "sgd":
        np.testing.assert_allclose(edge, 2 / rate, rtol=1e-6)
    elif name in ("sam", "monge_sam"):
        np.testing.assert_allclose(edge, (np.sqrt(1 + 8 * r / rate) - 1) / (2 * r), rtol=1e-5)
    else:
        flip = np.where(rate > 2 * r, 2 / np.where(rate > 2 * r, rate - 2 * r, 1), np.inf)
        np.testing.assert_allclose(edge, np.minimum(1 / r, flip), rtol=1e-5)


def test_sharpness_is_the_largest_eigenvalue(problem):
    loss_fn = functools.partial(training.squared_error, batch=problem.train)
    expected = np.linalg.eigvalsh(hessian(loss_fn, problem.params))[-1]
    actual = training.largest_eigenvalue(problem.params, problem.train)
    np.testing.assert_allclose(actual, expected, rtol=1e-2)
    # Half the squared distance, in the mean over images.
    logits = training._outputs(problem.params, problem.train.x)
    error = np.asarray(logits, float) - np.eye(10)[problem.train.y]
    np.testing.assert_allclose(loss_fn(problem.params), np.sum(error**2) / 120, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "sam", "one_pass_sam", "one_pass_monge_sam"])
def test_sharpness_settles_at_the_edge(name):
    options = Edges(images=200, width=24, steps=1000)
    curves = training.learn(training.problem(0, options), name, 0.1, options)
    ratio = curves["sharpness"][-4:] / curves["edge"][-4:]
    np.testing.assert_allclose(ratio, 1, atol=0.25)
    assert curves["loss"][-1] < 0.1 * curves["loss"][0]
    expected = 2 / options.learning_rate
    assert (curves["edge"][-1] < 0.5 * expected) == (name != "sgd")


def test_what_diverges_is_nan_from_there(problem):
    options = Edges(images=60, width=6, steps=1000, learning_rate=30.0)
    curves = training.learn(problem, "sgd", 0.0, options)
    assert np.isfinite(curves["loss"][0])
    assert all(np.isnan(curve[-1]) for name, curve in curves.items() if name != "edge")


def test_command_writes_curves_tables_and_figure(tmp_path, capsys):
    arguments = ["--rho", "0.1", "0.2", "--seeds", "2", "--images", "50", "--width", "5"]
    __main__.main(["edges", *arguments, "--steps", "20", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == list(range(0, 21, 2))
    assert len(results["runs"]) == 1 + 4 * 2
    for run in results["runs"]:
        curves = np.array(run["sharpness"], float)
        assert curves.shape == (2, 11)
        assert run["at_end"]["sharpness"]["mean"] == pytest.approx(curves[:, -1].mean())
        ratio = curves[:, -1] / np.array(run["edge"])[:, -1]
        assert run["at_end"]["sharpness / edge"]["mean"] == pytest.approx(ratio.mean())
    assert check(edges_figure(results)) == {"GD", "SAM", "M-SAM"}
    table = (tmp_path / "edges.md").read_text()
    cell = results["runs"][-1]["at_end"]["test_accuracy"]
    row = [line for line in table.splitlines() if line.startswith("| one-pass M-SAM")][-1]
    assert row.endswith(f"{cell['mean']:.1f} ± {cell['standard_error']:.1f} |")
    assert imread(tmp_path / "edges.png").ndim == 3
    assert "one-pass M-SAM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rho"], "--rho needs at least one"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--steps", "9"], "--steps must be at least 10"),
        (["--images", "899"], "--images must be at most 898"),
        (["--seed", "-1"], "--seed must be from 0"),
    ],
)
def test_options_that_cannot_be_used(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(["edges", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_all_images_of_the_training_half_may_be_used():
    assert len(training.problem(0, Edges(images=898)).train.y) == 898
