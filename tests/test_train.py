"""The command `monge-sam train`: its results, its figure, and what it says to bad input."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from flax import linen as nn
from looks import check_column
from matplotlib.colors import to_rgb
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from monge_sam_jax.__main__ import main
from monge_sam_jax.experiments.common import data, placement, report, task
from monge_sam_jax.experiments.common import plots as plotting
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.train import checkpoints, comparison, training
from monge_sam_jax.experiments.train.data import from_file
from monge_sam_jax.experiments.train.models import CNN, MLP
from monge_sam_jax.experiments.train.options import Train
from monge_sam_jax.experiments.train.plots import training_figure
from monge_sam_jax.experiments.train.report import COLUMNS, format_column

EPOCHS, BATCH_SIZE = 3, 64
OPTIMIZERS = ("sgd", "sam", "monge_sam")
TIMES = {"seconds_per_step", "ratio_to_sgd"}


def train(output, *options):
    """The content of results.json and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        main(["train", "--output", str(output), *options])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (output / "results.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse), printed.getvalue()


COMMAND = ("--optimizers", *OPTIMIZERS, "--epochs", str(EPOCHS), "--batch-size", str(BATCH_SIZE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def outcome(folder):
    return train(folder, *COMMAND, "--seeds", "2", "--seed", "3")


def error_line(capsys, *args):
    """The one line on stderr with which the command exits."""
    with pytest.raises(SystemExit) as exit_:
        main(["train", *args])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


# --- results.json ---


def without_times(tree):
    if isinstance(tree, dict):
        return {name: without_times(value) for name, value in tree.items() if name not in TIMES}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def test_the_configuration_is_recorded(outcome):
    results, _ = outcome
    configuration = results["configuration"]
    assert configuration["optimizers"] == list(OPTIMIZERS)
    assert configuration["learning_rate"] == 0.05
    assert (configuration["epochs"], configuration["seeds"], configuration["seed"]) == (3, 2, 3)
    assert results["versions"]["jax"] == jax.__version__
    assert results["versions"]["optax"] == optax.__version__
    assert set(results["versions"]) >= {"flax", "monge_sam_jax"}
    assert results["device"]["platform"] == jax.devices()[0].platform
    assert results["data"]["train_samples"] + results["data"]["test_samples"] == 1797
    assert results["parameters"] == 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    radii = {name: entry["rho"] for name, entry in results["optimizers"].items()}
    assert radii == {"sgd": None, "sam": 0.05, "monge_sam": 0.05}


def test_means_and_standard_errors_are_those_of_the_seeds(outcome):
    for entry in outcome[0]["optimizers"].values():
        assert set(entry["summary"]) == set(COLUMNS)
        for quantity, summary in entry["summary"].items():
            values = [seed["final"][quantity] for seed in entry["seeds"]]
            error = np.std(values, ddof=1) / np.sqrt(2)
            np.testing.assert_allclose(summary["mean"], np.mean(values), rtol=1e-12)
            np.testing.assert_allclose(summary["standard_error"], error, rtol=1e-9, atol=1e-15)


def test_seeds_differ(outcome):
    for entry in outcome[0]["optimizers"].values():
        first, second = entry["seeds"]
        assert (first["seed"], second["seed"]) == (3, 4)
        assert first["curves"]["train_loss"] != second["curves"]["train_loss"]


def test_final_metrics_are_the_ends_of_the_curves_and_median_times(outcome):
    optimizers = outcome[0]["optimizers"]
    for entry in optimizers.values():
        for seed, sgd in zip(entry["seeds"], optimizers["sgd"]["seeds"], strict=True):
            for quantity in ("train_loss", "test_loss", "test_accuracy"):
                assert len(seed["curves"][quantity]) == EPOCHS
                assert seed["final"][quantity] == seed["curves"][quantity][-1]
            assert len(seed["seconds_per_step"]) == EPOCHS
            seconds = np.median(seed["seconds_per_step"])
            assert seed["final"]["seconds_per_step"] == seconds > 0
            ratio = seconds / np.median(sgd["seconds_per_step"])
            np.testing.assert_allclose(seed["final"]["ratio_to_sgd"], ratio)


def perturbation(name, grads, rho=0.05):
    """Rho g / |g|, and for M-SAM that over sqrt(1 + |g|^2)."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    length = {"sgd": 0.0, "sam": rho, "monge_sam": rho / jnp.sqrt(1 + norm**2)}[name]
    return jax.tree.map(lambda g: length / norm * g, grads), jnp.array([norm, length])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_curves_are_those_of_a_loop_by_hand(outcome, name):
    digits = load_digits()
    split = train_test_split(
        digits.images / 16, digits.target, test_size=0.5, stratify=digits.target, random_state=0
    )
    x, x_test, y, y_test = (np.asarray(a, t) for a, t in zip(split, "ffii", strict=True))
    model = MLP(classes=10)

    @jax.jit
    def loss_fn(params, x, y):
        log_p = jax.nn.log_softmax(model.apply(params, x))
        return -(log_p * jax.nn.one_hot(y, 10)).sum(axis=1).mean()

    grad_fn = jax.grad(loss_fn)
    tx = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(params, state, x, y):
        delta, lengths = perturbation(name, grad_fn(params, x, y))
        updates, state = tx.update(grad_fn(optax.apply_updates(params, delta), x, y), state)
        return optax.apply_updates(params, updates), state, lengths

    params = model.init(jax.random.key(3), x[:1])
    state = tx.init(params)
    curves = outcome[0]["optimizers"][name]["seeds"][0]["curves"]
    for epoch in range(EPOCHS):
        order = np.random.default_rng((3, epoch)).permutation(len(y))
        logged = []
        for k in range(len(y) // BATCH_SIZE):
            batch = order[k * BATCH_SIZE : (k + 1) * BATCH_SIZE]
            params, state, (norm, length) = step(params, state, x[batch], y[batch])
            logged.append((norm, length, length / norm))
        accuracy = np.mean(np.argmax(model.apply(params, x_test), axis=1) == y_test)
        expected = {
            "train_loss": loss_fn(params, x, y),
            "test_loss": loss_fn(params, x_test, y_test),
            "test_accuracy": 100 * accuracy,
        }
        if name != "sgd":
            means = np.mean(logged, axis=0)
            quantities = ("grad_norm", "perturbation_norm", "effective_radius")
            expected |= dict(zip(quantities, means, strict=True))
        assert set(curves) == set(expected)
        for quantity, value in expected.items():
            np.testing.assert_allclose(curves[quantity][epoch], value, rtol=1e-4)


def test_same_command_same_results(outcome, tmp_path):
    results, _ = train(tmp_path, *COMMAND, "--seeds", "2", "--seed", "3")
    results["configuration"]["output"] = outcome[0]["configuration"]["output"]
    assert without_times(results) == without_times(outcome[0])


def test_one_rho_for_all_and_no_height_for_monge_sam(tmp_path):
    results, printed = train(
        tmp_path,
        *("--optimizers", "monge_sam", "adaptive_sam", "--rho", "0.2", "--alpha", "0"),
        *("--base", "adamw", "--epochs", "1", "--seeds", "1", "--sharpness-rho", "0"),
    )
    for entry in results["optimizers"].values():
        assert entry["rho"] == 0.2
        assert abs(entry["seeds"][0]["final"]["sharpness"]) < 1e-5
        assert all(summary["standard_error"] is None for summary in entry["summary"].values())
    curves = results["optimizers"]["monge_sam"]["seeds"][0]["curves"]
    np.testing.assert_allclose(curves["perturbation_norm"], 0.2, rtol=1e-6)
    assert results["configuration"]["learning_rate"] == 0.001
    assert "±" not in printed
    assert "ratio_to_sgd" not in results["optimizers"]["monge_sam"]["summary"]
    assert printed.count(" -") == 2


def test_a_run_that_diverges_gives_valid_json(tmp_path):
    results, printed = train(
        tmp_path,
        *("--optimizers", "sgd", "sam", "--learning-rate", "1e30"),
        *("--epochs", "1", "--seeds", "2"),
    )
    for entry in results["optimizers"].values():
        assert entry["summary"]["train_loss"] == {"mean": None, "standard_error": None}
        assert entry["seeds"][0]["curves"]["train_loss"] == [None]
        assert entry["seeds"][0]["final"]["sharpness"] is None
    assert printed.count("diverged") == 6
    assert (tmp_path / "training.png").stat().st_size > 0


# --- table and figure ---


def test_the_table_shows_mean_and_standard_error(outcome):
    results, printed = outcome
    assert all(entry["label"] in printed for entry in results["optimizers"].values())
    for quantity, (_, factor) in COLUMNS.items():
        summaries = [entry["summary"][quantity] for entry in results["optimizers"].values()]
        if quantity == "ratio_to_sgd":
            summaries[0] = {"mean": 1.0}  # its own, without an error
        cells = format_column(summaries, factor)
        assert all(line in printed for cell in cells for line in cell.split("\n"))


@pytest.mark.parametrize(
    ("pairs", "cells"),
    [
        ([(12.3456, 0.123), (9.0, 0.01)], ["12.35\n±0.12", "9.00\n±0.01"]),
        ([(1234.5, 67.8)], ["1234\n±68"]),
        ([(-0.5, 0.00999)], ["-0.5000\n±0.0100"]),
        ([(1.234e-6, 2.5e-7)], ["1.23e-06\n±2.5e-07"]),
        ([(0.0, 1e9)], ["0.00e+00\n±1.0e+09"]),
        ([(1.0, 0.0), (2.5, 0.021)], ["1.000\n±0", "2.500\n±0.021"]),
        ([(1.0, 0.0004), (2.5, 0.21)], ["1.00\n±4e-04", "2.50\n±0.21"]),
        ([(1.0, None), (1.984, None), (0.25, None)], ["1.000", "1.984", "0.250"]),
        ([(97.654321, None), (100.0, None)], ["97.7", "100.0"]),
        ([(0.0, None)], ["0.000"]),
        ([(None, None), (1.0, None)], ["diverged", "1.000"]),
    ],
)
def test_decimals_are_alike_in_a_column(pairs, cells):
    summaries = [{"mean": mean, "standard_error": error} for mean, error in pairs]
    assert format_column(summaries) == cells


def test_one_diverged_seed_makes_the_mean_diverge():
    seeds = [{"loss": 1.0, "time": 1.0}, {"loss": float("inf"), "time": 3.0}]
    assert report.jsonable(report.summarise(seeds)) == {
        "loss": {"mean": None, "standard_error": None},
        "time": {"mean": 2.0, "standard_error": 1.0},
    }


def test_the_figure_draws_means_and_bands(outcome):
    results, _ = outcome
    figure = training_figure(results)
    panels = ("train_loss", "test_accuracy", "effective_radius")
    for axes, quantity in zip(figure.axes, panels, strict=True):
        names = [
            n for n in OPTIMIZERS if quantity in results["optimizers"][n]["seeds"][0]["curves"]
        ]
        assert len(axes.lines) == len(axes.collections) == len(names)
        for name, line, band in zip(names, axes.lines, axes.collections, strict=True):
            seeds = results["optimizers"][name]["seeds"]
            curves = np.array([seed["curves"][quantity] for seed in seeds])
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
            np.testing.assert_allclose(line.get_ydata(), curves.mean(axis=0))
            edges = band.get_paths()[0].vertices[:, 1]
            error = curves.std(axis=0, ddof=1) / np.sqrt(2)
            np.testing.assert_allclose(edges.max(), np.max(curves.mean(axis=0) + error))
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "log"]
    assert [text.get_text() for text in figure.legends[0].texts] == [
        *("SGD", "SAM", "M-SAM", "± one standard error")
    ]
    check_column(figure)


def test_the_png_shows_the_optimizers_that_ran(outcome, folder):
    del outcome
    pixels = matplotlib.image.imread(folder / "training.png")[..., :3]
    height, width, _ = pixels.shape
    assert width == pytest.approx(plotting.FIGURE_WIDTH * plotting.DOTS_PER_INCH)
    assert 400 < height < width
    for name, colour in plotting.COLOURS.items():
        shown = np.all(np.abs(pixels - to_rgb(colour)) < 0.01, axis=-1).sum()
        assert (shown > 100) == (name in OPTIMIZERS)


# --- what is measured, and how ---


def softmax_regression(x, y, weights, bias):
    """Mean cross-entropy and its gradient."""
    logits = x @ weights + bias
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    residual = p - np.eye(p.shape[1])[y]
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    return loss, x.T @ residual / len(y), residual.mean(axis=0)


@pytest.mark.parametrize("largest_chunk", [2048, 7])
def test_measures_are_those_of_softmax_regression(monkeypatch, largest_chunk):
    monkeypatch.setattr(task, "LARGEST_CHUNK", largest_chunk)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)), rng.integers(3, size=40)
    batch = data.Batch(jnp.asarray(x, "float32"), jnp.asarray(y, "int32"))
    test = data.Batch(batch.x[:17], batch.y[:17])
    problem = task.Task(data.Dataset(batch, test, classes=3), nn.Dense(3))
    variables = jax.tree.map(lambda p: p + 0.1, problem.init(0))
    weights, bias = (np.asarray(variables["params"][k], float) for k in ("kernel", "bias"))

    loss, g_weights, g_bias = softmax_regression(x, y, weights, bias)
    norm = np.sqrt(np.sum(g_weights**2) + np.sum(g_bias**2))
    step = 0.5 / norm
    there, *_ = softmax_regression(x, y, weights + step * g_weights, bias + step * g_bias)
    np.testing.assert_allclose(problem.sharpness(variables, 0.5), there - loss, rtol=1e-5)

    correct = np.argmax(x[:17] @ weights + bias, axis=1) == y[:17]
    expected = {
        "train_loss": loss,
        "test_loss": softmax_regression(x[:17], y[:17], weights, bias)[0],
        "test_accuracy": 100 * correct.mean(),
    }
    measured = problem.measure(variables)
    assert set(measured) == set(expected)
    for quantity, value in expected.items():
        np.testing.assert_allclose(measured[quantity], value, rtol=1e-5)


def small_task(model=None, shape=(20, 3), dtype="float32", sharding=None, kind=task.Task):
    rng = np.random.default_rng(1)
    batch = data.Batch(
        jnp.asarray(rng.normal(size=shape), dtype),
        jnp.asarray(rng.integers(2, size=shape[0]), "int32"),
    )
    dataset = data.Dataset(batch, batch, classes=2)
    return kind(dataset, model or nn.Dense(2), placement.make_placement(sharding))


def cross_entropy(params, batch):
    """Of a linear model."""
    log_p = jax.nn.log_softmax(batch.x @ params["kernel"] + params["bias"][None])
    return -jnp.mean(jnp.sum(log_p * jax.nn.one_hot(batch.y, 2), axis=1))


def test_optimizers_take_turns_in_a_fixed_order_and_compile_once():
    problem = small_task()
    steps = []

    def recording(name, optimizer):
        def step(*args):
            steps.append(name)
            return optimizer.step(*args)

        return optimizer._replace(step=step)

    optimizers = {
        name: training.make_optimizer(name, optax.adam(0.01), problem)
        for name in ("sgd", *training.BUILDERS)
    }
    training.compile_steps(problem, optimizers, batch_size=8)
    assert all(optimizer.step._cache_size() == 1 for optimizer in optimizers.values())
    recorded = {name: recording(name, optimizer) for name, optimizer in optimizers.items()}
    calls, ends = [], []
    for _ in range(2):
        steps.clear()
        training.train(
            problem,
            recorded,
            training.begin(recorded, seed=0),
            seed=0,
            epochs=6,
            batch_size=8,
            on_turn=lambda: calls.append(steps[-1]),
            on_epoch=lambda: ends.append(len(steps)),
        )
        turns = np.array(steps).reshape(6, 5, 2)  # epochs, optimizers, steps: 20 // 8
        assert np.all(turns[..., 0] == turns[..., 1])
        orders = [tuple(epoch) for epoch in turns[..., 0]]
        assert all(set(order) == set(optimizers) for order in orders)
        assert len(set(orders)) > 1
    assert calls[:30] == calls[30:] == [name for order in orders for name in order]
    assert ends == 2 * [10, 20, 30, 40, 50, 60]
    assert all(optimizer.step._cache_size() == 1 for optimizer in optimizers.values())


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("sgd", optax.sgd(0.1, momentum=0.9)),
        ("adam", optax.adam(0.1)),
        ("adamw", optax.adamw(0.1)),
    ],
)
def test_sgd_is_the_base_optimizer_alone(base, expected):
    problem = small_task()
    optimizer = training.make_optimizer("sgd", training.BASES[base](0.1), problem)

    @jax.jit
    def expected_step(params, state):
        grads = jax.grad(cross_entropy)(params, problem.dataset.train)
        updates, state = expected.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, reference = optimizer.init(0), problem.init(0)["params"]
    reference_state = expected.init(reference)
    batch = problem.placement.place_batch(problem.dataset.train, slice(None))
    for _ in range(2):
        reference, reference_state = expected_step(reference, reference_state)
        state, logged = optimizer.step(state, batch)
        assert logged.shape == (0,)
    chex.assert_trees_all_close(state.params, reference, rtol=1e-6)


# --- running statistics and dtypes ---


def test_batch_norm_gathers_running_statistics_and_evaluation_uses_them():
    problem = small_task(CNN(classes=2, channels=2), shape=(20, 4, 4))
    optimizer = training.make_optimizer("sgd", optax.sgd(0.1), problem)
    samples = problem.placement.place_batch(problem.dataset.train, slice(None))
    state = optimizer.init(0)
    convolution = nn.Conv(2, (3, 3), use_bias=False)
    params = {"params": state.params["Conv_0"]}
    convolved = np.asarray(jax.jit(convolution.apply)(params, samples.x[..., None]))
    run = training.Run(optimizer.step(state, samples)[0])
    stats = run.variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * convolved.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * convolved.var((0, 1, 2)), rtol=1e-4)
    evaluate = jax.jit(problem.loss_and_accuracy)
    one_by_one = [
        evaluate(run.variables, data.Batch(samples.x[i, None], samples.y[i, None]))
        for i in range(20)
    ]
    together = evaluate(run.variables, samples)
    np.testing.assert_allclose(np.mean(one_by_one, axis=0), together, rtol=1e-5)


@pytest.mark.parametrize("widen_params", [True, False])
def test_bfloat16_computes_in_it_and_measures_in_float32(widen_params):
    seen = []

    class Recording(task.Task):
        def train_loss(self, variables, batch, rngs):
            loss, aux = super().train_loss(variables, batch, rngs)
            logits = self.model.apply(variables, batch.x)
            kernel = variables["params"]["Dense_0"]["kernel"]
            seen.append((kernel.dtype, logits.dtype, loss.dtype))
            return loss, aux

    model = MLP(classes=2, width=4, dtype=jnp.bfloat16)
    problem = small_task(model, dtype="bfloat16", kind=Recording)
    base = optax.sgd(0.1, momentum=0.9)
    optimizer = training.make_optimizer("monge_sam", base, problem, widen_params=widen_params)
    runs = {"monge_sam": training.Run(optimizer.init(0))}
    training.train(problem, {"monge_sam": optimizer}, runs, seed=0, epochs=1, batch_size=10)
    second = "float32" if widen_params else "bfloat16"
    assert seen == [("bfloat16", "bfloat16", "float32"), (second, second, "float32")]
    state, curves = runs["monge_sam"].state, runs["monge_sam"].curves
    for tree in (state.params, optax.tree.get(state.opt_state, "trace")):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"bfloat16"}
    assert np.all(np.isfinite(list(curves.values())))
    assert 0 < curves["perturbation_norm"][0] < 0.05


def test_sharpness_of_bfloat16_params_does_not_lose_a_small_step():
    half = small_task(dtype="bfloat16")
    samples = half.dataset.train._replace(x=half.dataset.train.x.astype("float32"))
    full = task.Task(data.Dataset(samples, samples, classes=2), nn.Dense(2))
    params = jax.tree.map(lambda p: jnp.full_like(p, 0.5), full.init(0))
    params["params"]["kernel"] = params["params"]["kernel"].at[0, 0].set(2.0)
    halved = jax.tree.map(lambda p: p.astype("bfloat16"), params)
    expected = full.sharpness(params, 1e-3)
    assert expected > 1e-5
    np.testing.assert_allclose(half.sharpness(halved, 1e-3), expected, rtol=1e-2)


# --- many devices in one process ---


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, use_bias=False)(x)  # whose gradient would be rounding errors
        training = self.is_mutable_collection("batch_stats")
        return nn.Dense(2)(nn.relu(nn.BatchNorm(not training, momentum=0.9)(x)))


@pytest.mark.parametrize("sharding", [pytest.param("data", marks=pytest.mark.slow), "fsdp"])
def test_sharded_training_is_that_of_one_device(eight_devices, sharding):
    finished = []
    for layout in (None, sharding):
        problem = small_task(Normalised(), sharding=layout)
        optimizer = training.make_optimizer("monge_sam", optax.adam(0.01), problem, rho=0.5)
        runs = {"monge_sam": training.Run(optimizer.init(0))}
        training.train(problem, {"monge_sam": optimizer}, runs, seed=0, epochs=3, batch_size=16)
        assert optimizer.step._cache_size() == 1
        finished.append((problem, runs["monge_sam"]))
    (alone, expected), (problem, run) = finished
    assert (alone.placement.mesh.size, problem.placement.mesh.size) == (1, 8)
    chex.assert_trees_all_close(run.variables, expected.variables, rtol=1e-4, atol=1e-6)
    for quantity, curve in expected.curves.items():
        np.testing.assert_allclose(run.curves[quantity], curve, rtol=1e-5)
    np.testing.assert_allclose(
        problem.sharpness(run.variables, 0.5), alone.sharpness(expected.variables, 0.5), rtol=1e-4
    )


@pytest.mark.parametrize("perturbation", ["synchronised", "per-shard"])
def test_full_sharding_divides_params_and_momenta_along_the_largest_dimension(
    eight_devices, perturbation
):
    problem = small_task(MLP(classes=2, width=16), sharding="fsdp")
    optimizer = training.make_optimizer(
        "sam", optax.sgd(0.01, momentum=0.9), problem, perturbation=perturbation
    )
    batch = problem.placement.place_batch(problem.dataset.train, slice(16))
    for state in (optimizer.init(0), optimizer.step(optimizer.init(0), batch)[0]):
        for tree in (state.params, optax.tree.get(state.opt_state, "trace")):
            parts = {
                f"{layer}/{name}": leaf.addressable_shards[0].data.shape
                for layer, leaves in tree.items()
                for name, leaf in leaves.items()
            }
            assert parts == {
                "Dense_0/kernel": (3, 2),
                "Dense_0/bias": (2,),
                "Dense_1/kernel": (2, 16),
                "Dense_1/bias": (2,),
                "Dense_2/kernel": (2, 2),
                "Dense_2/bias": (2,),  # two numbers for eight devices: whole on all of them
            }
    assert len(state.params["Dense_2"]["bias"].sharding.device_set) == 8


@pytest.mark.parametrize("sharding", ["data", "fsdp"])
def test_each_shard_perturbs_for_itself(eight_devices, sharding):
    problem = small_task(shape=(16, 8), sharding=sharding)
    optimizer = training.make_optimizer(
        "monge_sam", optax.sgd(0.1), problem, rho=0.5, alpha=2.0, perturbation="per-shard"
    )
    state = optimizer.init(0)
    params = jax.tree.map(jnp.asarray, jax.device_get(state.params))
    samples = problem.dataset.train
    grad_fn = jax.jit(jax.grad(cross_entropy))
    gradients, logged = [], []
    for i in range(0, 16, 2):
        part = data.Batch(samples.x[i : i + 2], samples.y[i : i + 2])
        g = jax.tree.map(np.asarray, grad_fn(params, part))
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
        length = 0.5 / np.sqrt(1 + 4 * norm**2)
        perturbed = jax.tree.map(lambda p, x, k=length / norm: p + k * x, params, g)
        gradients.append(grad_fn(perturbed, part))
        logged.append([length / norm, length, norm])
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *gradients)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, mean)
    state, vector = optimizer.step(state, problem.placement.place_batch(samples, slice(None)))
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vector, np.mean(logged, axis=0), rtol=1e-5)


def test_options_reach_the_optimizers(eight_devices, tmp_path, monkeypatch):
    class EnoughError(Exception):
        pass

    def make_optimizer(name, base, problem, **options):
        raise EnoughError(name, problem, options)

    monkeypatch.setattr(comparison, "make_optimizer", make_optimizer)
    command = ("--optimizers", "sam", "--sharding", "fsdp", "--perturbation", "per-shard")
    command = (*command, "--rho", "0.2", "--alpha", "3", "--no-widen-params")
    with pytest.raises(EnoughError) as raised:
        train(tmp_path, *command, "--dtype", "bfloat16")
    name, problem, options = raised.value.args
    assert (name, problem.placement.mesh.size, problem.placement.fully_sharded) == ("sam", 8, True)
    assert options == {
        **{"rho": 0.2, "alpha": 3.0, "widen_params": False},
        "perturbation": "per-shard",
    }
    assert problem.dataset.train.x.dtype == problem.dataset.test.x.dtype == "bfloat16"
    assert jax.tree.leaves(problem.init(0))[0].dtype == "bfloat16"


# --- checkpoints ---

RESUMED = (
    *("--model", "cnn", "--dtype", "bfloat16", "--optimizers", "sgd", "monge_sam"),
    *("--epochs", "3", "--seeds", "2", "--batch-size", "10"),
)


def checkpoints_in(output):
    names = set(os.listdir(output / "checkpoints"))
    assert checkpoints.OPTIONS in names
    return sorted(names - {checkpoints.OPTIONS})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images") / "d.npz", **some((40, 4, 4)))


@pytest.fixture(scope="module")
def compiled_once():
    """Runs of `RESUMED` share a task and its compiled steps."""
    built = {}

    def once(build):
        def build_or_reuse(*args, **options):
            key = (build, args[0]) if isinstance(args[0], str) else build
            if key not in built:
                built[key] = build(*args, **options)
            return built[key]

        return build_or_reuse

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "Task", once(task.Task))
        patch.setattr(comparison, "make_optimizer", once(training.make_optimizer))
        yield


@pytest.fixture(scope="module")
def uninterrupted(compiled_once, images, tmp_path_factory):
    del compiled_once
    output = tmp_path_factory.mktemp("uninterrupted")
    (output / "checkpoints" / "epoch_100").mkdir(parents=True)  # of an earlier run
    command = (*RESUMED, "--data", str(images), "--checkpoint-every", "4")
    results, _ = train(output, *command, "--overwrite")
    assert checkpoints_in(output) == ["epoch_4"]
    return results["optimizers"], output


def interrupt(monkeypatch, number, by):
    """The run ends at that checkpoint: after it (KeyboardInterrupt) or within it (TypeError)."""
    save = checkpoints.Checkpoints.save_if_due

    def save_and_end(self, stage):
        if self.epochs_behind(stage) == number and by is TypeError:
            self._fingerprint = object()  # which is no JSON
        save(self, stage)
        if self.epochs_behind(stage) == number:
            raise by

    monkeypatch.setattr(checkpoints.Checkpoints, "save_if_due", save_and_end)


def test_an_interrupted_run_is_resumed_bit_for_bit(uninterrupted, images, tmp_path, monkeypatch):
    command = (*RESUMED, "--data", str(images), "--checkpoint-every", "1")
    for number, by, resume, left in (
        (2, KeyboardInterrupt, (), ["epoch_1", "epoch_2"]),
        (3, KeyboardInterrupt, ("--resume",), ["epoch_2", "epoch_3"]),
        (5, TypeError, ("--resume",), ["epoch_3", "epoch_4"]),
    ):
        with monkeypatch.context() as patch:
            interrupt(patch, number, by)
            with pytest.raises(SystemExit if by is KeyboardInterrupt else by):
                train(tmp_path, *command, *resume)
        found = checkpoints_in(tmp_path)
        assert [name for name in found if "tmp" not in name] == left
        assert any("tmp" in name for name in found) == (by is TypeError)
        assert not (tmp_path / "results.json").exists()
    results, _ = train(tmp_path, *command, "--resume")
    assert without_times(results["optimizers"]) == without_times(uninterrupted[0])
    assert checkpoints_in(tmp_path) == ["epoch_5", "epoch_6"]


def test_a_checkpoint_of_other_options_is_refused(uninterrupted, images, capsys):
    command = (*RESUMED, "--data", str(images), "--output", str(uninterrupted[1]), "--resume")
    assert "--alpha was 1.0, and is 2.0 now" in error_line(capsys, *command, "--alpha", "2")


def test_checkpoints_of_other_options_are_not_deleted(
    compiled_once, images, tmp_path, monkeypatch, capsys
):
    del compiled_once
    command = (*RESUMED, "--data", str(images), "--checkpoint-every", "1")
    with monkeypatch.context() as patch:
        interrupt(patch, 2, KeyboardInterrupt)
        with pytest.raises(SystemExit):
            train(tmp_path, *command)
    capsys.readouterr()
    others = (*command, "--output", str(tmp_path))
    line = error_line(capsys, *others, "--alpha", "2")
    assert "its checkpoints/options.json is of other options, which differ in --alpha (was" in line
    assert "--overwrite" in line
    assert checkpoints_in(tmp_path) == ["epoch_1", "epoch_2"]
    (tmp_path / "checkpoints" / checkpoints.OPTIONS).unlink()
    assert "does not say of what options it is" in error_line(capsys, *others)
    train(tmp_path, *command, "--alpha", "2", "--overwrite")
    assert checkpoints_in(tmp_path) == ["epoch_5", "epoch_6"]


def test_nothing_to_resume_is_said_in_one_line(compiled_once, images, tmp_path, capsys):
    del compiled_once
    command = (*RESUMED, "--data", str(images), "--output", str(tmp_path), "--resume")
    assert f"--resume: there is no checkpoint in {tmp_path}" in error_line(capsys, *command)


@pytest.mark.parametrize(
    ("share", "left"),
    [(1e-9, ["epoch_1"]), pytest.param(1e9, ["epoch_5", "epoch_6"], marks=pytest.mark.slow)],
)
def test_checkpoints_take_a_small_share_of_the_time(
    share, left, compiled_once, images, tmp_path, monkeypatch
):
    del compiled_once
    monkeypatch.setattr(checkpoints, "LARGEST_SHARE", share)
    train(tmp_path, *RESUMED, "--data", str(images))
    assert checkpoints_in(tmp_path) == left


OTHER = {"optimizers": ("sgd",), "base": "adam", "model": "cnn", "dtype": "bfloat16"}
NOT_COMPARED = {
    *(
        "output",
        "overwrite",
        "tensorboard",
        "checkpoint_every",
        "resume",
        "distributed",
        "sharding",
    ),
    *("coordinator_address", "num_processes", "process_id"),
}


def test_whatever_decides_the_results_is_compared():
    dataset = small_task().dataset
    options = Train()
    saved = checkpoints.fingerprint(options, dataset)
    for field in dataclasses.fields(options):
        value = OTHER.get(field.name, "other" if field.name == "perturbation" else 0.123)
        other = dataclasses.replace(options, **{field.name: value})
        present = checkpoints.fingerprint(other, dataset)
        if field.name in NOT_COMPARED:
            checkpoints.check_fingerprint(saved, present)
        else:
            with pytest.raises(InputError, match=f"--{field.name.replace('_', '-')} was"):
                checkpoints.check_fingerprint(saved, present)
    changed = dataset._replace(test=dataset.test._replace(y=1 - dataset.test.y))
    with pytest.raises(InputError, match="checksum of the data was"):
        checkpoints.check_fingerprint(saved, checkpoints.fingerprint(options, changed))
    options = Train(sharding="data", perturbation="per-shard")
    saved = checkpoints.fingerprint(options, dataset) | {"the number of devices": 2}
    with pytest.raises(InputError, match="the number of devices was 2, and is 8 now"):
        checkpoints.check_fingerprint(saved, checkpoints.fingerprint(options, dataset))


# --- the user's own data ---


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def some(shape, classes=2):
    rng = np.random.default_rng(0)
    return {"x": rng.normal(3, 2, size=shape), "y": np.arange(shape[0]) % classes}


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((40, 3), 0), ((40, 4, 4), (0, 1, 2)), ((40, 4, 4, 3), (0, 1, 2))],
)
def test_data_are_standardised_with_the_training_set(tmp_path, shape, axes):
    arrays = some(shape)
    arrays["x"][:20] += 10  # so that the two sets differ
    dataset = from_file(write(tmp_path / "d.npz", **arrays))
    np.testing.assert_allclose(np.mean(dataset.train.x, axes), 0, atol=1e-6)
    np.testing.assert_allclose(np.std(dataset.train.x, axes), 1, rtol=1e-6)
    # One affine map takes all raw values to those of both sets.
    raw = np.sort(arrays["x"].reshape(-1, shape[-1] if len(shape) != 3 else 1), axis=0)
    both = np.concatenate([dataset.train.x, dataset.test.x])
    new = np.sort(both.reshape(raw.shape), axis=0)
    slope = (new[-1] - new[0]) / (raw[-1] - raw[0])
    np.testing.assert_allclose(new, new[0] + slope * (raw - raw[0]), atol=1e-4)


def test_classes_are_counted_from_zero_in_proportion(tmp_path):
    x = np.stack([np.arange(60.0), np.full(60, 0.1)], axis=1)  # a constant feature
    y = np.repeat(np.array([7, 300, 12], np.uint16), [30, 20, 10])
    dataset = from_file(write(tmp_path / "d.npz", x=x, y=y))
    assert dataset.classes == 3
    for samples in (dataset.train, dataset.test):
        np.testing.assert_array_equal(np.bincount(samples.y), [15, 5, 10])
        np.testing.assert_allclose(samples.x[:, 1], 0, atol=1e-6)
    # 0 to 29 are class 7, the first; 30 to 49 class 300, the last; order is kept by scaling.
    first, last = (dataset.train.x[dataset.train.y == k, 0] for k in (0, 2))
    assert first.max() < last.min()


def test_a_convolutional_net_on_images_of_the_user(tmp_path):
    path = write(tmp_path / "mine.npz", **some((40, 5, 6, 3)))
    results, printed = train(
        tmp_path / "deep" / "folder",
        *("--data", str(path), "--model", "cnn", "--optimizers", "fisher_sam"),
        *("--epochs", "1", "--seeds", "1", "--batch-size", "20"),
    )
    assert results["data"] == {
        "name": "mine.npz",
        "train_samples": 20,
        "test_samples": 20,
        "sample_shape": [5, 6, 3],
        "classes": 2,
    }
    assert np.isfinite(results["optimizers"]["fisher_sam"]["summary"]["sharpness"]["mean"])
    assert "mine.npz: cnn" in printed


def test_the_convolutional_net_adds_the_channel():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    model = CNN(classes=3, channels=2)
    apply = jax.jit(model.apply)
    params = jax.jit(model.init)(jax.random.key(1), x)
    assert params["params"]["Conv_0"]["kernel"].shape == (3, 3, 1, 2)
    assert apply(params, x).shape == (2, 3)
    np.testing.assert_array_equal(apply(params, x), apply(params, x[..., None]))


X, Y = some((40, 3)).values()
MALFORMED = {
    "missing x": ({"y": Y}, "no array x"),
    "missing y": ({"x": X}, "no array y"),
    "pickled": ({"x": X.astype(object), "y": Y}, "Object arrays cannot be loaded"),
    "text": ({"x": X.astype(str), "y": Y}, "x must hold integers or floats"),
    "complex": ({"x": X + 1j, "y": Y}, "x must hold integers or floats, got complex128"),
    "nan": ({"x": np.where(X > 3, np.nan, X), "y": Y}, "x is not finite"),
    "infinite": ({"x": np.where(X > 3, -np.inf, X), "y": Y}, "x is not finite"),
    "too large": ({"x": X * 1e40, "y": Y}, "x is not finite"),
    "length": ({"x": X, "y": Y[1:]}, "x and y differ in length: 40 and 39"),
    "float labels": ({"x": X, "y": Y.astype(float)}, "labels y must be integers, got float64"),
    "bool labels": ({"x": X, "y": Y == 1}, "labels y must be integers, got bool"),
    "negative": ({"x": X, "y": Y - 1}, "labels y must not be negative, got -1"),
    "single class": ({"x": X, "y": Y * 0 + 4}, "y has a single class, 4"),
    "few of a class": ({"x": X, "y": (np.arange(40) > 36) + 8}, "class 9 has 3"),
    "few": ({"x": X[:2], "y": Y[:2]}, "too few samples"),
    "no samples": ({"x": X[:0], "y": Y[:0]}, "x is empty"),
    "no features": ({"x": X[:, :0], "y": Y}, "x is empty"),
    "flat x": ({"x": X[:, 0], "y": Y}, "x must be (n, ...) and y (n,), got (40,) and (40,)"),
    "matrix y": ({"x": X, "y": Y[:, None]}, "x must be (n, ...) and y (n,)"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arrays_are_refused_in_one_line(case, tmp_path, capsys):
    arrays, message = MALFORMED[case]
    path = write(tmp_path / "d.npz", **arrays)
    line = error_line(capsys, "--data", str(path), "--output", str(tmp_path / "out"))
    assert line.startswith(f"monge-sam: error: {path}: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_archives_are_refused_in_one_line(tmp_path, capsys):
    good = write(tmp_path / "good.npz", x=X, y=Y).read_bytes()
    corrupt = bytearray(good)
    corrupt[200:300] = bytes(100)
    np.save(tmp_path / "array.npy", X)
    files = {
        "empty.npz": b"",
        "text.npz": b"x,y\n1,2\n",
        "pickle.npz": b"\x80\x04N.",
        "truncated.npz": good[: len(good) // 2],
        "corrupt.npz": bytes(corrupt),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        line = error_line(capsys, "--data", str(tmp_path / name))
        assert f"{name}: cannot be read as an .npz file of plain arrays" in line
    assert "no such file" in error_line(capsys, "--data", str(tmp_path / "absent.npz"))
    assert "no such file" in error_line(capsys, "--data", str(tmp_path / "two\nlines.npz"))
    assert "directory" in error_line(capsys, "--data", str(tmp_path))
    assert "no array x" in error_line(capsys, "--data", str(tmp_path / "array.npy"))


@pytest.mark.parametrize("shape", [(40, 16), (40, 2, 2, 2, 2)])
def test_the_convolutional_net_needs_images(shape, tmp_path, capsys):
    path = write(tmp_path / "d.npz", **some(shape))
    line = error_line(capsys, "--data", str(path), "--model", "cnn")
    assert "the cnn needs images" in line
    assert str(shape[1:])[1:-1].rstrip(",") in line


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rho -0.1", "--rho must be finite and not negative, got -0.1"),
        ("--rho nan", "--rho must be finite and not negative, got nan"),
        ("--alpha -1", "--alpha must be finite and not negative, got -1"),
        ("--learning-rate inf", "--learning-rate must be finite and positive, got inf"),
        ("--sharpness-rho -1", "--sharpness-rho must be finite and not negative, got -1"),
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--seeds -2", "--seeds must be at least 1, got -2"),
        ("--seed -1", "--seed must be from 0 to 2147483647, got -1"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--batch-size 899", "--batch-size 899 is larger than the training set of 898"),
        ("--optimizers", "--optimizers needs at least one name"),
        ("--optimizers sam sam", "--optimizers has a name twice: sam sam"),
        ("--checkpoint-every -1", "--checkpoint-every must be at least 0, got -1"),
        ("--perturbation per-shard", "--perturbation per-shard needs --sharding data or fsdp"),
        ("--process-id 0", "--process-id needs --distributed"),
        ("--distributed --coordinator-address here", "must be host:port, got here"),
        ("--distributed --num-processes 0", "--num-processes must be at least 1, got 0"),
        ("--distributed --num-processes 2 --process-id 2", "--process-id must be from 0 to"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, tmp_path, capsys):
    line = error_line(capsys, *options.split(), "--output", str(tmp_path / "out"))
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_batch_that_the_devices_do_not_divide_is_refused(eight_devices, tmp_path, capsys):
    options = ("--sharding", "data", "--batch-size", "20", "--output", str(tmp_path / "out"))
    assert "--batch-size 20 cannot be divided among 8 devices" in error_line(capsys, *options)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    line = error_line(capsys, "--output", str(tmp_path / "file"))
    assert f"--output {tmp_path / 'file'}: File exists" in line


@pytest.mark.parametrize(
    "args", [["train", "--optimizers", "lion"], ["train", "--epochs", "x"], []]
)
def test_what_cannot_be_parsed_exits_with_code_two(args, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    assert capsys.readouterr().err


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Train):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "mean zero" in text


def test_a_missing_extra_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    line = error_line(capsys)
    assert "tyro is missing; pip install 'monge_sam_jax[cli]'" in line
    assert "in a clone: pip install -e '.[cli]'" in line


def test_help_waits_for_no_heavy_import():
    code = (
        "import sys; from monge_sam_jax.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'flax', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "train" in finished.stdout
