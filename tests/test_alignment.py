"""Mutual neighbours and the CLIP loss against literal versions in NumPy and in fractions."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import logsumexp

from monge_sam_jax import alignment
from monge_sam_jax.alignment import clip_loss, mutual_knn_alignment


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthogonal(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0].astype(np.float32)


def related(n, d, seed=0):
    """Embeddings that share about half of their neighbours."""
    x = normal(n, d, seed=seed)
    return x, (x + 0.3 * normal(n, d, seed=seed + 1)) @ orthogonal(d, seed)


# Mutual nearest neighbours


def cosines(x):
    x = np.asarray(x, float)
    norms = np.sqrt(np.sum(x * x, axis=1, keepdims=True))
    u = x / np.where(norms == 0, 1, norms)
    return u @ u.T


def exact_cosines(x):
    """Something that orders each row as its cosines do, in fractions: ties are exact."""
    rows = [[Fraction(float(entry)) for entry in row] for row in x]

    def ordering(a, b):
        inner = sum(p * q for p, q in zip(a, b, strict=True))
        square = sum(q * q for q in b)
        return inner * abs(inner) / square if square else Fraction(0)

    return [[ordering(a, b) for b in rows] for a in rows]


def literal_score(x, y, k, cosines=cosines):
    """Huh et al. 2024, with the smaller index first among equals."""
    shared = []
    for cosines_x, cosines_y in zip(cosines(x), cosines(y), strict=True):
        i = len(shared)
        others = [j for j in range(len(x)) if j != i]
        nearest_x, nearest_y = (
            set(sorted(others, key=lambda j, c=c: (-c[j], j))[:k]) for c in (cosines_x, cosines_y)
        )
        shared.append(len(nearest_x & nearest_y) / k)
    return np.mean(shared)


def score(x, y, k=8):
    return float(mutual_knn_alignment(x, y, k=k).score)


@pytest.mark.parametrize(("n", "d", "k"), [(9, 3, 8), (60, 2, 1), (60, 5, 3), (200, 64, 8)])
def test_literal_version(n, d, k):
    x, y = related(n, d)
    result = mutual_knn_alignment(x, y, k=k)
    np.testing.assert_allclose(result.score, literal_score(x, y, k), rtol=1e-6)
    np.testing.assert_allclose(result.chance, k / (n - 1), rtol=1e-6)
    assert result.score.dtype == result.chance.dtype == jnp.float32


def is_constant(x):
    """Whether rows of integers have one direction."""
    return len({tuple(row // max(np.gcd.reduce(row), 1)) for row in x}) == 1


@settings(max_examples=6)  # each is compiled anew
@given(st.data())
def test_ties_of_any_shape(data):
    """Small integers: cosines are equal or far apart, many are equal, and some rows are zero."""
    n = data.draw(st.integers(2, 12))
    k = data.draw(st.integers(1, n - 1))
    shapes = st.tuples(st.just(n), st.integers(1, 4))
    x, y = (data.draw(hnp.arrays(int, shapes, elements=st.integers(-3, 3))) for _ in range(2))
    if is_constant(x) or is_constant(y):
        with pytest.warns(RuntimeWarning, match="same direction"):
            assert np.isnan(score(x, y, k))
    else:
        expected = literal_score(x, y, k, exact_cosines)
        np.testing.assert_allclose(score(x, y, k), expected, rtol=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 3.0]))
def test_ties(seed, scale):
    """Equal and parallel rows, zero rows, and cosines that are equal by chance; one shape."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(-2, 3, size=(2, 24, 3))
    x[rng.integers(24, size=4)] = x[0]
    x[5] = 2 * x[6]
    y[7] = 0
    expected = literal_score(x, y, 4, exact_cosines)
    np.testing.assert_allclose(score(x * scale, y * scale, k=4), expected, rtol=1e-6)


def test_equal_rows_that_are_no_integers():
    rng = np.random.default_rng(0)
    x = normal(10, 9)[rng.integers(10, size=43)]
    y = normal(10, 9, seed=1)[rng.integers(10, size=43)]
    expected = literal_score(x, y, 5, exact_cosines)
    np.testing.assert_allclose(score(x, y, k=5), expected, rtol=1e-6)


@pytest.mark.parametrize("spread", [1e-2, 1e-3])
def test_rows_around_one_direction(spread):
    """Cosines of 1 - spread^2; in float32, those of 1e-3 would give 0.18 in place of 0.48."""
    z, w = related(300, 16)
    x, y = (2 * normal(1, 16, seed=5) + spread * z, normal(1, 16, seed=6) + spread * w)
    assert abs(score(x, y) - literal_score(x, y, 8)) < 5e-3
    # Two rows far away draw the mean away from all others, for 1e-3 by seven times their spread.
    x[0], y[0] = 0, -y[1]
    assert abs(score(x, y) - literal_score(x, y, 8)) < 2e-2


def test_chance_and_certainty():
    x, y = normal(1000, 32), normal(1000, 32, seed=1)
    unrelated = mutual_knn_alignment(x, y)
    # The standard deviation of the score is about sqrt(chance / (n k)) = 1e-3.
    assert abs(unrelated.score - unrelated.chance) < 3e-3
    assert score(x, x @ orthogonal(32)) == 1
    assert score(x, x) == 1
    all_others = mutual_knn_alignment(x[:9], y[:9], k=8)
    assert all_others == (1, 1)


def test_laws():
    x, y = related(80, 6)
    expected = score(x, y)
    assert 0.3 < expected < 0.8
    order = np.random.default_rng(0).permutation(80)
    lengths = 10.0 ** np.random.default_rng(1).uniform(-30, 30, size=(80, 1)).astype(np.float32)
    assert score(x[order], y[order]) == expected
    assert score(y, x) == expected
    assert score(x @ orthogonal(6, 1), y @ orthogonal(6, 2)) == expected
    assert score(x * lengths, y / lengths) == expected
    assert score(x[order], y) < 0.3
    assert score(-x, y) == expected
    assert score(x + 3, y) != expected  # cosines, not distances


CONSTANT = {
    "equal": np.full((40, 5), 0.1),
    "parallel": np.outer(np.arange(1, 41), [0.3, -1, 2, 0, 1]),
    "equal_up_to_rounding": 1 + 1e-7 * normal(40, 5),
    "noise_of_a_network": normal(1, 5) + 1e-5 * normal(40, 5, seed=1),
    "float16": jnp.asarray(normal(1, 5) * (1 + 2e-4 * normal(40, 5, seed=1)), jnp.float16),
    "bfloat16": jnp.asarray(normal(1, 5) * (1 + 2e-3 * normal(40, 5, seed=1)), jnp.bfloat16),
    "zero": np.zeros((40, 5)),
    "no_columns": np.zeros((40, 0)),
    "many_rows": np.full((5000, 2), 0.1),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_embeddings(name):
    constant = CONSTANT[name]
    message = "NaN: all rows of x have the same direction"
    with pytest.warns(RuntimeWarning, match=message) as record:
        assert np.isnan(score(constant, normal(len(constant), 5)))
    assert len(record) == 1


def test_both_embeddings_are_looked_at():
    constant, other = CONSTANT["equal"], normal(40, 5)
    with pytest.warns(RuntimeWarning, match="NaN: all rows of y") as record:
        result = mutual_knn_alignment(other, constant)
    assert np.isnan(result.score)
    assert result.chance == np.float32(8 / 39)
    assert [r.filename for r in record] == [__file__]
    with pytest.warns(RuntimeWarning) as record:
        assert np.isnan(score(constant, constant))
    assert len(record) == 2


def test_no_warning_under_jit():
    constant, other = CONSTANT["equal"], normal(40, 5)
    jitted = jax.jit(mutual_knn_alignment, static_argnames="k")
    assert np.isnan(jitted(constant, other, k=8).score)  # and warnings are errors
    assert jitted(other, other, k=8).score == 1


def test_not_constant():
    """One row that differs, opposite rows, and directions that differ by more than rounding."""
    one_differs = np.ones((40, 5))
    one_differs[0, 0] = 2
    other = normal(40, 5)
    for x in (
        one_differs,
        np.outer((-1.0) ** np.arange(40), np.ones(5)),
        1 + 3e-4 * other,
        jnp.asarray(1 + 0.05 * other, jnp.bfloat16),
    ):
        assert 0 <= score(x, other) <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite(bad):
    x, y = related(40, 5)
    broken = x.copy()
    broken[17, 3] = bad
    with pytest.warns(RuntimeWarning, match="NaN: x has entries that are not finite") as record:
        assert np.isnan(score(broken, y))
    assert len(record) == 1
    with pytest.warns(RuntimeWarning, match="NaN: y has entries that are not finite"):
        assert np.isnan(score(y, broken))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int8])
def test_narrow_dtypes(dtype):
    """They are widened before anything else is done: here squares overflow in float16 and int8."""
    x, y = (jnp.asarray(100 * z / np.abs(z).max(), dtype) for z in related(50, 6))
    result = mutual_knn_alignment(x, y, k=4)
    assert result.score.dtype == jnp.float32
    expected = literal_score(np.asarray(x, float), np.asarray(y, float), 4, exact_cosines)
    np.testing.assert_allclose(result.score, expected, rtol=1e-6)


def test_double_precision(x64):
    z, w = (np.asarray(a, float) for a in related(40, 4))
    x, y = 1 + 1e-6 * z, 1 + 1e-6 * w  # constant in float32
    with jax.numpy_dtype_promotion("strict"):
        result = mutual_knn_alignment(x, y, k=4)
    expected = literal_score(x, y, 4, exact_cosines)
    np.testing.assert_allclose(result.score, expected, rtol=1e-12)
    assert result.score.dtype == result.chance.dtype == jnp.float64
    assert mutual_knn_alignment(np.float32(z), w, k=4).score.dtype == jnp.float64


def test_blocks(monkeypatch):
    """Blocks of 1 and of 7 rows of 50, the second of which leaves a remainder."""
    x, y = related(50, 4)
    expected = literal_score(x, y, 8)
    for rows in (1, 7):
        monkeypatch.setattr(alignment, "_BLOCK_ENTRIES", rows * 50)
        np.testing.assert_allclose(score(x, y), expected, rtol=1e-6)


def test_one_compilation():
    alignment._mutual_knn.clear_cache()
    for seed in range(3):
        mutual_knn_alignment(*related(31, 3, seed=seed), k=np.int64(2))
    assert alignment._mutual_knn._cache_size() == 1


def test_transformations():
    x, y = (np.stack(z) for z in zip(*(related(30, 4, seed=s) for s in range(3)), strict=True))
    expected = [score(*pair, k=3) for pair in zip(x, y, strict=True)]
    mapped = jax.jit(jax.vmap(lambda x, y: mutual_knn_alignment(x, y, k=3)))(x, y)
    np.testing.assert_allclose(mapped.score, expected, rtol=1e-6)
    np.testing.assert_allclose(mapped.chance, 3 / 29, rtol=1e-6)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        half = jnp.asarray(x[0], jnp.bfloat16)
        mutual_knn_alignment(half, y[0], k=3)


@pytest.mark.parametrize("n", [20_000, 50_000])
def test_memory(on_cpu, n):
    """A few copies of the embeddings and a few blocks, never a matrix of n by n."""
    x = jax.ShapeDtypeStruct((n, 512), jnp.float32)
    block = alignment._BLOCK_ENTRIES // n
    compiled = alignment._mutual_knn.lower(x, x, k=8, block=block).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 2 * n * 512 * 4
    assert memory.temp_size_in_bytes < 3 * memory.argument_size_in_bytes + 4 * block * n * 4
    assert memory.temp_size_in_bytes < n * n * 4 / 5
    assert " sort(" not in compiled.as_text()  # top_k is a partial sort, not one of whole rows


def grouped_embeddings(n, group_x, group_y, d=512):
    """Each thing near the centre of its group, in x and in y."""
    x = normal(n, d)[group_x] + 0.1 * normal(n, d, seed=1)
    return x, normal(n, d, seed=2)[group_y] + 0.1 * normal(n, d, seed=3)


def regrouped(groups, kept, size=9):
    """Groups of nine; those after the first `kept` share no pair between x and y."""
    thing = np.arange(groups * size)
    rest = thing - kept * size
    return thing // size, np.where(rest < 0, thing // size, kept + rest % (groups - kept))


def test_known_structure():
    group_x, group_y = regrouped(groups=60, kept=20)
    x, y = grouped_embeddings(540, group_x, group_y, d=64)
    np.testing.assert_allclose(score(x, y), 20 / 60, rtol=1e-6)


# ru_maxrss begins at the peak of the process that started this one; VmHWM does not.
LARGE = """
import re
from test_alignment import grouped_embeddings, regrouped, score

def peak_kib():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])

x, y = grouped_embeddings(20_007, *regrouped(groups=2223, kept=1000))
before = peak_kib()
print(score(x, y), peak_kib() - before)
"""


@pytest.mark.slow
def test_twenty_thousand_things():
    run = subprocess.run(
        [sys.executable, "-c", LARGE],
        cwd=Path(__file__).parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result, kib = map(float, run.stdout.split())
    np.testing.assert_allclose(result, 1000 / 2223, rtol=1e-6)
    assert 2**10 * kib < 20_007**2 * 4 / 3  # all cosines of one of the two take three times as much


@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        (normal(9, 3), normal(8, 3), 2, r"same things.*\(9, 3\) and \(8, 3\)"),
        (normal(8, 3), normal(8, 3), 8, "got k = 8 and n = 8"),
        (normal(0, 3), normal(0, 3), 1, "got k = 1 and n = 0"),
        (normal(9, 3), normal(9, 3), 0, "k must be an integer, 1 or more, got 0"),
        (normal(9, 3), normal(9, 3), -1, "got -1"),
        (normal(9, 3), normal(9, 3), 2.0, "got 2.0"),
        (normal(9), normal(9, 3), 2, r"x must be a matrix.*\(9,\)"),
        (normal(9, 3), normal(9, 3, 1), 2, r"y must be a matrix.*\(9, 3, 1\)"),
    ],
)
def test_wrong_embeddings(x, y, k, message):
    with pytest.raises(ValueError, match=message):
        mutual_knn_alignment(x, y, k=k)
    with pytest.raises(ValueError, match=message):
        jax.jit(mutual_knn_alignment, static_argnames="k")(x, y, k=k)


# The CLIP loss

jitted_loss = jax.jit(clip_loss)
loss_and_gradients = jax.jit(jax.value_and_grad(clip_loss, argnums=(0, 1, 2)))


def literal_loss(image, text, logit_scale):
    """Radford et al. 2021, figure 3; zero rows stay zero."""
    unit = []
    for z in (image, text):
        z = np.asarray(z, float)
        norms = np.sqrt(np.sum(z * z, axis=1, keepdims=True))
        unit.append(z / np.where(norms == 0, 1, norms))
    logits = logit_scale * unit[0] @ unit[1].T
    right = np.diagonal(logits)
    return np.mean((logsumexp(logits, axis=1) - right + logsumexp(logits, axis=0) - right) / 2)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), logit_scale=st.floats(0, 100), closeness=st.floats(0, 3))
def test_literal_loss(seed, logit_scale, closeness):
    image, noise = normal(2, 7, 5, seed=seed)
    text = noise + np.float32(closeness) * image
    loss = jitted_loss(image, text, logit_scale)
    expected = literal_loss(image, text, logit_scale)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=2e-7 * logit_scale)
    assert loss.dtype == jnp.float32


def test_loss_is_optax_cross_entropy_in_both_directions():
    image, text = normal(2, 16, 8)
    i, t = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (image, text))
    logits, labels = jnp.asarray(14.0 * i @ t.T), jnp.arange(16)
    to_text, to_image = (
        optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()
        for z in (logits, logits.T)
    )
    assert abs(to_text - to_image) > 0.1
    expected = (to_text + to_image) / 2
    np.testing.assert_allclose(jitted_loss(image, text, 14.0), expected, rtol=1e-5)


@pytest.mark.parametrize("logit_scale", [0.0, 1.0, 100.0])
def test_chance_is_the_logarithm_of_the_batch_size(logit_scale):
    constant = np.full((128, 6), 0.3)
    loss = jitted_loss(constant, 2 * constant, logit_scale)
    np.testing.assert_allclose(loss, np.log(128), rtol=1e-6)
    assert round(float(loss), 3) == 4.852
    assert jitted_loss(constant[:1], constant[:1], logit_scale) == 0


@pytest.mark.parametrize("logit_scale", [3.0, 100.0, 1e4, 1e30])
def test_large_scales(logit_scale):
    """Pairs that are all right, or all wrong: log(1 + (n - 1) e^-s), and s more."""
    eye = np.eye(8, dtype=np.float32)
    right, right_grads = loss_and_gradients(eye, eye, logit_scale)
    wrong, wrong_grads = loss_and_gradients(eye, np.roll(eye, 1, axis=0), logit_scale)
    expected = np.log1p(7 * np.exp(-logit_scale))
    np.testing.assert_allclose(right, expected, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(wrong, expected + logit_scale, rtol=1e-6)
    slope = 7 * np.exp(-logit_scale) / (1 + 7 * np.exp(-logit_scale))
    np.testing.assert_allclose(right_grads[2], -slope, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(wrong_grads[2], 1 - slope, rtol=1e-5)
    for grads in (right_grads, wrong_grads):
        assert all(np.isfinite(g).all() for g in grads)


def finite_difference(f, x, step=1e-6):
    x = np.asarray(x, float)
    result = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        e = np.zeros(x.shape)
        e[index] = step
        result[index] = (f(x + e) - f(x - e)) / (2 * step)
    return result


def test_gradient_of_the_loss(x64):
    """Of the literal loss, by central differences; and of second order, of our gradient."""
    image, text, s = *normal(2, 5, 3).astype(float), 7.0
    _, grads = loss_and_gradients(image, text, s)
    assert max(np.abs(g).max() for g in grads) > 0.1
    for g, expected in zip(
        grads,
        (
            finite_difference(lambda z: literal_loss(z, text, s), image),
            finite_difference(lambda z: literal_loss(image, z, s), text),
            finite_difference(lambda z: literal_loss(image, text, z), s),
        ),
        strict=True,
    ):
        assert g.dtype == jnp.float64
        np.testing.assert_allclose(g, expected, rtol=1e-7, atol=1e-8)
    along_image = jax.jit(jax.grad(lambda z: clip_loss(z, text, s)))
    direction = normal(5, 3, seed=1).astype(float)
    _, second = jax.jvp(along_image, (image,), (direction,))
    step = 1e-6 * direction
    expected = (along_image(image + step) - along_image(image - step)) / 2e-6
    np.testing.assert_allclose(second, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_zero_rows_of_the_loss(dtype):
    image, text = (jnp.asarray(z, dtype) for z in normal(2, 6, 4))
    image, text = image.at[2].set(0), text.at[4].set(0)
    with jax.debug_nans(True):
        loss, grads = loss_and_gradients(image, text, 5.0)
    wide = [np.asarray(z, float) for z in (image, text)]
    np.testing.assert_allclose(loss, literal_loss(*wide, 5.0), rtol=1e-6)
    assert loss.dtype == jnp.float32
    assert [g.dtype for g in grads[:2]] == [dtype, dtype]
    for g, row in zip(grads[:2], (2, 4), strict=True):
        assert not g[row].any()
        assert np.all(np.any(np.delete(np.asarray(g, float), row, axis=0) != 0, axis=1))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lengths_that_overflow_when_squared(size):
    image, text = normal(2, 6, 4)
    loss, grads = loss_and_gradients(image * np.float32(size), text, 5.0)
    np.testing.assert_allclose(loss, literal_loss(image, text, 5.0), rtol=1e-5)
    _, expected = loss_and_gradients(image, text, 5.0)
    np.testing.assert_allclose(grads[0] * np.float32(size), expected[0], rtol=1e-4, atol=1e-6)


def test_laws_of_the_loss():
    image, text = normal(2, 9, 4)
    expected = float(jitted_loss(image, text, 9.0))
    order = np.random.default_rng(0).permutation(9)
    Q = orthogonal(4)
    lengths = np.exp(normal(9, 1, seed=3))
    for i, t in (
        (text, image),
        (image[order], text[order]),
        (image @ Q, text @ Q),
        (image * lengths, text / lengths),
    ):
        np.testing.assert_allclose(jitted_loss(i, t, 9.0), expected, rtol=2e-6)
    assert abs(jitted_loss(image, text[order], 9.0) - expected) > 1e-2
    assert abs(jitted_loss(image, text @ Q, 9.0) - expected) > 1e-2


def test_loss_under_transformations():
    image, text = normal(2, 3, 6, 4)
    scales = jnp.array([1.0, 5.0, 20.0])
    losses, grads = jax.vmap(loss_and_gradients)(image, text, scales)
    for j in range(3):
        loss, each = loss_and_gradients(image[j], text[j], scales[j])
        np.testing.assert_allclose(losses[j], loss, rtol=1e-5)
        for mapped, g in zip(grads, each, strict=True):
            np.testing.assert_allclose(mapped[j], g, rtol=1e-4, atol=1e-6)
    with jax.numpy_dtype_promotion("strict"):
        half = jnp.asarray(image[0], jnp.bfloat16)
        loss = jitted_loss(half, text[0], jnp.bfloat16(5.0))
    np.testing.assert_allclose(loss, literal_loss(half, text[0], 5.0), rtol=1e-5)
    assert loss.dtype == jnp.float32


def test_loss_that_is_not_finite():
    image, text = normal(2, 6, 4)
    assert np.isnan(jitted_loss(image, text, np.nan))
    image[1, 1] = np.inf
    assert np.isnan(jitted_loss(image, text, 1.0))
    assert np.isnan(jitted_loss(text, image, 1.0))


def test_products_keep_float32_precision():
    """GPUs and TPUs would round the factors to fewer bits; on CPU nothing else shows it."""
    x = normal(6, 4)
    for lowered, number in (
        (alignment._mutual_knn.lower(x, x, k=2, block=6), 2),
        (loss_and_gradients.lower(x, x, 1.0), 3),
    ):
        text = lowered.as_text()
        assert text.count("stablehlo.dot_general") == number
        assert text.count("precision = [HIGHEST, HIGHEST]") == number


@pytest.mark.parametrize(
    ("image", "text", "logit_scale", "message"),
    [
        (normal(9, 3), normal(8, 3), 1.0, r"one shape.*\(9, 3\) and \(8, 3\)"),
        (normal(9, 3), normal(9, 4), 1.0, r"one shape.*\(9, 3\) and \(9, 4\)"),
        (normal(0, 3), normal(0, 3), 1.0, "n at least 1"),
        (normal(9), normal(9, 3), 1.0, r"image_embeddings must be a matrix.*\(9,\)"),
        (normal(9, 3), normal(9), 1.0, r"text_embeddings must be a matrix.*\(9,\)"),
        (normal(9, 3), normal(9, 3), np.ones(1), r"must be a scalar.*\(1,\)"),
    ],
)
def test_wrong_arguments_of_the_loss(image, text, logit_scale, message):
    with pytest.raises(ValueError, match=message):
        clip_loss(image, text, logit_scale)


def test_complex_embeddings():
    x = normal(9, 3)
    with pytest.raises(TypeError, match="y must be real, got dtype complex64"):
        mutual_knn_alignment(x, x * 1j)
    with pytest.raises(TypeError, match="image_embeddings must be real, got dtype complex64"):
        clip_loss(x * 1j, x, 1.0)
