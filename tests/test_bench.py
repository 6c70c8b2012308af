"""The command `monge-sam bench`: what its methods compute, how it measures, and what it writes."""

import contextlib
import dataclasses
import io
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

from monge_sam_jax.__main__ import main
from monge_sam_jax.experiments import InputError, bench_models, bench_report, benchmark
from monge_sam_jax.experiments.bench_measure import (
    Program,
    Start,
    compile_method,
    cycles_for,
    first_carry,
    interleave,
    measure,
    start,
    without_compilation_cache,
)
from monge_sam_jax.experiments.bench_steps import METHODS, RHO, Carry, Method
from monge_sam_jax.experiments.data import Batch
from monge_sam_jax.plotting_bench import benchmark_figure

# --- the methods compute what they say ---

DECAY, RATE = 0.9, 0.1


def loss_fn(params, stats, batch):
    hidden = jnp.tanh(batch.x @ params["body"])
    loss = jnp.mean((hidden @ params["head"] - batch.y) ** 2)
    return loss, {"mean": 0.5 * stats["mean"] + 0.5 * jnp.mean(hidden)}


@pytest.fixture(scope="module")
def begin():
    rng = np.random.default_rng(0)
    shapes = {"body": (3, 4), "head": (4,)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    batch = Batch(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 3), (8,))))
    return Start(params, {"mean": jnp.zeros(())}, batch)


def problem(has_convolutions=False):
    base = optax.sgd(RATE, momentum=DECAY)
    return bench_models.Problem("a test", None, loss_fn, base, has_convolutions)


def gradient(params, batch):
    return jax.grad(lambda p: loss_fn(p, {"mean": 0.0}, batch)[0])(params)


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in tree.values())))


def add(a, factor, b):
    return {name: a[name] + factor * b[name] for name in a}


def sam_step(params, g):
    return add(params, RHO / norm(g), g)


def monge_step(params, g):
    return add(params, RHO / (norm(g) * np.sqrt(1 + norm(g) ** 2)), g)


def adaptive_step(params, g):
    size = {name: np.abs(p) + 0.01 for name, p in params.items()}
    length = norm({name: size[name] * g[name] for name in g})
    return add(params, RHO / length, {name: size[name] ** 2 * g[name] for name in g})


def fisher_step(params, g):
    h = {name: x / (1 + x**2) for name, x in g.items()}
    return add(params, RHO / np.sqrt(sum(float(np.sum(g[name] * h[name])) for name in g)), h)


def last_layer_step(params, g):
    return params | monge_step({"head": params["head"]}, {"head": g["head"]})


def rows(batch, which):
    return Batch(batch.x[which], batch.y[which])


def at_perturbed(perturb, first=slice(None)):
    """The gradient at what `perturb` makes of the gradient of some samples."""

    def robust(params, batch, step):
        return gradient(perturb(params, gradient(params, rows(batch, first))), batch)

    return robust


def of_microbatches(params, batch, step):
    parts = [rows(batch, slice(i, None, 4)) for i in range(4)]
    grads = [gradient(monge_step(params, gradient(params, part)), part) for part in parts]
    return {name: np.mean([g[name] for g in grads], axis=0) for name in params}


def every_fifth(params, batch, step):
    g = gradient(params, batch)
    return gradient(monge_step(params, g), batch) if step % 5 == 0 else g


BY_HAND = {
    "plain": at_perturbed(lambda params, g: params),
    "two_gradients": at_perturbed(lambda params, g: add(params, RHO, g)),
    "sam_by_hand": at_perturbed(sam_step),
    "monge_by_hand": at_perturbed(monge_step),
    "optax_opaque": at_perturbed(sam_step),
    "optax_transparent": at_perturbed(sam_step),
    "sam": at_perturbed(sam_step),
    "monge_sam": at_perturbed(monge_step),
    "adaptive_sam": at_perturbed(adaptive_step),
    "fisher_sam": at_perturbed(fisher_step),
    "monge_m_sharpness": of_microbatches,
    "monge_period_5": every_fifth,
    "monge_last_layer": at_perturbed(last_layer_step),
    "monge_quarter_batch": at_perturbed(monge_step, first=slice(None, None, 4)),
}


def descend(params, trace, g):
    trace = add(g, DECAY, trace)
    return add(params, -RATE, trace), trace


def train_by_hand(name, begin, descents):
    """Params after so many steps, and where the last pass for the loss and the statistics was."""
    params, trace = begin.params, jax.tree.map(jnp.zeros_like, begin.params)
    if name in BY_HAND:
        for step in range(descents):
            last = params
            params, trace = descend(params, trace, BY_HAND[name](params, begin.batch, step))
        return params, last
    perturbed = params
    for _ in range(descents):
        last = perturbed
        g = gradient(perturbed, begin.batch)
        params, trace = descend(params, trace, g)
        perturbed = monge_step(params, g if name == "one_pass_gradient" else trace)
    return perturbed, last


def train(method, begin, cycles):
    carry = first_carry(method, begin)
    for step in method.cycle * cycles:
        carry, loss = step(carry, begin.batch)
    return carry, loss


@pytest.mark.parametrize("has_convolutions", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_loop_written_by_hand(begin, name, has_convolutions):
    if has_convolutions and name not in ("monge_m_sharpness", "monge_period_5"):
        return
    method = METHODS[name](problem(has_convolutions))
    cycles = 1 if name == "monge_period_5" else 3
    carry, loss = train(method, begin, cycles)
    params, last = train_by_hand(name, begin, cycles * method.descents)
    for leaf in params:
        np.testing.assert_allclose(carry.params[leaf], params[leaf], rtol=1e-5, atol=1e-6)
    if name == "optax_transparent":  # its last pass is the one at the perturbed params
        return
    part = slice(None, None, 4) if name == "monge_quarter_batch" else slice(None)
    expected, _ = loss_fn(last, begin.stats, rows(begin.batch, part))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "optax_transparent"])
def test_statistics_come_from_the_pass_at_the_params(begin, name):
    carry, _ = METHODS[name](problem()).cycle[0](
        first_carry(METHODS[name](problem()), begin), begin.batch
    )
    part = slice(None, None, 4) if name == "monge_quarter_batch" else slice(None)
    _, expected = loss_fn(begin.params, begin.stats, rows(begin.batch, part))
    np.testing.assert_allclose(carry.stats["mean"], expected["mean"], rtol=1e-6)


def test_gradients_of_convolutions_stay_out_of_loops_on_cpu(begin):
    for name, primitive in (("monge_m_sharpness", "scan"), ("monge_period_5", "cond")):
        for has_convolutions in (False, True):
            method = METHODS[name](problem(has_convolutions))
            carry = first_carry(method, begin)
            found = [
                f" {primitive}[" in str(jax.make_jaxpr(step)(carry, begin.batch))
                for step in set(method.cycle)
            ]
            assert any(found) == (not has_convolutions)


def test_on_an_accelerator_loops_are_fine_for_convolutions(begin, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert len(set(METHODS["monge_period_5"](problem(has_convolutions=True)).cycle)) == 1


def test_the_options_name_the_methods_and_the_models():
    assert get_args(benchmark.Method) == tuple(METHODS)
    assert get_args(benchmark.Model) == tuple(bench_report.MODELS)
    assert set(benchmark.REFERENCES) < set(METHODS)
    assert all(build.__doc__ for build in METHODS.values())


# --- the models ---


def abstract_start(preset, model):
    made = bench_report.MODELS[model](preset, None)
    return made, Start(*jax.eval_shape(made.init, jax.random.key(0)))


def equations(jaxpr):
    """All of them, also those of functions that are called."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)


@pytest.mark.parametrize("model", bench_report.MODELS)
def test_models_for_an_accelerator_compute_in_bfloat16_on_float32_params(model):
    made, begin = abstract_start("gpu", model)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((begin.params, begin.stats))} == {"float32"}
    assert 4e6 < sum(leaf.size for leaf in jax.tree.leaves(begin.params)) < 2e8
    program, (loss, *stats) = jax.make_jaxpr(made.loss_fn, return_shape=True)(*begin)
    products = [
        equation
        for equation in equations(program.jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert len(products) >= 5
    factors = [factor for product in products for factor in product.invars]
    assert {str(factor.aval.dtype) for factor in factors} == {"bfloat16"}
    assert (loss.shape, str(loss.dtype)) == ((), "float32")
    assert jax.tree.structure(*stats) == jax.tree.structure(begin.stats)


@pytest.mark.parametrize("model", bench_report.MODELS)
def test_every_method_takes_every_model_and_keeps_the_form_of_the_carry(model):
    made, begin = abstract_start("tiny", model)
    for name, build in METHODS.items():
        method = build(made)
        carry = Carry(begin.params, jax.eval_shape(method.init, begin.params), begin.stats)
        for step in set(method.cycle):
            after, loss = jax.eval_shape(step, carry, begin.batch)
            assert jax.tree.all(jax.tree.map(lambda a, b: a == b, after, carry)), name
            assert loss.shape == ()


def test_the_language_model_is_causal():
    model = bench_models.Transformer(width=8, layers=1, heads=2, vocabulary=5)
    tokens = np.arange(6)[None] % 5
    other = np.where(np.arange(6) == 3, 0, tokens)

    @jax.jit
    def logits_of(tokens, other):
        params = model.init(jax.random.key(0, impl="rbg"), tokens)
        return model.apply(params, tokens), model.apply(params, other)

    logits, changed = logits_of(tokens, other)
    moved = jnp.abs(logits - changed).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(moved, [False, False, False, True, True, True])


def test_the_residual_network_has_its_layers_and_statistics():
    _, begin = abstract_start("gpu", "resnet")
    kernels = [x for x in jax.tree.leaves(begin.params) if len(x.shape) == 4 and x.shape[0] == 3]
    assert len(kernels) + 1 == 2 * 3 * 3 + 2  # with the linear layer: ResNet-20
    assert max(x.shape[-1] for x in kernels) == 4 * 64
    averages = jax.tree.leaves(begin.stats)
    assert len(averages) == 2 * (len(kernels) + 2)  # two of the shortcuts change the shape


# --- measuring ---


def program_of(calls, descents):
    def step(name):
        def run(carry, batch):
            calls.append(name)
            return carry, jnp.zeros(())

        return run

    method = Method(init=lambda params: (), cycle=(step("a"), step("b")), descents=descents)
    return Program(method, method.cycle, 0.0, 0, 0, 0)


def test_time_is_that_of_a_descent_step_without_the_first_cycle(begin):
    calls, readings = [], iter([(2, 100.0), (8, 106.0)])

    def clock():
        expected, reading = next(readings)
        assert len(calls) == expected  # calls so far
        return reading

    result = measure(program_of(calls, descents=2), begin, cycles=3, clock=clock)
    assert result.seconds == 6.0 / (3 * 2)
    assert "".join(calls) == "ab" * 4


@pytest.mark.parametrize(("seconds", "cycles"), [(7.0, 3), (1.0, 1), (0.0, 1)])
def test_as_many_cycles_as_a_measurement_takes(begin, seconds, cycles):
    clock = itertools.count(0, 3)  # every reading is three seconds after the last
    program = program_of([], descents=2)
    assert cycles_for(program, begin, seconds, lambda: float(next(clock))) == cycles


def test_rounds_are_shuffled_by_the_seed():
    names = ["a", "b", "c", "d", "e"]

    def order(seed):
        seen = []
        interleave(
            names, 4, np.random.default_rng(seed), lambda name: float(seen.append(name) or 0)
        )
        return [seen[i : i + 5] for i in range(0, 20, 5)]

    assert all(sorted(each) == names for each in order(0))
    assert len(set(map(tuple, order(0)))) > 1
    assert order(0) == order(0) != order(1)


def test_a_compiled_method_takes_over_the_carry_and_compiles_once():
    made = bench_models.mlp("tiny")
    begin = start(made, 0)
    program = compile_method(made, "monge_sam", begin, lambda: 0.0)
    carry = first_carry(program.method, begin)
    program.cycle[0](carry, begin.batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((carry.params, carry.opt_state[1])))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(begin))
    measure(program, begin, 3, lambda: 0.0)
    assert program.cycle[0]._cache_size() == 1


def test_the_compilation_cache_is_off_and_on_again():
    assert jax.config.jax_enable_compilation_cache

    @without_compilation_cache()
    def fail():
        assert not jax.config.jax_enable_compilation_cache
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert jax.config.jax_enable_compilation_cache


# --- the command ---

ROUNDS = 3


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def bench(output, *options):
    """The content of results.json and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        main(["bench", "--preset", "tiny", "--output", str(output), *options])
    text = (output / "results.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse), printed.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench") / "new"


@pytest.fixture(scope="module")
def all_methods(folder):
    counts = ("--rounds", str(ROUNDS), "--compilations", "1")
    return bench(folder, "--models", "mlp", *counts, "--seed", "3")


@pytest.fixture(scope="module")
def other_models(tmp_path_factory):
    models, methods = ("--models", "transformer", "mlp"), ("--methods", "plain")
    counts = ("--rounds", "2", "--compilations", "1", "--batch-size", "12")
    return bench(tmp_path_factory.mktemp("others"), *models, *methods, *counts)


def test_all_methods_are_in_the_results(all_methods, folder):
    results, printed = all_methods
    assert {path.name for path in folder.iterdir()} == {"results.json", "benchmark.png"}
    assert list(results["models"]) == ["mlp"]
    assert list(results["models"]["mlp"]["methods"]) == list(METHODS)
    for name, entry in results["models"]["mlp"]["methods"].items():
        assert name in printed
        assert entry["seconds"]["median"] > 0
        assert np.isfinite(entry["loss"])
        assert entry["temporary_bytes"] > 0
        assert entry["what"] == METHODS[name].__doc__.splitlines()[0]
    assert "Wrote results.json and benchmark.png" in printed
    assert "442 params" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


def test_what_was_run_and_where_is_recorded(all_methods):
    results, _ = all_methods
    configuration = results["configuration"]
    assert (configuration["preset"], configuration["clock"]) == ("tiny", "cpu")
    numbers = [configuration[name] for name in ("rounds", "compilations", "seed")]
    assert numbers == [ROUNDS, 1, 3]
    assert configuration["models"] == ["mlp"]
    assert results["versions"]["jax"] == jax.__version__
    assert results["device"]["platform"] == "cpu"
    assert results["machine"]["cores"] >= 1


def test_summaries_are_those_of_the_rounds(all_methods):
    methods = all_methods[0]["models"]["mlp"]["methods"]
    plain, two, plain_compiling = (
        np.array(methods[name]["rounds"][quantity])
        for name, quantity in (
            ("plain", "seconds"),
            ("two_gradients", "seconds"),
            ("plain", "compile_seconds"),
        )
    )
    for entry in methods.values():
        seconds = np.array(entry["rounds"]["seconds"])
        compiling = np.array(entry["rounds"]["compile_seconds"])
        assert (len(seconds), len(compiling)) == (ROUNDS, 1)
        for quantity, values in {
            "seconds": seconds,
            "ratio_to_plain": seconds / plain,
            "ratio_to_two_gradients": seconds / two,
            "compile_seconds": compiling,
            "compile_ratio_to_plain": compiling / plain_compiling,
        }.items():
            summary = [entry[quantity][name] for name in ("lower", "median", "upper")]
            np.testing.assert_allclose(summary, np.percentile(values, [25, 50, 75]), rtol=1e-12)


def test_the_loss_is_that_of_steps_from_the_seed(all_methods):
    entry = all_methods[0]["models"]["mlp"]["methods"]["plain"]
    made = bench_models.mlp("tiny")
    begin = start(made, 3)
    method = METHODS["plain"](made)
    carry, step = first_carry(method, begin), jax.jit(method.cycle[0])
    losses = []
    for _ in range(1 + entry["descents_per_measurement"]):
        carry, loss = step(carry, begin.batch)
        losses.append(float(loss))
    np.testing.assert_allclose(entry["loss"], losses[-1], rtol=1e-4)
    assert losses[-1] < losses[0]


def test_state_is_counted_in_params(all_methods):
    """Momentum is one copy of them; Optax's transparent SAM and one_pass_gradient keep another."""
    results = all_methods[0]["models"]["mlp"]
    copies = dict.fromkeys(METHODS, 1) | {"optax_transparent": 2, "one_pass_gradient": 2}
    assert results["params_bytes"] == 4 * results["parameters"]
    for name, entry in results["methods"].items():
        beside = entry["state_bytes"] - copies[name] * results["params_bytes"]
        assert 0 <= beside <= 32, name  # a count, and some scalars
        assert entry["state"] == entry["state_bytes"] / results["params_bytes"]


def test_instructions_are_those_of_the_compiled_steps(all_methods):
    methods = all_methods[0]["models"]["mlp"]["methods"]
    count = {name: entry["instructions"] for name, entry in methods.items()}
    assert 100 < count["plain"] < count["two_gradients"] < count["monge_by_hand"]
    assert count["monge_by_hand"] < count["monge_sam"] < count["adaptive_sam"]
    assert count["monge_last_layer"] < count["monge_sam"]
    assert count["one_pass_gradient"] < count["monge_sam"]


def test_models_come_in_the_order_given_and_references_beside_what_is_asked_for(other_models):
    results, printed = other_models
    assert list(results["models"]) == ["transformer", "mlp"]
    assert printed.index("Transformer") < printed.index("MLP")
    assert printed.count("batch 12 x ") == 2
    for entry in results["models"].values():
        assert list(entry["methods"]) == ["plain", "two_gradients"]
    state = [entry["methods"]["plain"]["state"] for entry in results["models"].values()]
    np.testing.assert_allclose(state, [2, 1], atol=0.01)  # AdamW, SGD with momentum


def test_the_chart_shows_medians_and_quartiles():
    ratios = [(1.0, 1.0, 1.0), (1.7, 1.9, 1.95), (1.6, 1.8, 2.4)]
    names = [*benchmark.REFERENCES, "sam"]
    summaries = [dict(zip(("lower", "median", "upper"), ratio, strict=True)) for ratio in ratios]
    methods = {
        name: {"ratio_to_plain": summary} for name, summary in zip(names, summaries, strict=True)
    }
    models = {"mlp": {"methods": methods}, "resnet": {"methods": methods}}
    figure = benchmark_figure({"models": models})
    assert [axes.get_title() for axes in figure.axes] == list(models)
    for axes in figure.axes:
        for place, (bar, ratio) in enumerate(zip(axes.containers, ratios, strict=True)):
            point, _, (line,) = bar.lines
            assert (*point.get_xdata(), *point.get_ydata()) == (ratio[1], place)
            (ends,) = line.get_segments()
            np.testing.assert_allclose(ends[:, 0], [ratio[0], ratio[2]], rtol=1e-6)
        marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
        assert marks == [1.0, 1.9]


def test_the_chart_is_a_picture(all_methods, folder):
    height, width, _ = matplotlib.image.imread(folder / "benchmark.png").shape
    assert width == 1400
    assert 600 < height < 1000
    assert 20_000 < (folder / "benchmark.png").stat().st_size < 500_000


def test_the_chart_names_the_methods_and_their_kinds(all_methods):
    figure = benchmark_figure(all_methods[0])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(METHODS)
    (legend,) = figure.legends
    kinds = [text.get_text() for text in legend.get_texts()]
    assert kinds == ["references", "by hand", "optax.contrib.sam", "monge_sam_jax"]


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models",), "--models needs at least one name"),
        (("--methods",), "--methods needs at least one name"),
        (("--models", "mlp", "mlp"), "--models has a name twice: mlp mlp"),
        (("--methods", "sam", "sam"), "--methods has a name twice: sam sam"),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--compilations", "-1"), "--compilations must be at least 1, got -1"),
        (
            ("--batch-size", "6"),
            "--batch-size must be a positive multiple of 4, the number of micro-batches, got 6",
        ),
        (("--seed", "-1"), "--seed must be from 0 to 2147483647, got -1"),
        (("--seed", "2147483648"), "--seed must be from 0 to 2147483647, got 2147483648"),
        (("--preset", "gpu"), "--preset gpu needs an accelerator, and JAX has found none"),
    ],
)
def test_options_that_cannot_be_used(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--output", str(tmp_path), *options])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == f"monge-sam: error: {message}\n"
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--output", str(tmp_path / "file")])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("monge-sam: error: --output")


def test_a_method_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--methods", "adam"])
    assert exit_.value.code == 2
    assert "monge_sam" in capsys.readouterr().err


def test_the_clock_depends_on_the_device(monkeypatch):
    options = benchmark.Bench()
    choices = {name: dataclasses.replace(options, clock=name) for name in ("auto", "cpu", "wall")}
    chosen = {name: bench_report.choose_clock(each) for name, each in choices.items()}
    assert chosen == {"auto": "cpu", "cpu": "cpu", "wall": "wall"}
    monkeypatch.setattr(bench_report, "jax", SimpleNamespace(default_backend=lambda: "gpu"))
    assert bench_report.choose_clock(choices["auto"]) == "wall"
    assert bench_report.choose_clock(dataclasses.replace(options, preset="gpu")) == "wall"
    with pytest.raises(InputError, match="--clock cpu does not see the work of the gpu"):
        bench_report.choose_clock(choices["cpu"])


def test_the_options_are_light_to_import():
    script = (
        "import sys, monge_sam_jax.experiments.benchmark\n"
        "heavy = {'flax', 'matplotlib', 'rich', 'sklearn', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
