"""`monge-sam edges`: training and what is measured on the way, by hand, and the files."""

import dataclasses
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
from monge_sam_jax.experiments.common.data import Batch
from monge_sam_jax.experiments.edges import claims, training
from monge_sam_jax.experiments.edges.options import Edges
from monge_sam_jax.experiments.edges.plots import edges_figure
from monge_sam_jax.stability import one_pass_orbit

OPTIONS = Edges(images=60, width=6, steps=30, learning_rate=0.1)


@pytest.fixture(scope="module")
def problem():
    return training.problem(3, OPTIONS)


def by_hand(problem, name, rho, steps, options):
    """Unperturbed params after some steps, and |delta| / |g| of the perturbation of the last."""
    grad = jax.jit(jax.grad(training.squared_error))
    monge = name.endswith("monge_sam")
    trace = jax.tree.map(jnp.zeros_like, problem.params)
    theta, delta, radius = problem.params, jax.tree.map(jnp.zeros_like, problem.params), 0.0

    def perturbation(g):
        n = optax.tree.norm(g)
        radius = rho / n / (jnp.sqrt(1 + n**2) if monge else 1)
        return jax.tree.map(lambda x: radius * x, g), radius

    for step in range(steps):
        batch = problem.train
        if problem.rows is not None:
            batch = Batch(batch.x[problem.rows[step]], batch.y[problem.rows[step]])
        if name in ("sam", "monge_sam"):
            delta, radius = perturbation(grad(theta, batch))
        g = grad(jax.tree.map(jnp.add, theta, delta), batch)
        trace = jax.tree.map(lambda m, x: options.momentum * m + x, trace, g)
        theta = jax.tree.map(lambda p, m: p - options.learning_rate * m, theta, trace)
        if name.startswith("one_pass"):
            delta, radius = perturbation(trace if options.direction == "momentum" else g)
    return theta, float(radius)


@pytest.mark.parametrize(
    ("name", "momentum", "direction", "batch_size"),
    [
        pytest.param("sgd", 0.5, "gradient", 7, marks=pytest.mark.slow),
        ("sam", 0.0, "gradient", None),
        ("monge_sam", 0.5, "gradient", 7),
        pytest.param("one_pass_sam", 0.5, "gradient", None, marks=pytest.mark.slow),
        pytest.param("one_pass_sam", 0.5, "momentum", None, marks=pytest.mark.slow),
        pytest.param("one_pass_monge_sam", 0.5, "gradient", 7, marks=pytest.mark.slow),
        ("one_pass_monge_sam", 0.5, "momentum", None),
    ],
)
def test_curves_are_those_of_a_loop(name, momentum, direction, batch_size, monkeypatch):
    monkeypatch.setattr(training, "WINDOW", 1)
    options = dataclasses.replace(
        OPTIONS, momentum=momentum, direction=direction, batch_size=batch_size
    )
    problem = training.problem(3, options)
    curves = training.learn(problem, name, 0.1, options)
    for i, steps in [(0, 0), (1, 3), (10, 30)]:
        theta, radius = by_hand(problem, name, 0.1, steps, options)
        expected = training.squared_error(theta, problem.train)
        np.testing.assert_allclose(curves["loss"][i], expected, rtol=1e-4)
        if i:
            np.testing.assert_allclose(curves["effective_radius"][i], radius, rtol=1e-3)
    r, edge, rate = curves["effective_radius"][1:], curves["edge"][1:], options.learning_rate
    if name == "sgd":
        np.testing.assert_allclose(edge, 2 * (1 + momentum) / rate, rtol=1e-6)
    elif name in ("sam", "monge_sam"):
        step = rate * edge * (1 + r * edge)
        np.testing.assert_allclose(step, 2 * (1 + momentum), rtol=1e-5)
    else:
        for radius, at_edge in zip(r, edge, strict=True):
            h, s, b = rate * at_edge, radius * at_edge, momentum
            if direction == "gradient":
                roots = np.roots(np.polyadd(np.poly([1, b, s]), [h, 0, 0]))
            else:
                roots = np.roots(np.polyadd(np.poly([1, b + s]), [h, 0]))
            np.testing.assert_allclose(np.max(np.abs(roots)), 1, rtol=1e-5)


def test_sharpness_is_the_largest_eigenvalue(problem):
    loss_fn = functools.partial(training.squared_error, batch=problem.train)
    trained, _ = by_hand(problem, "sgd", 0.0, 100, OPTIONS)
    for params in (problem.params, trained):
        expected = np.linalg.eigvalsh(hessian(loss_fn, params))[-1]
        actual = training.largest_eigenvalue(params, problem.train)
        np.testing.assert_allclose(actual, expected, rtol=1e-2)
    # Half the squared distance, in the mean over images.
    logits = training._outputs(problem.params, problem.train.x)
    error = np.asarray(logits, float) - np.eye(10)[problem.train.y]
    np.testing.assert_allclose(loss_fn(problem.params), np.sum(error**2) / 120, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "sam", "one_pass_sam")),
        "one_pass_monge_sam",
    ],
)
def test_sharpness_settles_at_the_edge(name):
    options = Edges(images=200, width=24, steps=1000, learning_rate=0.1)
    curves = training.learn(training.problem(0, options), name, 0.1, options)
    ratio = curves["sharpness"][-4:] / curves["edge"][-4:]
    np.testing.assert_allclose(ratio, 1, atol=0.25)
    assert curves["loss"][-1] < 0.1 * curves["loss"][0]
    expected = 2 / options.learning_rate
    assert (curves["edge"][-1] < 0.5 * expected) == (name != "sgd")


@pytest.mark.parametrize(
    ("name", "alpha"),
    [
        ("one_pass_sam", 0.0),
        ("one_pass_monge_sam", 1.0),
    ],
)
@pytest.mark.slow
def test_a_network_that_collapsed_moves_on_the_circle(name, alpha):
    """Its output is constant, and the Hessian is the identity on the biases of the outputs."""
    options = Edges(images=100, width=8, steps=1000, learning_rate=0.1)
    problem = training.problem(0, options)
    curves = training.learn(problem, name, 3.0, options)
    np.testing.assert_allclose(curves["sharpness"][-3:], 1, rtol=1e-3)
    np.testing.assert_allclose(curves["edge"][-3:], 1, rtol=1e-3)
    orbit = one_pass_orbit(1.0, learning_rate=options.learning_rate, rho=3.0, alpha=alpha)
    shares = np.bincount(problem.train.y, minlength=10) / len(problem.train.y)
    constant = 0.5 * (1 - np.sum(shares**2))  # the loss of the best constant
    expected = constant + 0.5 * float(orbit.unperturbed_radius) ** 2
    np.testing.assert_allclose(curves["loss"][-3:], expected, rtol=1e-3)


def test_what_diverges_is_nan_from_there(problem):
    options = Edges(images=60, width=6, steps=1000, learning_rate=30.0)
    curves = training.learn(problem, "sgd", 0.0, options)
    assert np.isfinite(curves["loss"][0])
    assert all(np.isnan(curve[-1]) for name, curve in curves.items() if name != "edge")


def test_command_writes_curves_tables_and_figure(tmp_path, capsys):
    arguments = ["--rho", "0.1", "0.2", "--seeds", "2", "--images", "50", "--width", "5"]
    arguments += ["--batch-size", "20", "--steps", "20", "--output", str(tmp_path)]
    __main__.main(["edges", *arguments])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == list(range(0, 21, 2))
    assert len(results["runs"]) == 1 + 4 * 2
    for run in results["runs"]:
        curves = np.array(run["sharpness"], float)
        assert curves.shape == (2, 11)
        assert run["late"]["sharpness"]["mean"] == pytest.approx(curves[:, -4:].mean())
        ratio = curves[:, -4:] / np.array(run["edge"])[:, -4:]
        assert run["late"]["sharpness / edge"]["mean"] == pytest.approx(ratio.mean())
    assert check(edges_figure(results, results)) == {"SGD", "SAM", "M-SAM"}
    table = (tmp_path / "edges.md").read_text()
    assert "No verdicts from 2 seeds" in table
    assert "20 at a step" in table
    cell = results["runs"][-1]["late"]["test_accuracy"]
    row = [line for line in table.splitlines() if line.startswith("| one-pass M-SAM")][-1]
    assert row.endswith(f"{cell['mean']:.1f} ± {cell['standard_error']:.1f} |")
    assert imread(tmp_path / "edges.png").ndim == 3
    assert "one-pass M-SAM" in capsys.readouterr().out


def made_up(rho, ratio, product, accuracy, label="SAM"):
    """A run of four seeds whose quantities stay as they are."""
    ones = np.ones((4, 11))
    curves = {"sharpness": 2.0, "edge": 2 / ratio, "effective_radius": product / 2}
    curves |= {"train_accuracy": accuracy}
    return {"label": label, "rho": rho} | {
        name: (np.reshape(value, (-1, 1)) * ones).tolist() for name, value in curves.items()
    }


def test_claims_of_runs_whose_answer_is_known():
    seeds = np.array([0.97, 0.99, 1.02, 1.02])
    as_predicted = [
        made_up(0.1, seeds, 0.3, 99.0),
        made_up(0.2, seeds, 0.8, 98.0),
        made_up(0.3, 5.0, 1.0, 20.0),  # its distance from the edge does not count
    ]
    settles, collapses = claims.claims({"seeds": 4}, as_predicted)
    assert settles["verdict"] == collapses["verdict"] == "yes"
    assert settles["measured"].startswith("2 % away")
    assert (
        "from rho = 0.3 on, with r lambda 1 there and 0.8 at the rho before"
        in (collapses["measured"])
    )
    against = [made_up(0.1, 0.6 * seeds, 1.2, 99.0), made_up(0.3, 1.0, 1.0, seeds * np.nan)]
    settles, collapses = claims.claims({"seeds": 4}, against[::-1])
    assert settles["verdict"] == collapses["verdict"] == "no"
    assert "3.0 times (3.0 to 3.0) less" in collapses["measured"]
    settles, collapses = claims.claims({"seeds": 4}, against[:1])
    assert collapses["verdict"] == "cannot be told"
    assert "4 seeds did not collapse up to rho = 0.1" in collapses["measured"]
    unsure = [made_up(0.1, np.array([1.0, 1.0, 1.0, 1.4]), 0.1, 99.0), as_predicted[2]]
    assert claims.claims({"seeds": 4}, unsure)[0]["verdict"] == "open"
    assert {c["verdict"] for c in claims.claims({"seeds": 2}, unsure)} == {None}


def test_batches_take_every_image_once_an_epoch():
    rows = training.problem(0, Edges(images=20, batch_size=5, steps=10)).rows
    assert rows.shape == (10, 5)
    for epoch in (rows[:4], rows[4:8]):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(20))
    assert training.problem(0, Edges()).rows is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rho"], "--rho needs at least one"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--momentum", "1"], "--momentum must be less than 1, got 1.0"),
        (["--direction", "momentum"], "--direction momentum needs a --momentum"),
        (["--steps", "9"], "--steps must be at least 10"),
        (["--images", "899"], "--images must be at most 898"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--images", "20", "--batch-size", "21"], "--batch-size must be at most --images, 20"),
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
