"""`monge-sam bad-minimum`: figure 6 of the paper, at a small scale."""

import copy
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from looks import check_column
from matplotlib.image import imread

from monge_sam_jax import __main__
from monge_sam_jax.experiments.bad_minimum import claims as bad_minimum_claims
from monge_sam_jax.experiments.bad_minimum import plots as plotting_bad_minimum
from monge_sam_jax.experiments.bad_minimum import run as running
from monge_sam_jax.experiments.bad_minimum import training
from monge_sam_jax.experiments.bad_minimum.data import Source
from monge_sam_jax.experiments.bad_minimum.options import PRESETS, BadMinimum
from monge_sam_jax.experiments.bad_minimum.report import COLUMNS, final
from monge_sam_jax.experiments.common import confusion, kept
from monge_sam_jax.experiments.common.data import Batch, shuffled_rows
from monge_sam_jax.experiments.common.errors import InputError

RHO = (0.1, 2.0)
OPTIONS = ["--preset", "smoke", "--seeds", "2", "--epochs", "6", "--evaluations", "3"]
SMALL = BadMinimum(preset="smoke", seeds=2, epochs=6, evaluations=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    __main__.main(["bad-minimum", *OPTIONS, "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


@pytest.fixture(scope="module")
def splits():
    return Source(SMALL).splits(0)


@pytest.fixture(scope="module")
def trainer(splits):
    return training.Trainer(SMALL.recipe, splits.train)


@pytest.fixture(scope="module")
def start(finished):
    """The variables at the bad minimum of seed 0."""
    (path,) = (finished / "finished").glob("start_seed0_*.npz")
    return kept.kept(path, None)["variables"]


def logits(params, x):
    """The mlp, written out."""
    x = x.reshape(len(x), -1)
    layers = [params[f"Dense_{i}"] for i in range(3)]
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"][None]


def mean_loss(params, batch):
    z = logits(params, batch.x)
    right = z[jnp.arange(len(batch.y)), batch.y]
    return jnp.mean(jax.scipy.special.logsumexp(z, axis=-1) - right)


value_and_grad = jax.jit(jax.value_and_grad(mean_loss))


def perturbation(method, g, rho):
    n = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(g)))
    length = {"sgd": 0.0, "sam": rho, "monge_sam": rho / np.sqrt(1 + n**2)}[method]
    return jax.tree.map(lambda x: (length / n * x).astype(np.float32), g), n, length


def runs_of(results, method):
    return [run for run in results["runs"] if run["method"] == method]


def test_files_and_their_content(finished, results):
    assert {path.name for path in finished.iterdir()} == {
        *("results.json", "bad_minimum.md", "figure6.png", "mechanism.png", "finished")
    }
    cells = [(run["method"], run["rho"]) for run in results["runs"]]
    perturbed = [(method, rho) for rho in RHO for method in ("sam", "monge_sam")]
    assert cells == [("scratch", None), ("sgd", None), *perturbed]
    assert results["configuration"]["rho"] == list(RHO)
    assert results["configuration"]["batch_size"] == 50
    assert results["data"]["train_samples"] + results["data"]["validation_samples"] == 397
    assert results["data"]["test_samples"] == 1400
    for run in results["runs"]:
        assert run["epoch"][0] == 0
        assert run["epoch"][-1] == (40 if run["method"] == "scratch" else 6)
        assert [seed["seed"] for seed in run["seeds"]] == [0, 1]
        for seed in run["seeds"]:
            assert {len(curve) for curve in seed["curves"].values()} == {len(run["epoch"])} == {4}
            assert seed["final"] == final(seed["curves"])
        ends = np.array([seed["curves"]["test_accuracy"][-1] for seed in run["seeds"]])
        assert run["summary"]["test_accuracy"]["mean"] == pytest.approx(ends.mean())
        error = ends.std(ddof=1) / np.sqrt(2)
        assert run["summary"]["test_accuracy"]["standard_error"] == pytest.approx(error)
    for name in ("figure6.png", "mechanism.png"):
        assert imread(finished / name).ndim == 3


def test_tables_say_what_the_results_say(finished, results):
    lines = (finished / "bad_minimum.md").read_text().splitlines()
    summary = runs_of(results, "monge_sam")[1]["summary"]
    row = next(line for line in lines if line.startswith("| M-SAM | 2 |"))
    for cell, name in zip(row.split(" | ")[2:], COLUMNS, strict=True):
        assert float(cell.split()[0]) == pytest.approx(summary[name]["mean"], abs=0.51)
    for claim in results["claims"]:
        assert claim["verdict"] is None
        assert f"| {claim['claim']} | {claim['measured']} |" in lines
    assert "No verdicts: preset smoke" in "".join(lines)
    assert "holds here?" not in "".join(lines)


def test_start_knows_its_images_and_little_else(results):
    for start in results["starts"]:
        assert start["train_accuracy"] == 100
        assert start["confusion_accuracy"] > 50
    scratch = runs_of(results, "scratch")[0]["summary"]
    assert scratch["train_accuracy"]["mean"] == 100
    gap = [s["test_accuracy"] for s in results["starts"]]
    assert np.mean(gap) < scratch["test_accuracy"]["mean"] - 10
    for run in results["runs"][1:]:
        assert [seed["curves"]["test_accuracy"][0] for seed in run["seeds"]] == gap


def test_confusion_set():
    rng = np.random.default_rng(0)
    originals = Batch(jnp.asarray(1 + rng.random((50, 8, 8, 3)), jnp.float32), jnp.arange(50) % 10)
    spoilt = confusion.confusion_set(originals, 10, 40, np.random.default_rng(1))
    assert spoilt.x.shape == (2000, 8, 8, 3)
    copies = np.asarray(spoilt.x).reshape(50, 40, 8, 8, 3)
    is_zero = copies == 0
    np.testing.assert_array_equal(copies, np.where(is_zero, 0, np.asarray(originals.x)[:, None]))
    zeroed = is_zero.mean(axis=(2, 3, 4))  # of the 192 entries of each copy
    assert zeroed.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / is_zero.size))
    assert zeroed.std() == pytest.approx(np.sqrt(0.09 / 192), rel=0.06)
    channels = is_zero.reshape(-1, 3)  # each channel of a pixel by itself
    assert np.mean(channels[:, 0] & channels[:, 1]) == pytest.approx(0.01, abs=0.001)
    labels = np.asarray(spoilt.y).reshape(50, 40)
    assert np.mean(labels == np.asarray(originals.y)[:, None]) == pytest.approx(0.1, abs=0.03)
    np.testing.assert_allclose(np.bincount(labels.ravel(), minlength=10) / 2000, 0.1, atol=0.03)


def test_confusion_set_is_decided_by_the_seed(monkeypatch):
    originals = Batch(jnp.ones((7, 5)), jnp.zeros(7, jnp.int32))
    first, other = (
        confusion.confusion_set(originals, 10, 3, np.random.default_rng(seed)) for seed in (0, 1)
    )
    monkeypatch.setattr(confusion, "CHUNK", 10)  # drawn in parts
    again = confusion.confusion_set(originals, 10, 3, np.random.default_rng(0))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("method", training.METRICS)
@pytest.mark.parametrize("rho", RHO)
def test_logged_perturbation_is_the_formula(results, splits, start, method, rho):
    rows = shuffled_rows(100, 50, np.random.default_rng((0, 3)))
    expected = []
    for row in rows:
        batch, params = Batch(splits.train.x[row], splits.train.y[row]), start["params"]
        loss, g = value_and_grad(params, batch)
        delta, n, length = perturbation(method, g, rho)
        perturbed = mean_loss(jax.tree.map(jnp.add, params, delta), batch)
        expected.append((loss, n, length, length / n, perturbed))
    run = next(run for run in runs_of(results, method) if run["rho"] in (None, rho))
    curves = run["seeds"][0]["curves"]
    names = ("batch_loss", "grad_norm", "perturbation_norm", "effective_radius", "perturbed_loss")
    for name, value in zip(names, np.mean(expected, axis=0), strict=True):
        assert curves[name][0] == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize("method", training.METRICS)
def test_steps_are_those_of_a_loop(trainer, splits, start, method):
    rows = shuffled_rows(100, 50, np.random.default_rng(5))
    state = trainer.begin(start, learning_rate=0.1, momentum=0.9)
    state, losses = trainer.epoch(state, splits.train, rows, method, 0.5)
    params, trace = start["params"], jax.tree.map(np.zeros_like, start["params"])
    expected = []
    for row in rows:
        batch = Batch(splits.train.x[row], splits.train.y[row])
        loss, g = value_and_grad(params, batch)
        expected.append(loss)
        at = jax.tree.map(jnp.add, params, perturbation(method, g, 0.5)[0])
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, value_and_grad(at, batch)[1])
        params = jax.tree.map(lambda p, m: p - 0.1 * m, params, trace)
    np.testing.assert_allclose(np.concatenate(losses), expected, rtol=2e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, params)


def test_largest_loss_of_a_batch_is_kept(trainer, splits, start, monkeypatch):
    fake = iter([[3.0, 1.0], [2.0, 5.0], [4.0, 2.0], [1.0, 0.5]])
    monkeypatch.setattr(
        trainer, "epoch", lambda state, *_: (state, [np.array([x]) for x in next(fake)])
    )
    rows, told = np.arange(100).reshape(2, 50), []
    curves = training.train(
        trainer,
        trainer.begin(start, 0.1, 0.0),
        splits,
        lambda: rows,
        [0, 2, 4],
        on_epoch=told.append,
    )
    assert told == [1.0, 5.0, 2.0, 0.5]  # of the last batch
    assert curves["peak_loss"][1:].tolist() == [5.0, 4.0]
    assert curves["peak_loss"][0] == pytest.approx(curves["train_loss"][0], rel=1e-5)


def test_evaluation_in_parts(trainer, splits, start, monkeypatch):
    z = logits(start["params"], splits.validation.x)
    right = np.mean(np.argmax(z, axis=-1) == splits.validation.y)
    loss = mean_loss(start["params"], splits.validation)
    for chunk in (10**6, 100):  # 297 images
        monkeypatch.setattr(training, "LARGEST_CHUNK", chunk)
        measured = trainer.measure(start, splits.validation)
        assert measured == (pytest.approx(float(loss), rel=1e-5), pytest.approx(100 * right))


def test_images_are_divided(splits):
    x = np.concatenate([part.x for part in splits]).reshape(1797, -1)
    assert [len(part.y) for part in splits] == [100, 297, 1400]
    _, counts = np.unique(x, axis=0, return_counts=True)
    assert counts.max() == 1
    assert not np.array_equal(splits.train.y, Source(SMALL).splits(1).train.y)


def test_interrupted_run_goes_on(finished, results, tmp_path, monkeypatch):
    """The second seed is not begun when the run ends; half of the first one's cells are kept."""
    options = dataclasses.replace(SMALL, output=tmp_path)
    train, calls = training.train, itertools.count()

    def train_thrice(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", train_thrice)
        with pytest.raises(KeyboardInterrupt):
            running.run(options)
    assert len(list((tmp_path / "finished").iterdir())) == 4
    trained = []
    monkeypatch.setattr(
        training, "train", lambda *args, **kw: trained.append(kw["rho"]) or train(*args, **kw)
    )
    running.run(options)
    assert len(trained) == 2 * 6 - 3
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["configuration"].pop("output") == str(tmp_path)
    assert again == results | {
        "configuration": {k: x for k, x in results["configuration"].items() if k != "output"}
    }
    assert (finished / "bad_minimum.md").read_text() == (tmp_path / "bad_minimum.md").read_text()


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({}, []),
        ({"seeds": 1}, []),
        ({"rho": (0.1, 0.5, 2.0)}, [("sam", 0.5), ("monge_sam", 0.5)]),
        ({"learning_rate": 0.02, "rho": (0.1,)}, ["scratch", "sgd", "sam", "monge_sam"]),
        ({"copies": 6}, ["minimum"]),
        ({"seed": 2}, ["minimum"]),
        ({"train_size": 101}, ["minimum"]),
    ],
)
def test_what_is_kept_is_not_made_again(finished, tmp_path, monkeypatch, changes, made):
    (tmp_path / "finished").symlink_to(finished / "finished")
    asked = []

    def make(name):
        def raise_in_its_place(*args, **kwargs):
            asked.append(name)
            raise KeyboardInterrupt

        return raise_in_its_place

    def curves(self, cell, seed, *args):
        asked.append(cell.method if "learning_rate" in changes else (cell.method, cell.rho))
        return keep(next((finished / "finished").glob(f"sgd_seed{seed}_*")), None)

    monkeypatch.setattr(training, "find_bad_minimum", make("minimum"))
    monkeypatch.setattr(running._Comparison, "_curves", curves)
    keep = kept.kept
    monkeypatch.setattr(kept, "kept", lambda path, fn: keep(path, fn) if path.exists() else fn())
    options = dataclasses.replace(SMALL, **{"seeds": 1, "output": tmp_path} | changes)
    if made == ["minimum"]:
        with pytest.raises(KeyboardInterrupt):
            running.compare(options)
    else:
        running.compare(options)
    assert asked == made


def test_unfinished_file_is_no_result(tmp_path):
    def fail():
        raise KeyboardInterrupt

    tree = {"a": {"b": np.float32(0.1)}, "c": np.arange(3)}
    path = tmp_path / "folder" / "name.npz"
    with pytest.raises(KeyboardInterrupt):
        kept.kept(path, fail)
    assert not path.exists()
    for made in (kept.kept(path, lambda: tree), kept.kept(path, fail)):
        assert made["a"]["b"] == np.float32(0.1)
        np.testing.assert_array_equal(made["c"], np.arange(3))
    assert [file.name for file in path.parent.iterdir()] == ["name.npz"]


def small_resnet():
    images = jax.random.normal(jax.random.key(0), (20, 6, 6))
    samples = Batch(images, jnp.arange(20) % 10)
    recipe = dataclasses.replace(SMALL.recipe, model="resnet", width=2)
    return training.Trainer(recipe, samples), samples


@pytest.mark.slow
def test_convolutions_are_not_in_a_loop():
    trainer, samples = small_resnet()
    assert not trainer._scans
    rows = np.arange(20).reshape(2, 10)
    variables = trainer.fresh(0)
    ends = []
    for scans in (False, True):
        trainer._scans = scans
        state = trainer.begin(variables, 0.1, 0.9)
        trainer._advance.clear_cache()
        part = rows if scans else rows[:1]
        lowered = trainer._advance.lower(state, samples, part, 0.1, method="sam").as_text()
        assert lowered.count("stablehlo.while") == scans
        state, losses = trainer.epoch(state, samples, rows, "sam", 0.1)
        assert len(np.concatenate(losses)) == 2
        ends.append(training.variables_of(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *ends)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), variables, ends[0])
    assert min(jax.tree.leaves(moved["batch_stats"])) > 0
    assert trainer.measure(ends[0], samples)[0] != trainer.measure(variables, samples)[0]
    assert trainer.probe(ends[0], samples, rows, "sam", 0.1)["perturbation_norm"] == pytest.approx(
        0.1
    )


@pytest.mark.parametrize(("size", "params"), [(32, 11_173_962), (8, 11_173_962)])
def test_resnet18(size, params):
    model = training.make_model(PRESETS["paper"])
    x = jnp.zeros((3, size, size, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == params
    assert jax.eval_shape(model.apply, variables, x).shape == (3, 10)


def test_minimum_that_is_not_reached(trainer, splits):
    recipe = dataclasses.replace(
        SMALL.recipe, confusion_epochs=1, fitting_epochs=2, fitting_learning_rate=0.0
    )
    with pytest.raises(InputError, match=r"fitted after 2 epochs.*--fitting-epochs"):
        training.find_bad_minimum(trainer, recipe, splits, 0, lambda loss: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--copies", "0"], "--copies must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--rho", "-1"], "--rho needs finite positive numbers, got (-1.0,)"),
        (["--rho", "1", "0.5"], "--rho needs radii that increase"),
        (["--rho", "1", "1"], "--rho has a number twice: 1.0 1.0"),
        (["--learning-rate", "nan"], "--learning-rate must be finite"),
        (["--batch-size", "501"], "--batch-size 501 is larger than --train-size 500"),
        (["--evaluations", "9", "--epochs", "8"], "--evaluations 9 are more than --epochs 8"),
        (["--preset", "paper"], "--data cifar10 needs --data-dir"),
        (["--data-dir", "somewhere"], "--data-dir is for --data cifar10"),
        (["--preset", "paper", "--data-dir", "nowhere"], "no file data_batch_1"),
        (["--train-size", "1600"], "leave nothing to test on"),
        (["--train-size", "1798"], "leave nothing to test on"),
    ],
)
def test_options_that_cannot_be_used(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        __main__.main(["bad-minimum", *options, "--output", str(tmp_path)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_options_replace_those_of_the_preset():
    for name, preset in PRESETS.items():
        assert BadMinimum(preset=name).recipe == preset
    given = BadMinimum(preset="paper", width=8, rho=(1.0,), momentum=0.5).recipe
    assert given == dataclasses.replace(PRESETS["paper"], width=8, rho=(1.0,), momentum=0.5)
    assert PRESETS["paper"].rho == (0.005, 0.01, 0.03, 0.05)
    assert (PRESETS["paper"].batch_size, PRESETS["paper"].learning_rate) == (128, 0.001)


def test_best_epoch_is_chosen_on_validation_data():
    curves = {
        "epoch": [0, 5, 10, 15],
        "validation_accuracy": [10.0, 30.0, 30.0, 20.0],
        "test_accuracy": [1.0, 2.0, 3.0, 4.0],
        "train_accuracy": [100.0, 40.0, 60.0, 99.0],
        "peak_loss": [0.1, 0.9, 0.3, 0.2],
    }
    assert final(curves) == {
        "test_accuracy": 4.0,
        "validation_accuracy": 20.0,
        "train_accuracy": 99.0,
        "best_epoch": 5,
        "best_test_accuracy": 2.0,
        "lowest_train_accuracy": 40.0,
        "peak_loss": 0.9,
    }


def fake_results(sgd, sam, monge_sam, lowest_sam, lowest_monge, scratch=70, seeds=3):
    """Test accuracies and lowest training accuracies by radius, with a little spread over seeds."""

    def run(method, rho, test, lowest):
        of_method = {"scratch": 1, "sgd": 2, "sam": 3, "monge_sam": 4}[method]
        spread = [(of_method + (rho or 0) / 10) * x for x in (0.01, 0.03, -0.04)][:seeds]
        finals = [
            {
                "test_accuracy": test + x,
                "validation_accuracy": test,
                "lowest_train_accuracy": lowest + x,
                "train_accuracy": 100.0 if lowest > 50 else 60.0,
            }
            for x in spread
        ]
        curves = {
            "grad_norm": [1.0, 3.0, 0.1],
            "perturbation_norm": [0.7, 0.4, 0.9],
            "test_accuracy": [40.0, test, test],
        }
        entries = [{"final": f, "curves": copy.deepcopy(curves)} for f in finals]
        for number, entry in enumerate(entries):
            entry["curves"]["perturbation_norm"][1] += 0.01 * number
        return {"method": method, "rho": rho, "seeds": entries}

    radii = [0.1, 1.0, 2.0]
    runs = [run("scratch", None, scratch, 5.0), run("sgd", None, sgd, 100.0)]
    for i, rho in enumerate(radii):
        runs.append(run("sam", rho, sam[i], lowest_sam[i]))
        runs.append(run("monge_sam", rho, monge_sam[i], lowest_monge[i]))
    return {"configuration": {"rho": radii}, "runs": runs}


AS_THE_PAPER = fake_results(50, (51, 56, 65), (51, 56, 58), (100, 100, 40), (100, 100, 100))
OTHERWISE = fake_results(60, (55, 50, 20), (57, 49, 40), (100, 90, 20), (100, 100, 70), 30)
STAYING = fake_results(50, (51, 52, 53), (51, 52, 53), (100, 100, 100), (100, 100, 100))


@pytest.mark.parametrize(
    ("results", "verdicts"),
    [
        (
            AS_THE_PAPER,
            ["yes", "up to rho = 1", "yes", "yes", "yes", "yes", "yes", "yes", "yes", "yes"],
        ),
        (
            OTHERWISE,
            [
                *["no"] * 5,
                "at rho = 1, 2",
                "at rho = 1; goes less far at rho = 2",
                "yes at 1; no at 2",
                "yes",
                "yes",
            ],
        ),
        (
            STAYING,
            [
                *["yes"] * 5,
                "no",
                "cannot be told: SAM stays too",
                "cannot be told: SAM stays",
                "yes",
                "yes",
            ],
        ),
    ],
)
def test_verdicts(results, verdicts):
    assert [claim["verdict"] for claim in bad_minimum_claims.claims(results)] == verdicts


def test_one_seed_tells_nothing_of_differences():
    results = fake_results(50, (51, 56, 65), (51, 56, 58), (100,) * 3, (100,) * 3, seeds=1)
    claims = bad_minimum_claims.claims(results)
    assert {claims[i]["verdict"] for i in (0, 2, 3, 9)} == {"cannot be told"}


def test_figures_draw_means_and_errors(results):
    figure = plotting_bad_minimum.accuracy_figure(results)
    panels = np.array(figure.axes).reshape(2, 2)
    assert [axes.get_title() for axes in panels[0]] == [r"$\rho$ = 0.1", r"$\rho$ = 2"]
    run = next(run for run in runs_of(results, "monge_sam") if run["rho"] == 2)
    curves = np.array([seed["curves"]["train_accuracy"] for seed in run["seeds"]])
    lines = {line.get_label(): line for line in panels[1, 1].lines}
    assert set(lines) == {"SGD", "SAM", "M-SAM", "SGD from scratch"}
    assert check_column(figure) == {"SGD", "SAM", "M-SAM"}
    np.testing.assert_allclose(lines["M-SAM"].get_ydata(), curves.mean(axis=0))
    figure = plotting_bad_minimum.mechanism_figure(results)
    panels = np.array(figure.axes).reshape(4, 2)
    lengths = np.array([seed["curves"]["perturbation_norm"] for seed in run["seeds"]])
    assert check_column(figure) == {"SGD", "SAM", "M-SAM"}
    drawn = [{line.get_label() for line in axes.lines} for axes in panels[:, 1]]
    assert drawn == [{"SGD", "SAM", "M-SAM"}, *3 * [{"SAM", "M-SAM"}]]  # SGD does not perturb
    lines = {line.get_label(): line for line in panels[1, 1].lines}
    np.testing.assert_allclose(lines["M-SAM"].get_ydata(), lengths.mean(axis=0) / 2)


def test_many_radii_are_drawn_in_rows(results):
    several = copy.deepcopy(results)
    radii = several["configuration"]["rho"] = [0.1, 0.5, 2.0, 4.0, 6.0]
    without = [run for run in several["runs"] if run["rho"] is None]
    perturbed = [run for run in several["runs"] if run["rho"] == 2.0]
    several["runs"] = without + [run | {"rho": rho} for rho in radii for run in perturbed]
    for draw, quantities in (
        (plotting_bad_minimum.accuracy_figure, 2),
        (plotting_bad_minimum.mechanism_figure, 4),
    ):
        figure = draw(several)
        assert check_column(figure) == {"SGD", "SAM", "M-SAM"}
        assert len(figure.axes) == quantities * len(radii)
        titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
        assert titles == [rf"$\rho$ = {rho:g}" for rho in radii]
        limits = {axes.get_ylim() for axes in figure.axes}
        assert len(limits) <= quantities  # those of a quantity are the same
        below = [axes for axes in figure.axes if axes.get_xlabel()]
        assert [axes.get_subplotspec().colspan.start for axes in below] == [2, 0, 1]
        assert all(axes.xaxis.get_tick_params()["labelbottom"] for axes in below)


def test_diverged_run_is_drawn_and_told(results):
    diverged = copy.deepcopy(results)
    for run in runs_of(diverged, "sam"):
        for name in ("perturbed_loss", "grad_norm", "perturbation_norm", "peak_loss"):
            run["seeds"][0]["curves"][name][1:] = [None] * 3
        run["summary"]["peak_loss"] = {"mean": None, "standard_error": None}
    plotting_bad_minimum.mechanism_figure(diverged).canvas.draw()
    rows = [line for line in running.markdown(diverged).splitlines() if line.startswith("| SAM |")]
    assert len(rows) == 2
    assert all(row.endswith("| diverged |") for row in rows)
