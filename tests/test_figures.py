"""The command `monge-sam figures`, and the paper's claims about figures 1 to 5, by count."""

import contextlib
import io
import json
import subprocess
import sys

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from looks import check_column
from reference import banana_gradient

import monge_sam_jax as ms
from monge_sam_jax import toy
from monge_sam_jax.__main__ import main
from monge_sam_jax.experiments.figures import analysis as paper_analysis
from monge_sam_jax.experiments.figures import run as paper_figures
from monge_sam_jax.experiments.figures import trajectories as paper_trajectories

METHODS = ("SAM", "M-SAM")


@pytest.fixture(scope="module")
def results():
    """The figures, drawn when a test first asks for them."""

    class Drawn(dict):
        def __missing__(self, number):
            self[number] = paper_figures.draw(number)
            return self[number]

    return Drawn()


def by_method(rows, **where):
    """The rows with these values, by method."""
    chosen = [row for row in rows if all(row[name] == value for name, value in where.items())]
    return {row["method"]: row for row in chosen}


# --- the claims ---


def test_figure_1_sam_ends_at_the_saddle_and_monge_sam_near_the_flattest_minimum(results):
    rows = by_method(results[1].rows)
    assert rows["SAM"]["to saddle"] < 0.01
    assert rows["M-SAM"]["to flattest"] < 0.1
    assert rows["GD"]["to flattest"] > 0.6
    # M-SAM gets lower than SAM, but not, as gradient descent does, to the minimum.
    assert rows["GD"]["loss"] < 1e-6 < rows["M-SAM"]["loss"] < 0.02 < rows["SAM"]["loss"]
    g = np.linalg.norm(banana_gradient(np.array([-1.5, 0.5])))
    np.testing.assert_allclose(rows["SAM"]["|delta|"], 1, rtol=1e-12)
    np.testing.assert_allclose(rows["M-SAM"]["|delta|"], 1 / np.sqrt(1 + g**2), rtol=1e-12)


@pytest.mark.parametrize("square", ["[-1/2, 1/2]^2", "[-1, 1]^2"])
def test_figure_2_a_larger_radius_draws_more_to_the_maximum(results, square):
    small = by_method(results[2].rows, square=square, rho=0.2)
    large = by_method(results[2].rows, square=square, rho=1.0)
    for method in METHODS:
        assert large[method]["at maximum"] > small[method]["at maximum"] + 0.25
    assert large["SAM"]["at maximum"] > large["M-SAM"]["at maximum"]
    assert abs(small["SAM"]["at maximum"] - small["M-SAM"]["at maximum"]) < 0.01
    assert small["SAM"]["at maximum"] < 0.15


def test_figure_2_only_the_larger_square_tells_the_methods_apart(results):
    shares = {
        square: {
            method: row["at maximum"]
            for method, row in by_method(results[2].rows, square=square, rho=1.0).items()
        }
        for square in ("[-1/2, 1/2]^2", "[-1, 1]^2")
    }
    one_start = 0.0051  # may end elsewhere by rounding
    assert shares["[-1/2, 1/2]^2"] == pytest.approx({"SAM": 1.0, "M-SAM": 0.98}, abs=one_start)
    assert shares["[-1, 1]^2"] == pytest.approx({"SAM": 0.585, "M-SAM": 0.305}, abs=one_start)


@pytest.mark.parametrize("rate", [0.66, 0.74])
@pytest.mark.parametrize("method", METHODS)
def test_figure_3_ends_in_the_limit_cycle(results, rate, method):
    row = by_method(results[3].rows, **{"learning rate": rate})[method]
    cycle, rho = row["limit cycle"], 0.3
    stretch = np.sqrt(1 + 4 * cycle**2) if method == "M-SAM" else 1.0
    np.testing.assert_allclose(cycle * stretch, rate * rho / (1 - rate), rtol=1e-12)
    step = cycle - 2 * rate * (cycle + rho / stretch)
    np.testing.assert_allclose(step, -cycle, rtol=1e-12)
    np.testing.assert_allclose(row["after 11"], cycle, rtol=5e-4)


@pytest.mark.parametrize(("metric", "cycle"), [("euclidean", "sam"), ("monge", "monge_sam")])
@pytest.mark.parametrize("start", [0.01, 0.5, 3.0])
def test_limit_cycles_attract_every_start(metric, cycle, start, x64):
    for rate, rho in [(0.66, 0.3), (0.74, 0.3), (0.3, 1.0)]:
        path = toy.trajectory(
            toy.paraboloid,
            jnp.array([start]),
            metric=getattr(ms, metric)(),
            rho=rho,
            learning_rate=rate,
            steps=300,
        )
        expected = getattr(paper_analysis, f"{cycle}_cycle")(rate, rho)
        np.testing.assert_allclose(np.abs(path[-2:, 0]), expected, rtol=1e-8)
        np.testing.assert_allclose(path[-1], -path[-2], rtol=1e-8)


def test_figure_3_monge_sam_stays_lower(results):
    low, high = (by_method(results[3].rows, **{"learning rate": rate}) for rate in (0.66, 0.74))
    for rows in (low, high):
        assert rows["M-SAM"]["loss there"] < 0.6 * rows["SAM"]["loss there"]
    # From 0.5, at the smaller rate only SAM climbs; at the larger both do, and neither diverges.
    assert low["M-SAM"]["after 11"] < 0.5 < low["SAM"]["after 11"]
    assert 0.5 < high["M-SAM"]["after 11"] < high["SAM"]["after 11"] < 0.86


def test_figure_4_near_the_saddle(results):
    """M-SAM's area is the smaller one, except within 1/4 of the saddle at rho = 1."""
    for rho, quarter, half in [(0.25, "<", "<"), (0.5, "=", "<"), (1.0, ">", "<")]:
        rows = by_method(results[4].rows, rho=rho)
        for place, relation in (("saddle 1/4", quarter), ("saddle 1/2", half)):
            monge, sam = rows["M-SAM"][place], rows["SAM"][place]
            assert relation == ("<" if monge < sam else ">" if monge > sam else "=")
    shares = {method: rows[method]["saddle 1/4"] for method in METHODS}
    assert shares == pytest.approx({"SAM": 0.944, "M-SAM": 0.962}, abs=2e-3)
    for row in by_method(results[4].rows, rho=0.0).values():
        assert row["saddle 1/2"] == 0


def test_figure_4_near_the_flattest_minima(results):
    """M-SAM's area is the larger one at rho = 0.25 and 0.5; at rho = 1 there is none for both."""
    for rho in (0.25, 0.5):
        rows = by_method(results[4].rows, rho=rho)
        assert rows["M-SAM"]["flat 1/2"] > 1.1 * rows["SAM"]["flat 1/2"] > 0
    for row in by_method(results[4].rows, rho=1.0).values():
        assert row["flat 1/4"] == row["flat 1/2"] == 0


def test_figure_4_the_larger_eigenvalue_is_positive(results):
    assert all(row["min l1"] > 1 for row in results[4].rows)


def test_figure_4_eigenvalues_are_those_of_eq_10_in_numpy(x64):
    points = np.random.default_rng(0).uniform(-2, 2, (50, 2))

    def hessian(p):
        off = 4 * p[0] * p[1] - 2
        return np.array([[2 * p[1] ** 2, off], [off, 2 * p[0] ** 2]])

    for metric, is_monge in ((ms.euclidean(), False), (ms.monge(), True)):
        eigenvalues = paper_analysis.eigenvalue_maps(metric, 0.5, points)
        for p, actual in zip(points, eigenvalues, strict=True):
            g = banana_gradient(p)
            n = np.linalg.norm(g)
            radius = 0.5 / n / (np.sqrt(1 + n**2) if is_monge else 1.0)
            A = (hessian(p + radius * g) @ (np.eye(2) + radius * hessian(p))).T
            expected = np.sort(np.linalg.eigvals(A).real)
            np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_figure_5_shares(results):
    rows = by_method(results[5].rows)
    expected = {
        "GD": (0.1, 0.1, 0.8),
        "SAM": (0.32, 0.68, 0.0),
        "M-SAM": (0.16, 0.84, 0.0),
        "Fisher SAM": (0.16, 0.84, 0.0),
        "ASAM": (0.1, 0.18, 0.56),
    }
    assert list(rows) == list(expected)
    for method, row in rows.items():
        shares = [row[place] for place in ("saddle", "flattest", "valley")]
        np.testing.assert_allclose(shares, expected[method], atol=0.011)  # one start
    # A tenth of the starts cannot leave the line on which every method runs into the saddle.
    assert all(row["t2 = -t1"] == 0.1 for row in rows.values())
    assert all(row["diverged"] == 0 for row in rows.values())
    # ASAM does find the flattest minima, only later.
    assert rows["ASAM"]["later"] > 0.85
    for row in rows.values():
        whole = sum(row[place] for place in ("saddle", "flattest", "valley", "other"))
        np.testing.assert_allclose(whole + row["diverged"], 1, rtol=1e-12)


def test_end_points_are_told_apart():
    ends = np.array(
        [[0.1, -0.1], [0.9, 0.9], [-1, -1], [2, 0.5], [2, 2], [np.nan, 0], [99, 1 / 99]]
    )
    saddle, flattest, valley, diverged = paper_trajectories.classify(ends)
    np.testing.assert_array_equal(np.flatnonzero(saddle), [0])
    np.testing.assert_array_equal(np.flatnonzero(flattest), [1, 2])
    np.testing.assert_array_equal(np.flatnonzero(valley), [3])
    np.testing.assert_array_equal(np.flatnonzero(diverged), [5, 6])


# --- the command ---


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("figures") / "new"


@pytest.fixture(scope="module")
def printed(folder):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["figures", "3", "1", "3", "--output", str(folder)])
    return out.getvalue()


def test_the_command_writes_pictures_and_json(folder, printed):
    names = {"figure_1.png", "figure_3.png", "figures.json"}
    assert {path.name for path in folder.iterdir()} == names
    content = json.loads((folder / "figures.json").read_text("utf-8"), parse_constant=refuse)
    assert list(content["figures"]) == ["1", "3"]
    assert content["versions"]["monge_sam_jax"] == ms.__version__
    for figure in content["figures"].values():
        assert figure["setting"]
        assert len({tuple(row) for row in figure["rows"]}) == 1
    assert len(content["figures"]["3"]["rows"]) == 4


def test_the_command_prints_the_numbers(printed):
    assert printed.index("Figure 1:") < printed.index("Figure 3:")
    for text in ("-0.9454", "-0.6469", "0.5824", "0.438", "Wrote figures.json"):
        assert text in printed
    assert "Figure 2:" not in printed


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_pictures_are_not_empty(results, tmp_path, number):
    path = tmp_path / "figure.png"
    results[number].figure.savefig(path)
    assert 20_000 < path.stat().st_size < 1_000_000
    height, width, _ = matplotlib.image.imread(path).shape
    assert width == 1320  # 4.4 inches
    assert 700 < height < 1800


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_axes_have_names_and_methods_their_colours(results, number):
    methods = {1: {"GD", "SAM", "M-SAM"}, 3: {"SAM", "M-SAM"}}
    assert check_column(results[number].figure) == methods.get(number, set())


def test_all_rows_of_a_figure_have_the_same_names(results):
    for number in paper_figures.FIGURES:
        assert len({tuple(row) for row in results[number].rows}) == 1


def test_single_precision_is_back_after_drawing(results):
    results[3]
    assert jnp.zeros(1).dtype == jnp.float32


def test_no_number_means_all():
    from monge_sam_jax.experiments.figures.options import Figures

    assert Figures().numbers == Figures(()).numbers == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("number", ["0", "6", "one"])
def test_other_numbers_are_refused(number, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["figures", number])
    assert exit_.value.code == 2
    assert "numbers" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        main(["figures", "3", "--output", str(tmp_path / "file")])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("monge-sam: error: --output")
    assert err.count("\n") == 1


def test_the_options_are_light_to_import():
    script = (
        "import sys, monge_sam_jax.experiments.figures.options\n"
        "heavy = {'flax', 'matplotlib', 'rich', 'scipy.optimize', 'tyro'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
