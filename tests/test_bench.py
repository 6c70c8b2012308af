"""The command `monge-sam bench`: what its methods compute, how it measures, and what it writes."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
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
from looks import check_column

from monge_sam_jax.__main__ import main
from monge_sam_jax.experiments.bench import compile as bench_compile
from monge_sam_jax.experiments.bench import measure as bench_measure
from monge_sam_jax.experiments.bench import models as bench_models
from monge_sam_jax.experiments.bench import options as benchmark
from monge_sam_jax.experiments.bench import run as bench_report
from monge_sam_jax.experiments.bench import targets as bench_targets
from monge_sam_jax.experiments.bench.counts import Counts, count
from monge_sam_jax.experiments.bench.measure import (
    Program,
    Start,
    compile_method,
    cycles_for,
    first_carry,
    interleave,
    measure,
    peak_bytes,
    start,
    without_compilation_cache,
)
from monge_sam_jax.experiments.bench.plots import benchmark_figure
from monge_sam_jax.experiments.bench.steps import METHODS, RHO, Carry, Method
from monge_sam_jax.experiments.common import progress
from monge_sam_jax.experiments.common.data import Batch
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.placement import AXIS, Placement
from monge_sam_jax.experiments.common.plots import COLOURS

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


def every(period, first=0):
    """The gradient at Monge's step at every so many steps, the ordinary one in between."""

    def robust(params, batch, step):
        g = gradient(params, batch)
        return gradient(monge_step(params, g), batch) if step % period == first else g

    return robust


LITERAL = {
    "plain": at_perturbed(lambda params, g: params),
    "two_gradients": at_perturbed(lambda params, g: add(params, RHO, g)),
    "sam_by_hand": at_perturbed(sam_step),
    "monge_by_hand": at_perturbed(monge_step),
    "adaptive_by_hand": at_perturbed(adaptive_step),
    "fisher_by_hand": at_perturbed(fisher_step),
    "optax_opaque": at_perturbed(sam_step),
    "optax_transparent": at_perturbed(sam_step),
    "sam": at_perturbed(sam_step),
    "monge_sam": at_perturbed(monge_step),
    "adaptive_sam": at_perturbed(adaptive_step),
    "fisher_sam": at_perturbed(fisher_step),
    "monge_m_sharpness": of_microbatches,
    "monge_period_5": every(5),
    "monge_late": every(10, first=9),
    "monge_last_layer": at_perturbed(last_layer_step),
    "monge_quarter_batch": at_perturbed(monge_step, first=slice(None, None, 4)),
}


def descend(params, trace, g):
    trace = add(g, DECAY, trace)
    return add(params, -RATE, trace), trace


def train_by_hand(name, begin, descents):
    """Params after so many steps, and where the last pass for the loss and the statistics was."""
    params, trace = begin.params, jax.tree.map(jnp.zeros_like, begin.params)
    if name in LITERAL:
        for step in range(descents):
            last = params
            params, trace = descend(params, trace, LITERAL[name](params, begin.batch, step))
        return params, last
    perturbed = params
    for _ in range(descents):
        last = perturbed
        g = gradient(perturbed, begin.batch)
        params, trace = descend(params, trace, g)
        perturbed = monge_step(params, trace if name == "one_pass_momentum" else g)
    return perturbed, last


IN_LOOPS = {"monge_m_sharpness": "scan", "monge_period_5": "cond", "monge_late": "cond"}


def train(method, begin, cycles):
    carry = first_carry(method, begin)
    for step in method.cycle * cycles:
        carry, loss = step(carry, begin.batch)
    return carry, loss


@pytest.mark.parametrize("has_convolutions", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_loop_written_by_hand(begin, name, has_convolutions):
    if has_convolutions and name not in IN_LOOPS:
        return
    method = METHODS[name](problem(has_convolutions))
    cycles = 1 if method.descents > 1 else 3
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
    for name, primitive in IN_LOOPS.items():
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
    assert get_args(benchmark.Model) == tuple(bench_models.MODELS)
    assert {*benchmark.REFERENCES, *benchmark.FEW} < set(METHODS)
    assert {*benchmark.BY_HAND, *benchmark.BY_HAND.values()} < set(METHODS)
    assert all(build.__doc__ for build in METHODS.values())


# --- the models ---


def abstract_start(preset, model):
    made = bench_models.MODELS[model](preset, None)
    return made, Start(*jax.eval_shape(made.init, jax.random.key(0)))


def equations(jaxpr):
    """All of them, also those of functions that are called."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)


@pytest.mark.parametrize("model", bench_models.MODELS)
def test_models_for_an_accelerator_compute_in_bfloat16_on_float32_params(model):
    made, begin = abstract_start("gpu", model)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((begin.params, begin.stats))} == {"float32"}
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


@pytest.mark.parametrize(
    "model",
    [
        name if name == "mlp" else pytest.param(name, marks=pytest.mark.slow)
        for name in bench_models.MODELS
    ],
)
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
    assert len(kernels) + 1 == 2 * 4 * 2 + 2  # with the linear layer: ResNet-18
    assert max(x.shape[-1] for x in kernels) == 8 * 64
    averages = jax.tree.leaves(begin.stats)
    assert len(averages) == 2 * (len(kernels) + 3)  # three of the shortcuts change the shape


GPT2_SMALL = 124_439_808  # as published, with a tied head


@pytest.mark.parametrize(
    ("model", "parameters", "leaves", "batch"),
    [
        ("mlp", 3073 * 4096 + 3 * 4097 * 4096 + 4097 * 10, 10, (4096, 3072)),
        ("deep_mlp", 150 * 129 * 128 + 129 * 10, 302, (64, 128)),
        ("resnet", 11_173_962, 62, (128, 32, 32, 3)),
        # The head is not tied, and queries, keys and values have no biases.
        ("transformer", GPT2_SMALL + 50257 * 768 - 12 * 3 * 768, 137, (8, 1024)),
    ],
)
def test_models_for_an_accelerator_are_of_the_sizes_that_people_train(
    model, parameters, leaves, batch
):
    _, begin = abstract_start("gpu", model)
    found = jax.tree.leaves(begin.params)
    assert (sum(leaf.size for leaf in found), len(found)) == (parameters, leaves)
    assert begin.batch.x.shape == batch


@pytest.mark.parametrize(("preset", "leaves"), [("tiny", 30), ("small", 302)])
def test_the_deep_model_is_deep_in_all_presets(preset, leaves):
    _, begin = abstract_start(preset, "deep_mlp")
    assert len(jax.tree.leaves(begin.params)) == leaves


def test_activations_keep_their_size_through_many_layers():
    x = jax.random.normal(jax.random.key(0), (8, 32))
    logits, _ = bench_models.MLP(32, 100, classes=10).init_with_output(jax.random.key(1), x)
    assert 1e-2 < float(jnp.std(logits)) < 1e2  # half the variance lost in each: 1e-15


# --- measuring ---


def program_of(calls, descents):
    def step(name):
        def run(carry, batch):
            calls.append(name)
            return carry, jnp.zeros(())

        return run

    method = Method(init=lambda params: (), cycle=(step("a"), step("b")), descents=descents)
    return Program(method, method.cycle, 0.0, Counts(), 0, 0)


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


class Device:
    """Tells of its memory as an accelerator does: before, with the carry, and after a run."""

    resident, carry = 300, 50

    def __init__(self, mark, run_takes, fillings):
        self.mark, self.run_takes, self.fillings, self.calls = mark, run_takes, fillings, 0

    def memory_stats(self):
        self.calls += 1
        in_use = self.resident + (self.carry if self.calls > 1 else 0)
        if self.calls == 3:
            self.mark = max(self.mark, in_use + sum(self.fillings) + self.run_takes)
        return {"peak_bytes_in_use": self.mark, "bytes_in_use": in_use}


@pytest.mark.parametrize(
    ("mark", "takes", "told"),
    [
        (500, 1000, True),  # above all that was before
        (9000, 1000, True),  # below it
        (9000, 1300, True),  # more than the analysis of the program says
        (9000, 985, True),
        (9000, 900, False),  # so much less that the mark stands
    ],
)
def test_the_peak_of_a_program_is_told_from_those_before(begin, monkeypatch, mark, takes, told):
    fillings = []
    fill = bench_measure._fill
    monkeypatch.setattr(bench_measure, "_fill", lambda size: fillings.append(size) or fill(size))
    program = program_of([], descents=1)._replace(temporary_bytes=1000)
    peak = peak_bytes(program, begin, Device(mark, takes, fillings))
    assert peak == (Device.carry + takes if told else None)


def test_a_device_that_does_not_tell_has_no_peak(begin):
    calls = []
    silent = SimpleNamespace(memory_stats=lambda: None)
    assert peak_bytes(program_of(calls, descents=1), begin, silent) is None
    assert not calls


# --- counting ---

PROGRAM = """\
HloModule jit_step, entry_computation_layout={(f32[64]{0})->f32[64]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%begin (x: bf16[64,512]) -> bf16[512,512] {
  %x = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %g = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=6, a={chain_id="0"}
}

%end (x.1: bf16[64,512]) -> bf16[512,512] {
  %x.1 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %g.1 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%x.1), channel_id=6, a={chain_id="0"}
}

%all-reduce-scatter.7 (y: f32[784,512]) -> f32[98,512] {
  %y = f32[784,512]{1,0:T(8,128)} parameter(0)
  %r = f32[784,512]{1,0:T(8,128)} all-reduce(%y), channel_id=1, to_apply=%add
  ROOT %s = f32[98,512]{1,0:T(8,128)} dynamic-slice(%r, %i, %j), dynamic_slice_sizes={98,512}
}

ENTRY %main (p: bf16[64,512]) -> f32[64] {
  %p = bf16[64,512]{1,0} parameter(0), metadata={op_name="jit(step)/all-reduce(x)"}
  %u = bf16[512,512]{1,0} fusion(%p), kind=kCustom, calls=%begin
  %v = bf16[512,512]{1,0} fusion(%p), kind=kCustom, calls=%end
  %w = f32[98,512]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.7
  %k = (bf16[8,8]{1,0}, s32[]) custom-call(%v), custom_call_target="__cublas$gemm"
  %norms = (f32[]{:T(128)}, /*index=1*/f32[]{:T(128)}) all-reduce(%m, %n), channel_id=1
  %packed = f32[8]{0} all-reduce-start(%c), channel_id=9, to_apply=%add
  %unpacked = f32[8]{0} all-reduce-done(%packed)
  %h = ((f32[98,8]{1,0}), (f32[784,8]{1,0})) all-gather-start(%p), channel_id=7
  %t = f32[784,8]{1,0} all-gather-done(%h)
  %e = f32[64]{0} collective-permute(%d), channel_id=3
  ROOT %o = f32[64]{0} copy(%e)
}
"""


def test_kernels_and_collectives_are_counted_once():
    found = count(PROGRAM)
    assert found == Counts(
        kernels=4,
        instructions=22,
        all_reduces=2,  # of the norms, and of the packed scalars
        all_gathers=2,  # one of which is written out twice
        reduce_scatters=1,  # a TPU's
        other_collectives=1,
        large_collectives=3,
    )
    assert found.plus(found) == Counts(*(2 * value for value in found))


# --- compiling for what is not there ---


def slice_of(devices=8):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), (AXIS,))


@pytest.mark.parametrize("name", ["plain", "monge_sam", "one_pass_by_hand", "one_pass_gradient"])
def test_collectives_are_those_of_the_shardings(name):
    counts = {}
    for sharding in ("one", "data", "fsdp"):
        mesh = slice_of(1 if sharding == "one" else 8)
        placement = Placement(mesh, fully_sharded=sharding == "fsdp")
        made = bench_compile.per_device("mlp", "tiny", 4, mesh.size)
        begin = bench_compile.abstract_start(made, placement)
        assert begin.batch.x.shape == (4 * mesh.size, 16)
        kernel = begin.params["head"]["kernel"]
        assert kernel.sharding.shard_shape((16, 10)) == (
            (2, 10) if sharding == "fsdp" else (16, 10)
        )
        program = bench_compile.compile_for(made, name, begin, placement, lambda: 0.0)
        counts[sharding] = program.counts
    assert not any(counts["one"][2:])
    assert counts["data"].all_reduces > 0
    assert counts["data"].all_gathers == 0
    assert counts["fsdp"].all_gathers > 0


def test_a_method_compiled_elsewhere_leaves_the_carry_where_it_was():
    """Params, and the momenta and copies that mirror them; it takes over the memory of all."""
    placement = Placement(slice_of(), fully_sharded=True)
    made = bench_compile.per_device("mlp", "tiny", None, 8)
    begin = bench_compile.abstract_start(made, placement)
    program = bench_compile.compile_for(made, "one_pass_by_hand", begin, placement, lambda: 0.0)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), begin.params)
    carry = first_carry(program.method, Start(params, {}, None))
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), begin.batch)
    after, _ = program.cycle[0](carry, batch)
    assert program.cycle[0]._cache_size() == 1
    places = jax.tree.map(lambda x: x.sharding, (after.params, after.opt_state[0]))
    expected = jax.tree.map(lambda x: x.sharding, (begin.params, begin.params))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.spec == b.spec, places, expected))
    assert not after.params["head"]["kernel"].sharding.is_fully_replicated


def test_the_batch_of_a_device_is_the_preset_s_unless_one_is_given():
    for given, samples in ((None, 3 * 8), (12, 3 * 12)):
        made = bench_compile.per_device("mlp", "tiny", given, 3)
        assert jax.eval_shape(made.init, jax.random.key(0))[2].x.shape == (samples, 16)
    assert not bench_compile.per_device("resnet", "tiny", None, 8).has_convolutions


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    options = ("--models", "mlp", "--methods", "one_pass_gradient")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_compile, "mesh_of", lambda target: slice_of(int(target)))
        return bench(
            tmp_path_factory.mktemp("compiled"), *options, "--compile-for", "8", file="counts.json"
        )


def test_counts_for_a_target_are_written_and_printed(compiled):
    results, printed, progress = compiled
    found = [(entry["model"], entry["sharding"]) for entry in results["programs"]]
    assert found == [("mlp", "data"), ("mlp", "fsdp")]
    assert results["target"] == {"kind": "cpu", "platform": "cpu", "count": 8}
    for entry in results["programs"]:
        methods = entry["methods"]
        assert list(methods) == ["plain", "two_gradients", "one_pass_by_hand", "one_pass_gradient"]
        assert methods["two_gradients"]["all_reduces"] >= methods["plain"]["all_reduces"] > 0
        assert methods["plain"]["compile_ratio_to_plain"]["median"] == 1
        for name, method in methods.items():
            cells = (name, method["kernels"], method["instructions"], method["all_reduces"])
            assert re.search(r"\s+".join(map(str, cells)), printed)
    assert " ".join(printed.split()).count("compiled for 8 x cpu, fsdp") == 1
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert len(progress) == 2 * 4
    assert progress[-1].startswith("mlp, fsdp (2 of 2): ")
    assert progress[-1].endswith(" kernels, 0 left to compile")


def test_what_does_not_fit_the_target_is_a_row_without_counts(monkeypatch, tmp_path):
    compile_for = bench_compile.compile_for

    def too_large(problem, name, *rest, **options):
        if name == "two_gradients":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GiB of 16 GiB")
        return compile_for(problem, name, *rest, **options)

    monkeypatch.setattr(bench_compile, "compile_for", too_large)
    monkeypatch.setattr(bench_compile, "mesh_of", lambda target: slice_of(1))
    options = ("--models", "mlp", "--methods", "plain", "--compile-for", "h100")
    results, printed, progress = bench(tmp_path, *options, file="counts.json")
    (entry,) = results["programs"]
    assert entry["methods"]["two_gradients"] is None
    assert entry["methods"]["plain"]["kernels"] > 0
    assert entry["sharding"] is None
    assert re.search("two_gradients +no room", printed)
    assert any("two_gradients is too large" in line for line in progress)


def test_little_effort_is_an_option_of_the_compiler(monkeypatch, tmp_path):
    seen, compile_steps = [], bench_compile.compile_steps

    def spy(*args, compiler_options=None, **options):  # that of this machine may not know it
        seen.append(compiler_options)
        return compile_steps(*args, **options)

    monkeypatch.setattr(bench_compile, "compile_steps", spy)
    monkeypatch.setattr(bench_compile, "mesh_of", lambda target: slice_of(1))
    options = ("--models", "mlp", "--methods", "plain", "--compile-for", "h100")
    bench(tmp_path, *options, "--effort", "little", file="counts.json")
    assert seen == [None, *2 * [{"exec_time_optimization_effort": -1.0}]]


def test_little_effort_that_a_compiler_does_not_know(monkeypatch, tmp_path, capsys):
    """The error says to leave it out, and so it works."""
    monkeypatch.setitem(bench_compile.EFFORT, "little", {"xla_no_such_option": -1.0})
    monkeypatch.setattr(bench_compile, "mesh_of", lambda target: slice_of(1))
    options = ("--models", "mlp", "--methods", "plain", "--compile-for", "h100")
    command = ["bench", "--preset", "tiny", "--output", str(tmp_path), *options]
    with pytest.raises(SystemExit):
        main([*command, "--effort", "little"])
    assert "--effort little is not known" in capsys.readouterr().err
    bench(tmp_path, *options, file="counts.json")


@pytest.mark.parametrize(("target", "extra"), [("h100", "cuda"), ("v5e:2x4", "tpu")])
def test_the_extra_that_a_target_needs_is_named(target, extra, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_targets, "_is_installed", lambda module: False)
    with pytest.raises(SystemExit):
        main(["bench", "--compile-for", target, "--output", str(tmp_path)])
    assert capsys.readouterr().err == (
        "monge-sam: error: --compile-for needs JAX's compiler for it (no driver and no device): "
        f"pip install 'monge_sam_jax[cli,{extra}]', "
        f"or in a clone: pip install -e '.[cli,{extra}]'\n"
    )


@pytest.mark.parametrize(
    ("target", "platform", "topology"),
    [("h100", "cuda", "1x1x1"), ("h100:8", "cuda", "1x1x8"), ("v6e:4x4", "tpu", "v6e:4x4")],
)
def test_targets_are_asked_for_in_jax_s_words(target, platform, topology, monkeypatch):
    asked, environment = {}, {"TPU_WORKER_HOSTNAMES": "mine"}

    def describe(**arguments):
        asked.update(arguments)
        return SimpleNamespace(devices=jax.devices()[:2])

    monkeypatch.setattr(bench_targets, "_is_installed", lambda module: True)
    monkeypatch.setattr(bench_targets, "os", SimpleNamespace(environ=environment))
    monkeypatch.setattr(bench_targets.topologies, "get_topology_desc", describe)
    monkeypatch.setattr(
        bench_targets.jax.config, "update", lambda *setting: asked.update([setting])
    )
    assert bench_targets.mesh_of(target).shape == {AXIS: 2}
    assert (asked["platform"], asked["jax_platforms"]) == (platform, "cpu")
    assert topology in (asked.get("topology"), asked.get("topology_name"))
    assert environment["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert environment["TPU_WORKER_HOSTNAMES"] == "mine"  # what the user has set stays


def test_a_target_that_the_compiler_refuses_is_an_error_of_the_option(monkeypatch):
    def refuse(**_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: not divisible")

    monkeypatch.setattr(bench_targets, "_is_installed", lambda module: True)
    monkeypatch.setattr(bench_targets, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(bench_targets.topologies, "get_topology_desc", refuse)
    with pytest.raises(InputError, match=r"--compile-for v5e:3x3: INVALID_ARGUMENT: not divisible"):
        bench_targets.mesh_of("v5e:3x3")


@pytest.mark.parametrize(("target", "kind"), [("h100", "H100"), ("v5e:2x2", "v5")])
def test_the_command_compiles_for_what_is_not_there(target, kind, tmp_path):
    module = {"h100": "jax_plugins.xla_cuda12", "v5e:2x2": "libtpu"}[target]
    if not bench_targets._is_installed(module):
        pytest.skip(f"{module} is not installed")
    options = ["--preset", "tiny", "--models", "mlp", "--methods", "plain", "--sharding", "data"]
    command = [sys.executable, "-m", "monge_sam_jax", "bench", "--compile-for", target, *options]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([*command, "--output", str(tmp_path)], check=True, env=environment)
    results = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))
    assert kind in results["target"]["kind"]
    assert results["programs"][0]["methods"]["plain"]["kernels"] > 5


# --- the command ---

ROUNDS = 3


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def bench(output, *options, file="results.json"):
    """The content of results.json, what was printed, and the lines of progress."""
    printed, progress = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
        main(["bench", "--preset", "tiny", "--output", str(output), *options])
    results = json.loads((output / file).read_text(encoding="utf-8"), parse_constant=refuse)
    return results, printed.getvalue(), progress.getvalue().splitlines()


def by_method(results):
    """Of the only model."""
    (entry,) = results["measurements"]
    return entry["methods"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench") / "new"


@pytest.fixture(scope="module")
def all_methods(folder):
    options = ("--models", "mlp", "--methods", *METHODS, "--rounds", str(ROUNDS), "--seed", "3")
    return bench(folder, *options)


@pytest.fixture(scope="module")
def other_models(tmp_path_factory):
    models, methods = ("--models", "transformer", "mlp"), ("--methods", "plain")
    counts = ("--rounds", "2", "--batch-size", "12", "4")
    return bench(tmp_path_factory.mktemp("others"), *models, *methods, *counts)


def test_all_methods_are_in_the_results(all_methods, folder):
    results, printed, _ = all_methods
    assert {path.name for path in folder.iterdir()} == {"results.json", "benchmark.png"}
    assert [entry["model"] for entry in results["measurements"]] == ["mlp"]
    assert list(by_method(results)) == list(METHODS)
    for name, entry in by_method(results).items():
        rows = re.findall(rf"^ {name} +\d", printed, re.MULTILINE)
        assert len(rows) == 2  # of times, and of programs
        assert entry["seconds"]["median"] > 0
        assert np.isfinite(entry["loss"])
        assert entry["temporary_bytes"] > 0
        assert entry["what"] == METHODS[name].__doc__.splitlines()[0]
    assert "Wrote results.json and benchmark.png" in printed
    assert "442 params" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


def test_what_was_run_and_where_is_recorded(all_methods):
    results = all_methods[0]
    configuration = results["configuration"]
    assert (configuration["preset"], configuration["clock"]) == ("tiny", "cpu")
    numbers = [configuration[name] for name in ("rounds", "compilations", "seed")]
    assert numbers == [ROUNDS, 1, 3]
    assert configuration["models"] == ["mlp"]
    assert results["versions"]["jax"] == jax.__version__
    assert results["device"]["platform"] == "cpu"
    assert results["machine"]["cores"] >= 1


HAND_WRITTEN = {
    "optax_opaque": "sam_by_hand",
    "optax_transparent": "sam_by_hand",
    "sam": "sam_by_hand",
    "monge_sam": "monge_by_hand",
    "adaptive_sam": "adaptive_by_hand",
    "fisher_sam": "fisher_by_hand",
    "one_pass_gradient": "one_pass_by_hand",
    "one_pass_momentum": "one_pass_by_hand",
}


def test_summaries_are_those_of_the_rounds(all_methods):
    methods = by_method(all_methods[0])
    seconds, compiling = (
        {name: np.array(entry["rounds"][quantity]) for name, entry in methods.items()}
        for quantity in ("seconds", "compile_seconds")
    )
    for name, entry in methods.items():
        assert (len(seconds[name]), len(compiling[name])) == (ROUNDS, 1)
        expected = {
            "seconds": seconds[name],
            "ratio_to_plain": seconds[name] / seconds["plain"],
            "ratio_to_two_gradients": seconds[name] / seconds["two_gradients"],
            "compile_seconds": compiling[name],
            "compile_ratio_to_plain": compiling[name] / compiling["plain"],
        }
        if hand := HAND_WRITTEN.get(name):
            expected["ratio_to_by_hand"] = seconds[name] / seconds[hand]
            expected["compile_ratio_to_by_hand"] = compiling[name] / compiling[hand]
        assert entry["by_hand"] == hand
        assert (entry["ratio_to_by_hand"] is None) == (hand is None)
        for quantity, values in expected.items():
            summary = [entry[quantity][name] for name in ("lower", "median", "upper")]
            np.testing.assert_allclose(summary, np.percentile(values, [25, 50, 75]), rtol=1e-12)


def test_the_loss_is_that_of_steps_from_the_seed(all_methods):
    entry = by_method(all_methods[0])["plain"]
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
    """Momentum is one copy of them; Optax's transparent SAM and one pass keep another."""
    (results,) = all_methods[0]["measurements"]
    two = ("optax_transparent", "one_pass_gradient", "one_pass_by_hand")
    copies = dict.fromkeys(METHODS, 1) | dict.fromkeys(two, 2)
    assert results["params_bytes"] == 4 * results["parameters"]
    for name, entry in results["methods"].items():
        beside = entry["state_bytes"] - copies[name] * results["params_bytes"]
        assert 0 <= beside <= 32, name  # a count, and some scalars
        assert entry["state"] == entry["state_bytes"] / results["params_bytes"]


def test_instructions_are_those_of_the_compiled_steps(all_methods):
    methods = by_method(all_methods[0])
    count = {name: entry["instructions"] for name, entry in methods.items()}
    assert 100 < count["plain"] < count["two_gradients"] < count["monge_by_hand"]
    assert count["monge_by_hand"] < count["monge_sam"] < count["adaptive_sam"]
    assert count["monge_last_layer"] < count["monge_sam"]
    assert count["one_pass_gradient"] < count["monge_sam"]


def test_kernels_are_those_of_the_compiled_steps(all_methods):
    methods = by_method(all_methods[0])
    kernels = {name: entry["kernels"] for name, entry in methods.items()}
    assert 0 < kernels["plain"] < kernels["one_pass_by_hand"] < kernels["two_gradients"]
    assert all(4 * kernels[name] < entry["instructions"] for name, entry in methods.items())
    made = bench_models.mlp("tiny")
    begin = start(made, 0)
    method = METHODS["monge_sam"](made)
    jitted = jax.jit(method.cycle[0], donate_argnums=0)
    text = jitted.lower(first_carry(method, begin), begin.batch).compile().as_text()
    assert kernels["monge_sam"] == text.count(" fusion(") + text.count(" custom-call(")
    # The lines of computations that end in one, less the lines that say where from.
    assert methods["monge_sam"]["instructions"] == len(
        re.findall(r"^ +\S.* = ", text, re.MULTILINE)
    )


def test_models_and_batches_come_in_the_order_given_with_references(other_models):
    results, printed, _ = other_models
    entries = results["measurements"]
    found = [(entry["model"], entry["batch_size"]) for entry in entries]
    assert found == [("transformer", 12), ("transformer", 4), ("mlp", 12), ("mlp", 4)]
    titles = ["Transformer of", "batch 12 x 8", "Transformer of", "batch 4 x 8"]
    titles += ["MLP of", "batch 12 x 16", "MLP of", "batch 4 x 16"]
    assert re.findall("Transformer of|MLP of|batch \\d+ x \\d+", printed) == titles
    for entry in entries:
        assert list(entry["methods"]) == ["plain", "two_gradients"]
    state = [entry["methods"]["plain"]["state"] for entry in entries]
    np.testing.assert_allclose(state, [2, 2, 1, 1], atol=0.01)  # AdamW, SGD with momentum


def test_lines_of_progress_say_what_is_left(other_models):
    lines = other_models[2]
    of_one = ["transformer, batch 4 (2 of 4)"]
    mine = [line for line in lines if line.startswith(of_one[0])]
    assert len(lines) == 4 * len(mine)
    compiled = [line.removeprefix(f"{of_one[0]}: ") for line in mine[:2]]
    assert {line.split()[0] for line in compiled} == {"plain", "two_gradients"}
    assert [line.split(", ")[1] for line in compiled] == ["1 left to compile", "0 left to compile"]
    assert mine[2:] == [f"{of_one[0]}: round {n} of 2 measured" for n in (1, 2)]


def test_on_a_terminal_there_is_a_bar_in_place_of_lines(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress.steps("mlp (1 of 2)", 3) as told:
        told.begin("compiling plain")
        told.end("plain compiled in 1 s, 2 left")
    err = capsys.readouterr().err
    assert "mlp (1 of 2): compiling plain" in err
    assert "1/3" in err
    assert "2 left" not in err


@pytest.mark.parametrize(
    ("options", "preset", "compilations", "methods"),
    [
        ({}, "small", 2, tuple(METHODS)),
        ({"preset": "gpu"}, "gpu", 1, tuple(METHODS)),
        ({"compile_for": "h100"}, "gpu", 1, tuple(METHODS)),
        ({"compile_for": "h100", "preset": "small", "compilations": 3}, "small", 3, tuple(METHODS)),
        (
            {"preset": "tiny"},
            "tiny",
            1,
            (
                *("plain", "two_gradients", "monge_by_hand", "one_pass_by_hand"),
                *("monge_sam", "one_pass_gradient"),
            ),
        ),
        (
            {"methods": ("fisher_sam", "monge_late")},
            "small",
            2,
            ("plain", "two_gradients", "fisher_by_hand", "fisher_sam", "monge_late"),
        ),
    ],
)
def test_defaults_that_depend_on_other_options(options, preset, compilations, methods):
    resolved = benchmark.Bench(**options).resolved()
    found = (resolved.preset, resolved.compilations, resolved.methods)
    assert found == (preset, compilations, methods)


def test_the_chart_shows_medians_and_quartiles():
    ratios = [(1.0, 1.0, 1.0), (1.7, 1.9, 1.95), (1.6, 1.8, 2.4)]
    names = [*benchmark.REFERENCES, "sam"]
    summaries = [dict(zip(("lower", "median", "upper"), ratio, strict=True)) for ratio in ratios]
    methods = {
        name: {"ratio_to_plain": summary} for name, summary in zip(names, summaries, strict=True)
    }
    models = ["mlp", "resnet"]
    entries = [{"model": model, "batch_size": 4, "methods": methods} for model in models]
    figure = benchmark_figure({"measurements": entries})
    assert [axes.get_title() for axes in figure.axes] == models
    for axes in figure.axes:
        for place, (bar, ratio) in enumerate(zip(axes.containers, ratios, strict=True)):
            point, _, (line,) = bar.lines
            assert (*point.get_xdata(), *point.get_ydata()) == (ratio[1], place)
            (ends,) = line.get_segments()
            np.testing.assert_allclose(ends[:, 0], [ratio[0], ratio[2]], rtol=1e-6)
        marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
        assert marks == [1.0, 1.9]


def test_the_chart_has_a_column_for_each_model_where_there_are_several_batches(other_models):
    figure = benchmark_figure(other_models[0])
    titles = [[f"{model}, batch {n}" for model in ("transformer", "mlp")] for n in (12, 4)]
    assert [axes.get_title() for axes in figure.axes] == titles[0] + titles[1]
    entries = other_models[0]["measurements"]
    for axes, place in zip(figure.axes, (0, 2, 1, 3), strict=True):
        point = axes.containers[1].lines[0]
        two = entries[place]["methods"]["two_gradients"]
        assert point.get_xdata()[0] == two["ratio_to_plain"]["median"]


def test_the_chart_holds_all_that_is_drawn():
    """Also if the ratios of the second batch size are larger than those of the first."""
    entries = []
    for batch_size, ratio in ((8, 1.5), (64, 9.0)):
        methods = {
            name: {"ratio_to_plain": dict.fromkeys(("lower", "median", "upper"), value)}
            for name, value in (("plain", 1.0), ("two_gradients", ratio))
        }
        entries.append({"model": "mlp", "batch_size": batch_size, "methods": methods})
    for axes in benchmark_figure({"measurements": entries}).axes:
        left, right = axes.get_xlim()
        assert left == 0
        assert right > 9


def test_the_chart_is_a_picture(all_methods, folder):
    height, width, _ = matplotlib.image.imread(folder / "benchmark.png").shape
    assert width == 1320  # 4.4 inches
    assert 1200 < height < 1800
    assert 20_000 < (folder / "benchmark.png").stat().st_size < 500_000


def test_the_chart_names_the_methods_and_their_kinds(all_methods):
    figure = benchmark_figure(all_methods[0])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(METHODS)
    (legend,) = figure.legends
    kinds = [text.get_text() for text in legend.get_texts()]
    assert kinds == [
        *("references", "by hand", "optax.contrib.sam", "monge_sam_jax"),
        *("SAM", "M-SAM", "Fisher SAM", "ASAM"),
        *("from quartile to quartile", "medians of the references"),
    ]
    check_column(figure)
    bars = zip(METHODS, figure.axes[0].containers, strict=True)
    colours = {name: bar.lines[0].get_color() for name, bar in bars}
    for name, alike in [
        ("sgd", ("plain", "two_gradients")),
        ("sam", ("sam", "sam_by_hand", "optax_opaque", "optax_transparent")),
        ("monge_sam", ("monge_sam", "monge_by_hand", "monge_late", "one_pass_gradient")),
        ("adaptive_sam", ("adaptive_sam", "adaptive_by_hand")),
        ("fisher_sam", ("fisher_sam", "fisher_by_hand")),
    ]:
        assert {colours[method] for method in alike} == {COLOURS[name]}


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models",), "--models needs at least one name"),
        (("--methods",), "--methods needs at least one name"),
        (("--batch-size",), "--batch-size needs at least one number"),
        (("--batch-size", "4", "4"), "--batch-size has a number twice: 4 4"),
        (("--sharding", "fsdp"), "--sharding is for --compile-for: measurements are of one device"),
        (
            ("--effort", "little"),
            "--effort is for --compile-for: what is measured is compiled in full",
        ),
        (
            ("--compile-for", "a100"),
            "--compile-for must be h100, h100:8, or a TPU slice such as v5e:2x4, got a100",
        ),
        (("--models", "mlp", "mlp"), "--models has a name twice: mlp mlp"),
        (("--methods", "sam", "sam"), "--methods has a name twice: sam sam"),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--compilations", "-1"), "--compilations must be at least 1, got -1"),
        (
            ("--batch-size", "4", "6"),
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
        "import sys, monge_sam_jax.experiments.bench.options\n"
        "heavy = {'flax', 'matplotlib', 'rich', 'sklearn', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
