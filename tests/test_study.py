"""`monge-sam study`: what is trained, what is concluded, and what is kept."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from looks import check
from matplotlib.image import imread

from monge_sam_jax import __main__
from monge_sam_jax.experiments.common.data import shuffled_rows
from monge_sam_jax.experiments.study import run as study_run
from monge_sam_jax.experiments.study import statistics, tasks, training
from monge_sam_jax.experiments.study.methods import METHODS
from monge_sam_jax.experiments.study.options import (
    GROUPS,
    PRESETS,
    CureName,
    MethodName,
    Study,
    TaskName,
)
from monge_sam_jax.experiments.study.plots import profiles_figure, study_figure
from monge_sam_jax.experiments.study.tasks import TASKS, Batch, Size
from monge_sam_jax.experiments.study.training import Cell

SIZE = Size(width=16, epochs=2, confusion_epochs=1)
TASK = "label-noise-30"
RHO = 0.1


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
    grad = jax.jit(jax.grad(tasks.DIGITS.loss))
    theta = params = average = problem.params
    trace = mean = last = jax.tree.map(jnp.zeros_like, params)
    taken, most = 0, len(rows)
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
        if taken >= most:
            break
        g, before = grad(params, batch), last
        taken += 1
        if name.startswith("extra") and t % 4 == 0:
            g = grad(jax.tree.map(jnp.add, theta, delta(g, RHO)), batch)
            taken += 1
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
    *("plain", "average", "sam", "late_sam", "monge_sam", "annealed_sam", "one_pass_sam"),
    *("one_pass_monge", "annealed_one_pass_sam", "annealed_one_pass_monge"),
]
CURED_BY_HAND = [
    *("cosine_one_pass_sam", "warm_one_pass_monge", "warm_annealed_one_pass_sam"),
    *("momentum_one_pass_monge", "mixed_one_pass_sam", "ahead_one_pass_monge"),
    "extra_one_pass_sam",
]


@pytest.mark.parametrize(
    ("name", "doubled"),
    [*itertools.product(BY_HAND, (False, True)), *((name, True) for name in CURED_BY_HAND)],
)
def test_a_curve_is_that_of_a_loop(problem, name, doubled):
    rho = RHO if METHODS[name].has_radius else None
    curve = training.learn(problem, Cell(TASK, name, rho, doubled), 2, seed=5)
    rows = shuffled_rows(875, 125, np.random.default_rng((5, 3)), 4)
    rows = rows[: 20 if doubled else 10]  # ten evaluations of one step each, or twenty
    assert curve["steps"][-1] == len(rows)
    expected = by_hand(problem, name, rows)
    start, end = (float(tasks.DIGITS.measure(p, problem.test)) for p in (problem.params, expected))
    one_image = 100 / len(problem.test.y)
    assert curve["test"][0] == pytest.approx(start)
    assert curve["test"][-1] == pytest.approx(end, abs=1.5 * one_image)
    last = Batch(problem.train.x[rows[-1]], problem.train.y[rows[-1]])
    assert curve["train_loss"][-1] == pytest.approx(float(tasks.DIGITS.loss(expected, last)), 1e-3)


WITH_RADIUS = [name for name in MethodName.__args__ if METHODS[name].has_radius]


@pytest.mark.parametrize("name", [*WITH_RADIUS, "against_momentum", "capped_one_pass_sam"])
def test_every_method_at_a_tiny_radius_is_plain_training(problem, name):
    """Functional SAM too: its second gradient is the first one at radius zero."""
    plain = training.learn(problem, Cell(TASK, "plain", None), 2, seed=1)
    curve = training.learn(problem, Cell(TASK, name, 1e-6), 2, seed=1)
    np.testing.assert_allclose(curve["train_loss"], plain["train_loss"], rtol=1e-3)


@pytest.mark.parametrize("name", [*WITH_RADIUS, "against_momentum"])
def test_every_method_perturbs(problem, name):
    plain = training.learn(problem, Cell(TASK, "plain", None), 2, seed=1)
    curve = training.learn(problem, Cell(TASK, name, 0.5), 2, seed=1)
    assert abs(curve["train_loss"][-1] - plain["train_loss"][-1]) > 1e-4


@pytest.mark.parametrize("name", ["layerwise", "supremum", "spectral"])
def test_balls_are_of_the_same_euclidean_size(problem, name):
    """The line of radii means the same length for all of them."""
    built = METHODS[name].build
    norms = []
    for method in (METHODS["sam"].build, built):
        setting = training.Setting(tasks.DIGITS, optax.sgd(0.1), RHO, 10, problem.params)
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
    train, validation, test = tasks._digits(np.random.default_rng((0, 2)), 875)
    np.testing.assert_array_equal(train.x, problem.train.x)
    np.testing.assert_array_equal(test.y, problem.test.y)
    assert len(validation.y) + len(test.y) == 1797 - 875
    wrong = 100 * np.mean(np.asarray(train.y) != np.asarray(problem.train.y))
    assert wrong == pytest.approx(problem.notes["wrong_labels"])
    assert 22 < wrong < 32  # nine tenths of 30 % are wrong
    clean = TASKS["label-noise-0"].make(0, SIZE)
    assert clean.notes["wrong_labels"] == 0


def test_a_bad_minimum_knows_its_images_and_little_else(monkeypatch):
    monkeypatch.setattr(tasks, "COPIES", 10)
    bad = TASKS["bad-minimum"].make(0, Size(128, 1, 100))
    good = tasks._fresh(0, 128, bad.train)
    rows = shuffled_rows(500, 125, np.random.default_rng(0), 100)
    good = tasks._descend(good, bad.train, rows, 0.05)
    measure = tasks.DIGITS.measure
    assert bad.notes["train_accuracy"] == measure(good, bad.train) == 100
    assert measure(bad.params, bad.test) < measure(good, bad.test) - 2


def test_large_weights_in_the_beginning():
    problem = TASKS["large-init"].make(0, Size(64, 1, 1))
    fresh = tasks._fresh(0, 64, problem.train)
    sizes = [float(optax.tree.norm(tree)) for tree in (problem.params, fresh)]
    assert sizes[0] > 3.5 * sizes[1]
    assert problem.notes["train_accuracy"] == 100


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
    score = tasks.HEAT.score(jnp.asarray(1.01 * u), jnp.asarray(u))
    assert float(score) == pytest.approx(2, abs=0.01)


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


def test_a_radius_is_chosen_by_validation_alone():
    """Here test samples would choose another."""

    def run(validation, test):
        curve = {"validation": [0.0, validation], "test": [0.0, test], "seconds": 1.0}
        return [{**curve, "steps": [0, 1]}] * 2

    curves = {
        Cell(TASK, "plain", None, doubled=True): run(50, 50),
        Cell(TASK, "sam", 0.05): run(60, 60),
        Cell(TASK, "sam", 0.1): run(70, 55),
        Cell(TASK, "sam", 0.2): run(65, 90),
    }
    plain, sam = study_run._rows(curves)
    assert sam["rho"] == 0.1
    assert sam["test"]["mean"] == 55
    assert sam["at_default"]["mean"] == 60
    assert sam["over_plain"]["difference"] == 5
    assert plain["over_plain"] is None


# --- the command ---

ARGUMENTS = [
    *("--preset", "smoke", "--tasks", TASK, "regression"),
    *("--methods", "plain", "sam", "one_pass_monge"),
]


def test_the_command_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    arguments = [*ARGUMENTS, "--output", str(tmp_path)]
    __main__.main(["study", *arguments])
    results = json.loads((tmp_path / "results.json").read_text())
    entry = results["tasks"][TASK]
    # plain at both lengths, SAM at two radii, one pass at two radii and both lengths
    assert len(entry["cells"]) == 2 + 2 + 4
    assert [row["method"] for row in entry["rows"]] == [
        *("plain", "one_pass_monge"),
        *("plain", "sam", "one_pass_monge"),
    ]
    for cell in entry["cells"]:
        assert np.shape(cell["test"])[0] == 2
        assert cell["steps"][0][-1] == (20 if cell["doubled"] else 10)
    assert {"SAM", "one-pass M-SAM"} <= check(study_figure(results))
    assert {"SAM", "one-pass M-SAM"} <= check(profiles_figure(results))
    table = (tmp_path / "study.md").read_text()
    assert "No verdicts: preset smoke" in table
    assert "verdict |" not in table
    for name in ("study.png", "profiles.png"):
        assert imread(tmp_path / name).ndim == 3
    assert "M-SAM" in capsys.readouterr().out

    def never(*args):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(training, "learn", never)
        __main__.main(["study", *arguments])
    seeds = []
    learn = training.learn
    monkeypatch.setattr(training, "learn", lambda *args: seeds.append(args[-1]) or learn(*args))
    __main__.main(["study", *arguments, "--seeds", "3"])
    assert set(seeds) == {2}  # the third alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rho", "-1"], "--rho needs finite positive"),
        (["--rates", "0"], "--rates needs finite positive"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--tasks"], "--tasks needs"),
        (["--methods", "sam"], "--methods needs plain too"),
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
    assert not set(CureName.__args__) & set(Study().methods)


def test_presets():
    assert Study(preset="full").size == PRESETS["full"]
    assert Study(preset="full", width=3, rates=(1.0,)).size.width == 3
    assert Study(preset="smoke").radii((0.1, 0.2, 0.3)) == (0.1, 0.2)
    assert Study(rho=(7.0,)).radii((0.1, 0.2, 0.3)) == (7.0,)
