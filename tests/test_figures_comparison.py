"""The newer balls on the banana: loops in NumPy, and where all end, by count."""

import json

import matplotlib.image
import numpy as np
import pytest
from looks import check_column
from reference import banana_gradient
from scipy.integrate import solve_ivp

from monge_sam_jax.__main__ import main
from monge_sam_jax.experiments.figures import comparison
from monge_sam_jax.experiments.figures import run as figures
from monge_sam_jax.experiments.figures.options import Figures

STARTS = np.array([[-1.5, 0.5], [2.0, 1.0], [-0.4, -3.0]])
STEPS = 30


def loop(start, perturb, steps=STEPS):
    """Iterates with the gradient at theta + perturb(gradients so far, theta)."""
    theta, grads, path = start, [], [start]
    for _ in range(steps):
        grads.append(banana_gradient(theta))
        theta = theta - 0.01 * banana_gradient(theta + perturb(grads, theta))
        path.append(theta)
    return np.array(path)


def to_the_corner(grads, theta):
    return np.sign(grads[-1]) / np.sqrt(2)  # of length one


def averaged(grads, theta):
    g, last = grads[-1], np.array(grads[-4:])
    v = np.linalg.inv(np.eye(2) + last.T @ last / len(last)) @ g
    return v / np.sqrt(g @ v)


def straight_on(grads, theta):
    return averaged(grads[-1:], theta)  # M-SAM's


def along_the_geodesic(grads, theta):
    """The equation in the docstring of `geodesic_perturbation`, solved by scipy."""

    def derivative(_, state):
        (x, y), velocity = state[:2], state[2:]
        g = banana_gradient(state[:2])
        off = 4 * x * y - 2
        curvature = velocity @ np.array([[2 * y**2, off], [off, 2 * x**2]]) @ velocity
        return np.concatenate([velocity, -curvature / (1 + g @ g) * g])

    n = np.linalg.norm(grads[-1])
    velocity = grads[-1] / n / np.sqrt(1 + n**2)
    state = np.concatenate([theta, velocity])
    return solve_ivp(derivative, (0, 1), state, rtol=1e-9, atol=1e-10).y[:2, -1] - theta


@pytest.mark.parametrize(
    ("name", "perturb"), [("supremum", to_the_corner), ("averaged_monge", averaged)]
)
def test_paths_of_balls_are_those_of_a_loop(name, perturb, x64):
    actual = comparison.ball_paths(name, STARTS, STEPS)
    for i, start in enumerate(STARTS):
        np.testing.assert_allclose(actual[:, i], loop(start, perturb), rtol=1e-9)


def test_steps_along_the_geodesic_are_those_of_the_equation(x64):
    """From each iterate, as paths that hop across the valley part; and M-SAM's are not."""
    actual = comparison.geodesic_paths(STARTS, STEPS)
    np.testing.assert_array_equal(actual[0], STARTS)
    thetas, after = actual[:-1].reshape(-1, 2), actual[1:].reshape(-1, 2)
    error, to_straight = (
        np.linalg.norm([loop(theta, perturb, 1)[1] for theta in thetas] - after, axis=-1)
        for perturb in (along_the_geodesic, straight_on)
    )
    assert np.median(error) < 0.001 < to_straight.min()
    # Eight steps are few where the valley is steep.
    assert np.all(error < 0.4 * to_straight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "new"
    main(["figures", "comparison", "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    content = json.loads((folder / "figures.json").read_text("utf-8"))
    assert content["configuration"] == {"numbers": ["comparison"]}
    (figure,) = content["figures"].values()
    return {(row["method"], row["steps"]): row for row in figure["rows"]}


@pytest.mark.parametrize(
    ("method", "steps", "shares"),
    [
        ("SAM", 200, (0.32, 0.68, 0.0)),
        ("M-SAM", 200, (0.16, 0.84, 0.0)),
        ("Supremum", 200, (0.28, 0.72, 0.0)),
        ("Averaged Monge", 200, (0.16, 0.84, 0.0)),
        ("Geodesic", 200, (0.16, 0.60, 0.24)),
        ("Geodesic", 5000, (0.16, 0.84, 0.0)),
    ],
)
def test_where_the_methods_end(rows, method, steps, shares):
    row = rows[method, steps]
    found = [row[place] for place in ("saddle", "flattest", "valley")]
    np.testing.assert_allclose(found, shares, atol=0.011)  # one start may end elsewhere by rounding


def test_the_geodesic_hops_less_far_across_the_valley(rows):
    """By a factor alone, as rounding decides on which side of the valley a path is at the end."""
    for steps in (200, 5000):
        assert 0 < rows["Geodesic", steps]["median loss"] < rows["M-SAM", steps]["median loss"] / 2
    for method, loss in (("M-SAM", 0.0048), ("Supremum", 0.0048), ("Averaged Monge", 0.0044)):
        assert rows[method, 200]["median loss"] == pytest.approx(loss, rel=0.2)


def test_the_picture(folder):
    height, width, _ = matplotlib.image.imread(folder / "figure_comparison.png").shape
    assert width == 1320  # 4.4 inches
    assert height < 2800
    assert {path.name for path in folder.iterdir()} == {"figure_comparison.png", "figures.json"}


def test_the_picture_can_be_read_in_a_column(x64):
    assert check_column(comparison.comparison_figure().figure) == set()


def test_words_come_after_numbers_and_only_on_request():
    assert Figures(("comparison", 3, "one-pass", 1)).numbers == (1, 3, "one-pass", "comparison")
    assert Figures().numbers == (1, 2, 3, 4, 5)
    assert [figures.picture_of(name) for name in (1, "one-pass")] == [
        "figure_1.png",
        "figure_one_pass.png",
    ]
