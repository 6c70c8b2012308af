"""`monge-sam clip`: pairs, towers, choices, tables, figure 7, and the command."""

import json
import math
import re

import jax
import numpy as np
import optax
import pytest
from looks import check_column
from matplotlib.image import imread
from PIL import Image

from monge_sam_jax import __main__
from monge_sam_jax.experiments.clip import data as clip_data
from monge_sam_jax.experiments.clip import report as clip_report
from monge_sam_jax.experiments.clip import run as clip_study
from monge_sam_jax.experiments.clip import scenes as clip_scenes
from monge_sam_jax.experiments.clip import training
from monge_sam_jax.experiments.clip.latents import without_first_component
from monge_sam_jax.experiments.clip.model import batch_loss, embed
from monge_sam_jax.experiments.clip.options import PRESETS, Clip
from monge_sam_jax.experiments.clip.plots import Panel, figure_7, mechanism_figure
from monge_sam_jax.experiments.clip.training import Cell
from monge_sam_jax.experiments.common.errors import InputError

SMOKE = Clip(preset="smoke", sgd_rates=(0.01,), rho=(0.1,))
PLAIN = clip_scenes.Distribution(
    templates=("{a} {relation} {b}",),
    nouns=("a {size} {colour} {shape}",),
    synonyms=0.0,
    background=0.0,
    noise=0.0,
    wrong=0.0,
)


@pytest.fixture(scope="module", autouse=True)
def quick_preset():
    """The preset `smoke`, with as little training as the tests need."""
    quick = PRESETS["smoke"]._replace(
        pretraining_pairs=512, pairs=128, evaluation_pairs=64, pretraining_steps=150
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "smoke", quick._replace(steps=6, evaluations=2))
        yield


def scenes(distribution, count=40, side=32, seed=0):
    return clip_scenes.generate(distribution, count, side, np.random.default_rng(seed))


# Generated pairs


def test_images_show_what_captions_say():
    pairs = scenes(PLAIN)
    rgb = dict(zip(clip_scenes.COLOURS, clip_scenes._RGB, strict=True))
    areas = {}
    for image, caption, label in zip(*pairs, strict=True):
        pattern = r"a (\w+) (\w+) (\w+) (.*) a (\w+) (\w+) (\w+)"
        size, colour, shape, relation, _, other, _ = re.fullmatch(pattern, caption).groups()
        assert label == colour
        if colour == other:
            continue
        (y, x), (v, u) = (
            np.argwhere(np.all(np.isclose(image, rgb[name]), axis=-1)).mean(axis=0)
            for name in (colour, other)
        )
        assert {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[relation]
        area = np.sum(np.all(np.isclose(image, rgb[colour]), axis=-1))
        areas.setdefault(shape, {}).setdefault(size, []).append(area)
    for sizes in areas.values():
        assert max(sizes["small"]) < min(sizes["large"])
    assert len(areas) == 4


def test_templates_agree_on_the_scene():
    said = scenes(PLAIN).captions
    inverse = scenes(PLAIN._replace(templates=("{b} {inverse} {a}",))).captions
    opposite = {"left of": "right of", "above": "below"}
    opposite |= {b: a for a, b in opposite.items()}
    for one, other in zip(said, inverse, strict=True):
        a, relation, b = re.fullmatch(r"(a \w+ \w+ \w+) (.*) (a \w+ \w+ \w+)", one).groups()
        assert other == f"{b} {opposite[relation]} {a}"


def test_pairs_depend_on_the_seed_alone():
    one, same, other = (scenes(clip_scenes.FINE_TUNING, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.images, same.images)
    assert one.captions == same.captions != other.captions
    size = PRESETS["smoke"]
    corpus = clip_data.generated(size, 16, 0)
    assert not np.array_equal(corpus.val.words, corpus.test.words)


def test_distributions_differ_as_they_say():
    clean = scenes(PLAIN, count=2000, side=4)
    synonyms = scenes(PLAIN._replace(synonyms=1.0), count=2000, side=4)
    names = {*clip_scenes.SHAPES, *clip_scenes.COLOURS, *clip_scenes.SIZES}
    assert not names & set(" ".join(synonyms.captions).split())
    wrong = scenes(PLAIN._replace(wrong=0.3), count=2000, side=4)
    told = np.array(clean.captions) != np.array(wrong.captions)
    assert 0.25 < np.mean(told) < 0.33
    np.testing.assert_array_equal(clean.labels, wrong.labels)
    noisy = scenes(PLAIN._replace(noise=0.01), count=2000, side=4)
    inner = (clean.images > 0.05) & (clean.images < 0.95)
    assert np.std((noisy.images - clean.images)[inner]) == pytest.approx(0.01, rel=0.05)
    assert clip_scenes.FINE_TUNING.noise > clip_scenes.EVALUATION.noise > 0
    assert set(clip_scenes.EVALUATION.templates) - set(clip_scenes.PRETRAINING.templates)


# Pairs of one's own


def write_folder(folder, kind, splits):
    folder.mkdir()
    for name, pairs in splits.items():
        pixels = np.round(255 * pairs.images).astype(np.uint8)
        if kind == "npz":
            arrays = {"image": pixels, "caption": np.array(pairs.captions), "label": pairs.labels}
            np.savez(folder / f"{name}.npz", **arrays)
            continue
        lines = []
        for i, (image, caption, label) in enumerate(
            zip(pixels, pairs.captions, pairs.labels, strict=True)
        ):
            Image.fromarray(image).save(folder / f"{name}{i}.png")
            lines.append({"image": f"{name}{i}.png", "caption": caption, "label": str(label)})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("kind", ["jsonl", "npz"])
def test_pairs_of_a_folder(tmp_path, kind):
    splits = {name: scenes(PLAIN, 6, 8, i) for i, name in enumerate(clip_data.SPLITS)}
    write_folder(tmp_path / "pairs", kind, splits)
    corpus = clip_data.from_folder(tmp_path / "pairs", 8, fewest=6)
    direct = clip_data._corpus({**splits, "pretrain": splits["train"]})
    np.testing.assert_array_equal(corpus.labels, splits["test"].labels)
    assert corpus.vocabulary == direct.vocabulary
    for found, expected in zip(corpus[:4], direct[:4], strict=True):
        np.testing.assert_array_equal(found.words, expected.words)
        np.testing.assert_allclose(found.images, expected.images, atol=0.5 / 255 + 1e-6)
    assert clip_data.from_folder(tmp_path / "pairs", 4, fewest=6).test.images.shape == (6, 4, 4, 3)


def test_words_are_those_of_training(tmp_path):
    image = np.zeros((2, 4, 4), np.uint8)
    captions = {
        "pretrain": ["It's a CAT", "a cat"],
        "train": ["a dog", "a dog"],
        "val": ["dog a " * 20, ""],
        "test": ["a fish", "cat"],
    }
    for name, texts in captions.items():
        np.savez(tmp_path / f"{name}.npz", image=image, caption=np.array(texts))
    corpus = clip_data.from_folder(tmp_path, 4, fewest=2)
    assert corpus.labels is None
    numbers = {"a": 2, "dog": 4, "cat": 3}  # 0 is padding, 1 unknown; by count, then by name
    cut = clip_data.WORDS // 2 * [numbers["dog"], numbers["a"]]
    np.testing.assert_array_equal(corpus.val.words, [cut, [0] * clip_data.WORDS])
    np.testing.assert_array_equal(corpus.test.words[:, :3], [[2, 1, 0], [3, 0, 0]])
    assert corpus.cut == 1
    assert clip_data.unknown_words(corpus.test) == pytest.approx(1 / 3)


def test_pictures_of_a_folder_are_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)  # black, and transparent on the left
    pixels[:, 2:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in clip_data.SPLITS:
        (tmp_path / f"{name}.jsonl").write_text('{"image": "a.png", "caption": "a"}')
    images = np.asarray(clip_data.from_folder(tmp_path, 4, fewest=1).test.images)
    np.testing.assert_array_equal(images[0, :, :, 0], np.repeat([[1, 1, 0, 0]], 4, axis=0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno chunk at all")  # no OSError in Pillow
    with pytest.raises(InputError, match="line 1: no image can be read"):
        clip_data.from_folder(tmp_path, 4, fewest=1)


def good(count=3):
    return {"image": np.zeros((count, 4, 4, 3)), "caption": np.array(["word"] * count)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"expected val.jsonl or val.npz, found .*train.npz"),
        ("not json", r"val.jsonl: line 1 is no JSON"),
        ('{"image": "a.png"}', r"line 1: expected an object with texts image and caption, found"),
        ('{"image": "a.png", "caption": "a"}', r"line 1: no image can be read"),
        ("", r"val.jsonl: .*no pairs"),
        (b"PK\3\4broken", r"cannot be read as an .npz file"),
        ({"image": good()["image"]}, r"no array caption; found image \(3, 4, 4, 3\), "),
        (good() | {"image": np.full((3, 4, 4), 2.0)}, r"found \(3, 4, 4\) in float64 from 2"),
        (good() | {"image": np.zeros((3, 4, 4, 2))}, r"expected image .* found \(3, 4, 4, 2\)"),
        (good() | {"caption": np.arange(3)}, r"expected caption \(3,\) of texts, found"),
        (good() | {"caption": np.array(["a"])}, r"expected caption \(3,\) of texts, found \(1,\)"),
        (good() | {"label": np.zeros(3)}, r"expected label \(3,\) of integers or texts"),
        (good(2), r"val needs at least 3 pairs, found 2"),
    ],
)
def test_pairs_that_cannot_be_used(tmp_path, content, message):
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", **good())
    if isinstance(content, dict):
        np.savez(tmp_path / "val.npz", **content)
    elif isinstance(content, bytes):
        (tmp_path / "val.npz").write_bytes(content)
    elif content is not None:
        (tmp_path / "val.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        clip_data.from_folder(tmp_path, 4, fewest=3)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="found no such folder"):
        clip_data.from_folder(tmp_path / "missing", 4, fewest=3)


# Training


@pytest.fixture(scope="module")
def corpus():
    return clip_data.generated(SMOKE.size, SMOKE.image_size, 0)


@pytest.fixture(scope="module")
def start(corpus):
    return training.pretrain(corpus, SMOKE, 0)


@pytest.fixture(scope="module")
def grad_fn():
    return jax.jit(jax.value_and_grad(batch_loss))


def by_hand(cell, base, params, pairs, rows, grad_fn):
    """Steps written out; params, and the means of what is logged."""
    name = base if cell.method in ("sam", "monge_sam") else cell.method
    optimizer = {"sgd": optax.sgd, "adam": optax.adam}[name](cell.learning_rate)
    state, logs = optimizer.init(params), []
    for row in rows:
        batch = clip_data.Pairs(pairs.images[row], pairs.words[row])
        loss, g = grad_fn(params, batch)
        n = math.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(g)))
        length = {"sam": cell.rho, "monge_sam": (cell.rho or 0) / math.sqrt(1 + n * n)}.get(
            cell.method, 0.0
        )
        perturbed = jax.tree.map(lambda p, x, r=length / n: p + r * x, params, g)
        perturbed_loss, g = grad_fn(perturbed, batch)
        logs.append((loss, perturbed_loss, n, length, length / n))
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, np.mean(np.array(logs, np.float64), axis=0)


@pytest.mark.parametrize(
    ("cell", "base"),
    [
        pytest.param(Cell("sgd", 0.01), "sgd", marks=pytest.mark.slow),
        pytest.param(Cell("adam", 1e-3), "sgd", marks=pytest.mark.slow),
        pytest.param(Cell("sam", 0.01, 0.1), "sgd", marks=pytest.mark.slow),
        (Cell("monge_sam", 0.01, 0.1), "sgd"),
        (Cell("monge_sam", 1e-3, 0.3), "adam"),
    ],
)
def test_steps_are_those_of_a_loop(cell, base, corpus, start, grad_fn):
    options = Clip(preset="smoke", base=base)
    *_, middle, _ = training.moments(cell, start, corpus, options, 0)
    rows = training.batch_rows(len(corpus.train.words), 32, 6, np.random.default_rng((0, 11)))
    expected, logs = by_hand(cell, base, start, corpus.train, rows[:3], grad_fn)
    assert middle.step == 3
    np.testing.assert_allclose(list(middle.logged.values()), logs, rtol=2e-4, atol=1e-6)
    # Where the gradient is zero Adam's steps are rounding errors; the embeddings do not see them.
    for found, wanted in zip(
        *(embed(p, corpus.val) for p in (middle.params, expected)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-4)


def test_batches_are_of_whole_epochs():
    rows = np.asarray(training.batch_rows(10, 4, 5, np.random.default_rng(0)))
    assert rows.shape == (5, 4)
    for epoch in (rows[:2], rows[2:4]):
        assert len(np.unique(epoch)) == 8
    assert not np.array_equal(rows[:2], rows[2:4])


def test_towers_learn_which_caption_is_whose(corpus, start):
    found = training.evaluate(start, corpus.pretrain, batch_size=32, k=8)
    assert found.loss < 0.7 * math.log(32)


def test_evaluation_is_of_whole_batches(corpus, start):
    pairs = jax.tree.map(lambda x: x[:50], corpus.test)
    found = training.evaluate(start, pairs, batch_size=16, k=4)
    image, text, scale = (np.asarray(x, np.float64) for x in embed(start, pairs))
    image, text = (x[:48] / np.linalg.norm(x[:48], axis=1, keepdims=True) for x in (image, text))
    losses = []
    for i in range(0, 48, 16):
        logits = scale * image[i : i + 16] @ text[i : i + 16].T
        for direction in (logits, logits.T):
            losses.append(np.mean(np.log(np.sum(np.exp(direction), 1)) - np.diag(direction)))
    assert float(found.loss) == pytest.approx(np.mean(losses), rel=1e-5)
    nearest = []
    for x in (image, text):
        cosines = x @ x.T - 9 * np.eye(48)
        nearest.append([set(row) for row in np.argsort(-cosines, axis=1)[:, :4]])
    shared = np.mean([len(a & b) / 4 for a, b in zip(*nearest, strict=True)])
    assert float(found.alignment) == pytest.approx(shared, abs=0.01)


def test_grid_of_sam_and_monge_sam_is_one():
    options = Clip(base="adam", sgd_rates=(0.1,), adam_rates=(0.2, 0.3), rho=(1.0, 2.0))
    cells = training.grid(options)
    assert [c for c in cells if c.rho is None] == [
        Cell("sgd", 0.1),
        Cell("adam", 0.2),
        Cell("adam", 0.3),
    ]
    for method in ("sam", "monge_sam"):
        own = {(c.learning_rate, c.rho) for c in cells if c.method == method}
        assert own == {(rate, rho) for rate in (0.2, 0.3) for rho in (1.0, 2.0)}


# Choices and tables


def run_of(val_alignment, val_loss, test_alignment, test_loss):
    return {
        "seed": 0,
        "steps": [0, 10, 20],
        "val_alignment": val_alignment,
        "val_loss": val_loss,
        "test_alignment": test_alignment,
        "test_loss": test_loss,
    }


def cell_of(method, rate, rho, *runs):
    cell = {"method": method, "learning_rate": rate, "rho": rho, "seeds": list(runs)}
    return clip_report.summarise_cell(cell, math.log(128))


def test_steps_are_chosen_on_the_validation_set():
    val, losses = [0.3, 0.5, None], [1.0, 2.0, 0.5]
    cell = cell_of("sam", 0.1, 0.1, run_of(val, losses, [0.9, 0.2, 0.8], [0.1, 0.2, 0.7]))
    (best,) = cell["best"]
    assert (best["alignment_step"], best["loss_step"]) == (10, 20)
    assert (best["alignment"], best["loss"]) == (0.2, 0.7)
    assert (best["final_alignment"], best["final_loss"]) == (0.8, 0.7)
    early = run_of([0.6, 0.5, 0.4], [0.4, 0.5, 0.6], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    (best,) = cell_of("sam", 0.1, 0.1, early)["best"]
    assert (best["alignment_step"], best["loss_step"], best["alignment"]) == (0, 0, 0.1)


def test_cells_are_chosen_on_the_validation_set():
    loss = [1.0, 1.0, 1.0]
    good_on_val = cell_of("sam", 0.1, 1.0, run_of([0.1, 0.5, 0.1], loss, [0.1, 0.2, 0.1], loss))
    good_on_test = cell_of("sam", 0.2, 1.0, run_of([0.1, 0.4, 0.1], loss, [0.1, 0.9, 0.1], loss))
    assert clip_report.choose([good_on_test, good_on_val], "sam") is good_on_val


@pytest.mark.parametrize(
    ("final", "diverged"),
    [(4.6, 0), (4.62, 1), (4.852, 1), (5.5, 1), (None, 1), (0.6, 0)],
)
def test_divergence_is_a_loss_of_chance(final, diverged):
    run = run_of([0.3, 0.2, 0.1], [1.0, 4.9, final], [0.3] * 3, [1.0] * 3)
    assert cell_of("sam", 0.1, 0.1, run)["diverged"] == diverged
    assert clip_report.has_diverged(cell_of("sam", 0.1, 0.1, run, run)) == bool(diverged)


def last_difference(method, rho):
    """Between alignments of the last seed and the first, so that differences have errors."""
    return 0.02 + 0.001 * len(method) + 0.001 * (rho or 0)


def study_of(alignments, finals, last=last_difference):
    """Results of two rates, two radii and three seeds, from alignments and final losses."""
    cells = []
    for method, rate, rho in [
        ("sgd", 0.1, None),
        ("adam", 0.1, None),
        *(
            (m, rate, rho)
            for m in ("sam", "monge_sam")
            for rate in (0.1, 0.2)
            for rho in (1.0, 2.0)
        ),
    ]:
        best = alignments[method] + (0.01 if rho == 2.0 else 0) - (0.05 if rate == 0.2 else 0)
        final = finals.get((method, rate, rho), 1.0)
        runs = [
            run_of(
                [0.3, best + d, 0.1], [2.0, 1.5, final], [0.3 + d, best + d, 0.1], [2, 1.5, final]
            )
            for d in (0.0, 0.01, last(method, rho))
        ]
        cells.append(cell_of(method, rate, rho, *runs))
    return {
        "configuration": {"base": "sgd", "seeds": 3, "data": None},
        "chance": {"alignment": 0.016, "loss": math.log(128)},
        "cells": cells,
        "claims": clip_report.claims(cells, 0.99),
    }


ORDERED = {"sgd": 0.35, "adam": 0.4, "sam": 0.45, "monge_sam": 0.5}


def test_tables_have_the_layout_of_the_paper():
    results = study_of(ORDERED, {("sam", 0.2, 2.0): 4.852, ("monge_sam", 0.1, 1.0): 0.5})
    text = clip_report.markdown(results)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert rows[0] == ["", "None", "SGD", "Adam", "SAM", "M-SAM"]
    chosen = [("sgd", None), ("sgd", None), ("adam", None), ("sam", 2), ("monge_sam", 2)]
    spreads = [(0, 0.01, last_difference(*cell)) for cell in chosen]
    means = (0.3, 0.35, 0.4, 0.46, 0.51)
    expected = [
        f"{mean + np.mean(spread):.3f} ± {np.std(spread, ddof=1) / np.sqrt(3):.3f}"
        for mean, spread in zip(means, spreads, strict=True)
    ]
    assert rows[1] == ["S_kNN", *expected]
    assert rows[2][0].startswith("paper")
    assert rows[2][1:] == ["0.351", "0.387", "0.388", "0.405", "0.446"]
    assert rows[3] == ["", "0.1", "0.2"]
    assert "rho = 2," in text  # the smallest at which SAM diverges
    assert rows[4] == ["SAM", "1.000 ± 0", "4.852 ± 0 (3/3 diverged)"]
    assert rows[5] == ["M-SAM", "1.000 ± 0", "1.000 ± 0"]
    table_3 = rows[6 : 6 + 2 + 10]
    assert all(len(row) == 6 for row in table_3)
    assert table_3[1][:4] == ["None", "-", "-", expected[0]]
    assert [row[0] for row in table_3[2:]] == ["SGD", "Adam", *["SAM"] * 4, *["M-SAM"] * 4]
    bold = [row[:3] for row in table_3 if "**" in row[3]]
    assert bold == [
        ["SGD", "0.1", "-"],
        ["Adam", "0.1", "-"],
        ["SAM", "0.1", "2"],
        ["M-SAM", "0.1", "2"],
    ]
    assert all("▲" in row[3] for row in table_3[2:])


def verdicts(results):
    return {claim["claim"]: claim["verdict"] for claim in results["claims"]}


def test_claims_hold_where_they_do():
    found = verdicts(study_of(ORDERED, {("sam", 0.2, 2.0): 4.852}))
    assert set(found.values()) == {"holds"}
    tied = verdicts(study_of(ORDERED | {"adam": 0.46}, {}, last=lambda *_: 0.02))
    assert "alignment: Adam < SAM" not in tied  # the same runs
    assert tied["SAM diverges in cells of the grid where M-SAM does not"] == "does not hold"
    swapped = verdicts(study_of(ORDERED | {"sam": 0.6}, {}))
    assert swapped["alignment: SAM < M-SAM"] == "does not hold: the other way round"
    both = {("sam", 0.2, 2.0): 4.852, ("monge_sam", 0.1, 1.0): 4.852}
    assert "the reverse" in str(verdicts(study_of(ORDERED, both)))


@pytest.mark.parametrize(
    ("high", "verdict"),
    [
        ([0.2, 0.2, 0.35], "not resolved"),  # 0.05 +- 0.029
        ([0.25, 0.25, 0.4], "holds"),  # 0.1 +- 0.029
        ([0.05, 0.05, 0.2], "does not hold: the other way round"),  # -0.1 +- 0.029
        ([0.2, 0.2, math.nan], "cannot be told"),
        ([0.5, 0.75, 1.0], "cannot be told"),  # 0.25 of all seeds, which tells of no error
    ],
)
def test_differences_are_taken_seed_by_seed(high, verdict):
    low = [0.25, 0.5, 0.75] if high[0] == 0.5 else [0.1, 0.2, 0.3]
    found = clip_report._compare("", low, high)
    assert found["verdict"] == verdict
    assert not re.search(r"± 0\.?0*$", found["evidence"])


# Figure 7


def test_first_component_is_taken_out():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 20, 5))
    text[:, 0] += 4
    stacked = np.concatenate([image, text])
    stacked /= np.linalg.norm(stacked, axis=1, keepdims=True)
    mean = stacked.mean(axis=0)
    _, s, vt = np.linalg.svd(stacked - mean, full_matrices=False)
    scores = (stacked - mean) @ vt[0]
    joint = without_first_component(image, text)
    np.testing.assert_allclose(joint.points, stacked - np.outer(scores, vt[0]), atol=1e-12)
    modality = np.repeat([0, 1], 20)
    assert joint.correlation == pytest.approx(abs(np.corrcoef(scores, modality)[0, 1]))
    assert joint.explained == pytest.approx(s[0] ** 2 / np.sum(s**2))
    assert 0.5 < joint.correlation < 1


def test_constant_embeddings_have_no_correlation():
    joint = without_first_component(np.ones((3, 2)), np.ones((3, 2)))
    assert math.isnan(joint.correlation)
    np.testing.assert_allclose(joint.points, np.sqrt(0.5))


def test_classes_have_colours_of_their_own():
    labels = np.array(["0", "1", "red", "some"])  # Matplotlib takes "1" for white
    drawn = figure_7([Panel("", np.zeros((8, 2)), labels, 0.5, 0.5)])
    colours = [tuple(colour) for colour in drawn.axes[0].collections[0].get_facecolor()]
    assert len(set(colours)) == 4
    assert (1.0, 1.0, 1.0) not in [colour[:3] for colour in colours]
    assert colours[2][:3] == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("labels", [None, np.array([f"a class, {i}" for i in range(15)])])
def test_figure_7_explains_its_marks(labels):
    figure = figure_7(2 * [Panel("some", np.zeros((30, 2)), labels, 0.5, 0.5)])
    check_column(figure)
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[:2] == ["image", "text"]
    assert words[-1] == ("text" if labels is None else "and 3 classes more")


# The command


def run_command(output, *more):
    arguments = ["clip", "--preset", "smoke", "--sgd-rates", "0.01", "--rho", "0.1"]
    __main__.main([*arguments, "--output", str(output), *more])
    results = json.loads((output / "results.json").read_text())
    results["configuration"].pop("output")
    return results


def test_command_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    whole = run_command(tmp_path / "whole")
    done = []

    def interrupted(cell, *args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cell)
        return training.record(cell, *args)

    monkeypatch.setattr(clip_study, "record", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_command(tmp_path / "parts")
    rest = []
    monkeypatch.setattr(
        clip_study, "record", lambda cell, *args: rest.append(cell) or training.record(cell, *args)
    )
    parts = run_command(tmp_path / "parts")
    assert parts == whole
    grid = training.grid(SMOKE)
    assert done + rest == 2 * grid

    monkeypatch.setattr(clip_study, "record", lambda *_: pytest.fail("nothing was left to do"))
    fewer = run_command(tmp_path / "parts", "--seeds", "1", "--overwrite")
    assert [len(cell["seeds"]) for cell in fewer["cells"]] == [1] * len(grid)
    assert {claim["verdict"] for claim in whole["claims"] + fewer["claims"]} == {None}
    assert "No verdicts: preset smoke" in (tmp_path / "whole/tables.md").read_text()

    check_outputs(whole, tmp_path / "whole", grid)
    assert "S_kNN" in capsys.readouterr().out


def test_command_on_pairs_of_a_folder(tmp_path):
    sizes = {"pretrain": 512, "train": 128, "val": 64, "test": 64}
    splits = {name: scenes(PLAIN, n, 16, n) for name, n in sizes.items()}
    write_folder(tmp_path / "pairs", "npz", splits)
    more = ["--data", str(tmp_path / "pairs"), "--pretraining-steps", "100"]
    results = run_command(tmp_path / "out", *more)
    assert results["configuration"]["pretraining_steps"] == 100
    assert results["data"]["pairs"] == sizes
    assert results["data"]["unknown_words"] == results["data"]["cut_captions"] == 0
    told = "Pairs of pairs: pretrain 512, train 128, val 64, test 64. 0% of the words"
    assert told in (tmp_path / "out" / "tables.md").read_text()
    for cell in results["cells"]:
        one, other = (seed["test_loss"][0] for seed in cell["seeds"])
        assert one != other  # the pairs are the same, the params and batches are not


def check_outputs(results, folder, grid):
    assert results["chance"] == {"alignment": 8 / 63, "loss": math.log(32)}
    assert results["data"]["pairs"] == {"pretrain": 512, "train": 128, "val": 64, "test": 64}
    assert results["parameters"] > 10_000
    assert [(c["method"], c["learning_rate"], c["rho"]) for c in results["cells"]] == grid
    for cell in results["cells"]:
        assert [seed["seed"] for seed in cell["seeds"]] == [0, 1]
        for seed, best in zip(cell["seeds"], cell["best"], strict=True):
            assert seed["steps"] == [0, 3, 6]
            assert all(len(seed[name]) == 3 for name in training.EVALUATED)
            assert all(len(seed[name]) == 2 for name in training.LOGGED)
            assert best["val_alignment"] == max(seed["val_alignment"])
            assert best["val_loss"] == min(seed["val_loss"])
        test = [best["alignment"] for best in cell["best"]]
        assert cell["summary"]["alignment"]["mean"] == pytest.approx(np.mean(test))
    starts = {tuple(seed["test_loss"][0] for seed in c["seeds"]) for c in results["cells"]}
    assert len(starts) == 1
    titles = [panel["title"].split(",")[0] for panel in results["figure7"]]
    assert titles == ["before", "SAM", "M-SAM"]
    # Of runs that are the same, as where two methods are best at step 0, nothing is claimed.
    chosen = {name: clip_report.choose(results["cells"], name) for name in training.LABELS}
    best = {name: [run["alignment"] for run in cell["best"]] for name, cell in chosen.items()}
    best["none"] = [seed["test_alignment"][0] for seed in results["cells"][0]["seeds"]]
    for low, high in (("none", "adam"), ("adam", "sam"), ("sgd", "sam"), ("sam", "monge_sam")):
        best[low, high] = best[low] != best[high]
    rate = chosen["monge_sam"]["learning_rate"]
    by_rho = [
        [run["alignment"] for run in cell["best"]]
        for cell in results["cells"]
        if (cell["method"], cell["learning_rate"]) == ("monge_sam", rate)
    ]
    differ = sum(value for key, value in best.items() if isinstance(key, tuple))
    assert len(results["claims"]) == 2 + differ + (by_rho[0] != by_rho[-1])
    assert (folder / "tables.md").read_text() == clip_report.markdown(results)
    assert check_column(mechanism_figure(results)) == {"SAM", "M-SAM"}
    for picture in ("figure7.png", "mechanism.png"):
        assert imread(folder / picture).ndim == 3


def test_command_on_embeddings(tmp_path, capsys):
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 40, 6))
    labels = np.arange(40) % 3
    np.savez(tmp_path / "e.npz", image=image, text=image + 0.1 * text, label=labels, logit_scale=2)
    arguments = ["--embeddings", str(tmp_path / "e.npz"), "--k", "5"]
    __main__.main(["clip", *arguments, "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0.5 < results["alignment"] < 1
    assert results["alignment_chance"] == pytest.approx(5 / 39)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, image + 0.1 * text)]
    logits = 2 * units[0] @ units[1].T
    losses = [np.mean(np.log(np.sum(np.exp(x), 1)) - np.diag(x)) for x in (logits, logits.T)]
    assert results["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert results["loss_chance"] == pytest.approx(math.log(40))
    joint = without_first_component(image, image + 0.1 * text)
    assert results["figure7"]["correlation"] == pytest.approx(joint.correlation, abs=1e-5)
    assert imread(tmp_path / "out" / "figure7.png").ndim == 3
    assert "first principal component" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"image": np.ones((20, 3))},
            "no array text; found image (20, 3), expected an .npz",
        ),
        ({"text": np.ones((20, 4))}, "expected image and text of one shape"),
        ({"text": np.ones(20)}, "expected text (n, d) of numbers, found (20,)"),
        ({"text": np.full((20, 3), np.nan)}, "text (20, 3) holds NaN"),
        ({"image": np.ones((8, 3)), "text": np.ones((8, 3))}, "more than 8 pairs"),
        ({"text": np.ones((20, 3)), "label": np.ones(2, int)}, "expected label (20,)"),
        ({"text": np.ones((20, 3)), "logit_scale": np.ones(2)}, "logit_scale to be a finite"),
    ],
)
def test_embeddings_that_cannot_be_used(tmp_path, arrays, message, capsys):
    np.savez(tmp_path / "e.npz", **{"image": np.ones((20, 3)), **arrays})
    fails(["--embeddings", str(tmp_path / "e.npz"), "--output", str(tmp_path)], message, capsys)


def fails(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(["clip", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--steps", "-1"], "--steps must be at least 1"),
        (["--pretraining-steps", "0"], "--pretraining-steps must be at least 1"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--rho", "-0.1"], "--rho needs finite numbers"),
        (["--rho", "0.1", "0.1"], "--rho has a number twice"),
        (["--sgd-rates", "nan"], "--sgd-rates needs finite"),
        (["--image-size", "10"], "--image-size must be a multiple of 4"),
        (["--k", "128"], "--k must be below the batch size of 128"),
        (["--data", "a", "--embeddings", "b"], "--data trains and --embeddings does not"),
        (["--data", "nowhere", "--output", "{tmp}"], "expected train.jsonl or train.npz, found no"),
        (["--embeddings", "nowhere.npz"], "nowhere.npz: no such file"),
    ],
)
def test_options_that_cannot_be_used(options, message, capsys, tmp_path):
    fails([option.format(tmp=tmp_path) for option in options], message, capsys)


def test_one_compilation_serves_all_cells_and_seeds(corpus, start):
    list(training.moments(Cell("sam", 0.01, 0.1), start, corpus, SMOKE, 0))
    compiled = training._advance._cache_size()
    other = clip_data.generated(SMOKE.size, SMOKE.image_size, 1)
    list(training.moments(Cell("sam", 0.02, 0.3), start, other, SMOKE, 1))
    assert training._advance._cache_size() == compiled
