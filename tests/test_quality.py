"""`monge-sam quality`: what methods reach against what they cost."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from looks import check_column
from matplotlib.image import imread

from monge_sam_jax import __main__
from monge_sam_jax.experiments.common.data import shuffled_rows
from monge_sam_jax.experiments.quality import tasks as quality_tasks
from monge_sam_jax.experiments.quality import training as quality_training
from monge_sam_jax.experiments.quality.options import Quality
from monge_sam_jax.experiments.quality.plots import quality_figure
from monge_sam_jax.experiments.quality.tasks import Batch, Problem, mean_loss

WIDTH = 16


@pytest.fixture(autouse=True)
def two_evaluations(monkeypatch):
    monkeypatch.setattr(quality_training, "EVALUATIONS", 2)


@pytest.fixture(scope="module")
def problem():
    return quality_tasks.label_noise(seed=0, width=WIDTH, confusion_epochs=1)


def by_hand(problem, name, rho, rows):
    """Steps of SGD with momentum at perturbed params; params without and with perturbation."""
    monge = name.endswith("monge_sam")
    theta = params = problem.params
    trace = jax.tree.map(jnp.zeros_like, params)

    def delta(g):
        n = optax.tree.norm(g)
        return jax.tree.map(lambda x: rho * x / n / (jnp.sqrt(1 + n**2) if monge else 1), g)

    grad = jax.jit(jax.grad(mean_loss))
    for row in rows:
        batch = Batch(problem.train.x[row], problem.train.y[row])
        if name in ("sam", "monge_sam"):
            d = delta(grad(theta, batch))
            params = jax.tree.map(jnp.add, theta, d)
        g = grad(params, batch)
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, g)
        theta = jax.tree.map(lambda p, m: p - problem.learning_rate * m, theta, trace)
        one_pass = name.startswith("one_pass")
        params = jax.tree.map(jnp.add, theta, delta(g)) if one_pass else theta
    return theta


@pytest.mark.parametrize("name", quality_training.METHODS)
def test_curve_is_that_of_a_loop(problem, name):
    curves = quality_training.learn(problem, name, None if name == "sgd" else 0.1, 2, seed=5)
    rows = shuffled_rows(
        len(problem.train.y), quality_tasks.BATCH_SIZE, np.random.default_rng((5, 3)), 2
    )
    curve = curves["test_accuracy"]
    assert len(curve) == len(curves["train_loss"]) == 3
    loss = float(mean_loss(by_hand(problem, name, 0.1, rows), problem.train))
    assert curves["train_loss"][-1] == pytest.approx(loss, rel=1e-3)
    assert curve[0] == quality_tasks.accuracy(problem.params, problem.test)
    expected = by_hand(problem, name, 0.1, rows)
    right = curve[-1] / 100 * len(problem.test.y)
    logits = quality_tasks._logits(expected, problem.test.x)
    assert right == pytest.approx(np.sum(np.argmax(logits, -1) == problem.test.y), abs=1.5)


def test_label_noise(problem):
    clean, _ = quality_tasks._shuffled_digits(np.random.default_rng((0, 2)), len(problem.train.y))
    np.testing.assert_array_equal(clean.x, problem.train.x)
    wrong = 100 * np.mean(np.asarray(clean.y) != np.asarray(problem.train.y))
    assert wrong == pytest.approx(problem.notes["wrong_labels"])
    assert 22 < wrong < 32  # nine tenths of 30 % are wrong
    assert len(problem.train.y) + len(problem.test.y) == 1797


def test_bad_minimum_knows_its_images_and_little_else(monkeypatch):
    monkeypatch.setattr(quality_tasks, "COPIES", 10)
    bad = quality_tasks.bad_minimum(seed=0, width=128, confusion_epochs=100)
    good = quality_tasks._fresh(0, 128, bad.train)
    rows = shuffled_rows(len(bad.train.y), quality_tasks.BATCH_SIZE, np.random.default_rng(0), 100)
    good = quality_tasks._descend(good, bad.train, rows, 0.05)
    assert bad.notes["train_accuracy"] == quality_tasks.accuracy(good, bad.train) == 100
    assert bad.notes["test_accuracy"] < quality_tasks.accuracy(good, bad.test) - 2
    assert len(bad.train.y) == 500


def test_the_bad_minimum_is_made_from_spoilt_copies(monkeypatch):
    seen = []
    monkeypatch.setattr(
        quality_tasks, "_descend", lambda params, samples, *_: seen.append(samples) or params
    )
    monkeypatch.setattr(quality_tasks, "MOST_FITTING_EPOCHS", 0)
    train = quality_tasks.bad_minimum(seed=3, width=8, confusion_epochs=1).train
    (spoilt,) = seen
    originals = np.repeat(np.asarray(train.x), quality_tasks.COPIES, axis=0)
    copies = np.asarray(spoilt.x)
    assert np.all((copies == originals) | (copies == 0))
    inked = originals != 0
    assert np.mean(copies[inked] == 0) == pytest.approx(0.1, abs=0.005)
    labels = np.asarray(spoilt.y).reshape(500, -1)
    assert np.mean(labels == np.asarray(train.y)[:, None]) == pytest.approx(0.1, abs=0.01)
    np.testing.assert_allclose(np.bincount(labels.ravel()) / labels.size, 0.1, atol=0.01)


def test_command_writes_curves_tables_and_figure(tmp_path, capsys):
    arguments = ["--tasks", "label-noise", "--rho", "0.05", "0.1", "--seeds", "2"]
    arguments += ["--width", "16", "--epochs", "2", "--output", str(tmp_path)]
    __main__.main(["quality", *arguments])
    results = json.loads((tmp_path / "results.json").read_text())
    runs = results["tasks"]["label-noise"]["runs"]
    assert len(runs) == 1 + 4 * 2
    for run in runs:
        curves = np.array(run["test_accuracy"])
        assert curves.shape == (2, 3)
        cost = 2 if run["method"] in ("sam", "monge_sam") else 1
        assert run["gradients"][-1] == cost * 14
        for at, index in (("at_equal_gradients", 2 // cost), ("at_equal_steps", 2)):
            column = curves[:, index]
            assert run[at]["mean"] == pytest.approx(column.mean())
            assert run[at]["standard_error"] == pytest.approx(column.std(ddof=1) / np.sqrt(2))
    methods = {"SGD", "SAM", "M-SAM", "one-pass SAM", "one-pass M-SAM"}
    assert check_column(quality_figure(results)) == methods
    table = (tmp_path / "quality.md").read_text()
    cell = runs[-1]["at_equal_steps"]
    row = next(line for line in table.splitlines() if line.startswith("| one-pass M-SAM"))
    assert row.endswith(f"{cell['mean']:.1f} ± {cell['standard_error']:.1f} |")
    assert imread(tmp_path / "quality.png").ndim == 3
    assert "one-pass M-SAM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rho", "-1"], "--rho needs finite"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--confusion-epochs", "0"], "--confusion-epochs must be"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--tasks"], "--tasks needs"),
    ],
)
def test_options_that_cannot_be_used(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(["quality", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_radii_of_a_task_unless_some_are_given():
    assert Quality().radii("bad-minimum") != Quality().radii("label-noise")
    assert Quality(rho=(1.0,)).radii("label-noise") == (1.0,)
    assert isinstance(quality_tasks.label_noise(1, 4, 1), Problem)
