"""`monge-sam pairs`: made packages are read, and what is written is read by `clip --data`."""

import gzip
import html
import json
import struct
import zlib

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from monge_sam_jax.__main__ import main
from monge_sam_jax.experiments.clip.data import from_folder
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.pictures import on_white
from monge_sam_jax.experiments.common.plots import blank_figure
from monge_sam_jax.experiments.pairs import emoji, openclipart, pictures
from monge_sam_jax.experiments.pairs import run as running
from monge_sam_jax.experiments.pairs.options import Pairs
from monge_sam_jax.experiments.pairs.package import Candidate

PUBLIC = "http://web.resource.org/cc/PublicDomain"
SPLITS = ("pretrain", "train", "val", "test")
LAUGHS = '<!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'


def svg(title, *keywords, licence=PUBLIC, head="", declared=True):
    items = "".join(f"<rdf:li>{html.escape(word)}</rdf:li>" for word in keywords)
    names = ("rdf", "dc", "cc") if declared else ()
    namespaces = " ".join(f'xmlns:{name}="http://{name}/"' for name in names)
    return (
        f'<?xml version="1.0"?>{head}<svg xmlns="http://www.w3.org/2000/svg" {namespaces}>'
        f"<title>of the program</title><metadata><rdf:RDF><cc:Work>"
        f"<dc:publisher><cc:Agent><dc:title>Somebody</dc:title></cc:Agent></dc:publisher>"
        f"<dc:title>{html.escape(title)}</dc:title>"
        f"<dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>"
        f'<cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata></svg>'
    )


def blocks(seed):
    """A picture of random blocks (32, 32, 3), which looks like no other."""
    colours = np.random.default_rng(seed).integers(256, size=(4, 4, 3), dtype=np.uint8)
    return colours.repeat(8, axis=0).repeat(8, axis=1)


def add(folder, name, text, pixels):
    for kind in ("png", "svg"):
        (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "svg" / f"{name}.svg").write_text(text)
    Image.fromarray(pixels).save(folder / "png" / f"{name}.png")


@pytest.fixture
def clipart(tmp_path):
    """The packages openclipart-png and -svg with 20 pictures, as Debian installs them."""
    folder = tmp_path / "share" / "openclipart"
    for i in range(20):
        name = f"{'animals' if i % 2 else 'food/fruit'}/thing{i:02}"
        add(folder, name, svg(f"Thing {i}", "some_word", "Some word"), blocks(i))
    for package in openclipart.PACKAGES:
        doc = tmp_path / "share" / "doc" / package
        doc.mkdir(parents=True)
        (doc / "copyright").write_text("Public Domain Dedication")
        (doc / "changelog.Debian.gz").write_bytes(gzip.compress(b"openclipart (1:0.18-1) stable;"))
    return folder


@pytest.fixture
def modules(tmp_path):
    """The packages emoji-datasource-google and emojibase-data with 12 emoji, as npm does."""
    folder = tmp_path / "node_modules"
    (folder / emoji.IMAGES).mkdir(parents=True)
    (folder / emoji.TAGS).parent.mkdir(parents=True)
    listed, named = [], []
    for i in range(12):
        code = f"1F60{i:X}"
        listed.append({"unified": f"{code}-FE0F", "image": f"{code}.png", "category": "Faces"})
        named.append({"hexcode": code, "label": f"face {i}", "tags": ["face", f"face {i}"]})
        Image.fromarray(blocks(i)).save(folder / emoji.IMAGES / f"{code}.png")
    listed[0]["skin_variations"] = {"1F3FB": {}, "1F3FC": {}}
    (folder / emoji.LIST).write_text(json.dumps(listed))
    (folder / emoji.TAGS).write_text(json.dumps(named))
    for package in (emoji.PICTURES, emoji.NAMES):
        about = {"version": "16.0.0", "license": "MIT"}
        (folder / package / "package.json").write_text(json.dumps(about))
        (folder / package / "LICENSE").write_text("MIT License")
    readme = "* Noto images, are available under the Apache License 2.0."
    (folder / emoji.PICTURES / "README.md").write_text(f"Noto\n{readme}\n")
    return folder


@pytest.fixture
def without_a_sheet(monkeypatch):
    """The contact sheet, which takes a second, is not drawn."""
    monkeypatch.setattr(running, "contact_sheet", lambda *_: blank_figure(1))


def command(source, folder, output, *more):
    main(["pairs", source, "--folder", str(folder), "--output", str(output), *more])
    return json.loads((output / "pairs.json").read_text())


def test_the_folder_is_what_clip_reads(clipart, tmp_path, capsys):
    output = tmp_path / "out"
    results = command("openclipart", clipart, output, "--side", "32")
    assert results["pairs"] == {"pretrain": 8, "train": 6, "val": 3, "test": 3}
    corpus = from_folder(output, 32, fewest=3)
    assert corpus.cut == 0
    found = {}
    for name in SPLITS:
        arrays = np.load(output / f"{name}.npz")
        np.testing.assert_allclose(getattr(corpus, name).images, arrays["image"] / 255, atol=1e-6)
        columns = (arrays[key] for key in ("image", "caption", "label", "source"))
        for image, caption, label, source in zip(*columns, strict=True):
            i = int(caption.split()[1].rstrip(","))
            np.testing.assert_array_equal(image, blocks(i))
            assert caption == f"Thing {i}, some word"
            assert label == source.split("/")[0] == ("animals" if i % 2 else "food")
            found[i] = name
    assert sorted(found) == list(range(20))
    text = (output / "SOURCES.md").read_text()
    assert "| openclipart-png | 1:0.18-1 | public domain | LICENSE-openclipart-png.txt |" in text
    assert "20 pairs of pictures of 32 x 32 pixels" in text
    for package in openclipart.PACKAGES:
        assert (output / f"LICENSE-{package}.txt").read_text() == "Public Domain Dedication"
    assert imread(output / "contact_sheet.png").ndim == 3
    assert "to train with, the root" in " ".join(capsys.readouterr().out.split())
    other = running.deal(20, seed=1)
    assert sorted(np.concatenate(list(other.values()))) == list(range(20))
    assert not np.array_equal(other["test"], running.deal(20, seed=0)["test"])


def test_how_far_test_pictures_are_from_the_others(clipart, tmp_path, without_a_sheet):
    results = command("openclipart", clipart, tmp_path / "out", "--side", "16")
    images = {n: np.load(tmp_path / "out" / f"{n}.npz")["image"].astype(float) for n in SPLITS}
    others = np.concatenate([images[name] for name in SPLITS if name != "test"])
    nearest = [np.sqrt(np.mean((others - x) ** 2, (1, 2, 3))).min() / 255 for x in images["test"]]
    assert results["nearest"]["least"] == pytest.approx(min(nearest), rel=1e-5)
    again = command("openclipart", clipart, tmp_path / "again", "--side", "16")
    assert again["nearest"] == results["nearest"]
    assert results["nearest"]["median"] == pytest.approx(np.median(nearest), rel=1e-5)


def test_doubles_are_left_out(clipart, tmp_path, without_a_sheet):
    close = blocks(3) ^ 1  # by a value of 255 in every pixel
    add(clipart, "animals/a_close", svg("Close"), close)
    add(clipart, "animals/zz_other", svg("thing 5", "SOME WORD", "thing 5"), blocks(100))
    add(clipart, "animals/zz_third", svg("Third"), blocks(102))
    (clipart / "png/animals/zz_link.png").symlink_to(clipart / "png/animals/zz_third.png")
    results = command("openclipart", clipart, tmp_path / "out")
    assert results["left_out"] == {
        "link to another picture": ["animals/zz_link"],
        "picture that looks like another": ["animals/thing03"],
    }
    # A title that two have is no name of a picture: both are called by their files.
    captions = np.concatenate([np.load(tmp_path / f"out/{n}.npz")["caption"] for n in SPLITS])
    assert {"Close", "zz other, SOME WORD, thing 5", "thing05, some word"} <= set(captions)
    assert len({caption.lower() for caption in captions}) == len(captions) == 22


def test_equal_captions_are_doubles(tmp_path):
    for i in range(3):
        Image.fromarray(blocks(i)).save(tmp_path / f"{i}.png")
    candidates = [
        Candidate(tmp_path / f"{i}.png", str(i), caption, "")
        for i, caption in enumerate(("a Cat", "A cat", "a dog"))
    ]
    chosen = pictures.choose(candidates, 16)
    assert [candidate.name for candidate in chosen.candidates] == ["0", "2"]
    assert chosen.left_out == {"caption that another has": ["1"]}
    assert len(chosen.images) == 2


def test_the_first_is_kept_and_decides():
    """Where b looks like a, and c like b but not like a, b alone is a double."""
    a = np.zeros((16, 16, 3), np.uint8)
    images = np.stack([a, a + 4, a + 8, a + 100])
    np.testing.assert_array_equal(pictures.firsts(images), [True, False, True, True])
    assert pictures.firsts(images[:1]).all()


def test_files_that_cannot_be_used_are_named(clipart, tmp_path, without_a_sheet):
    bad = {
        "broken svg": svg("Broken")[:-9],
        "laughs": svg("Laughs", head=LAUGHS),
        "licensed": svg("Licensed", licence="http://creativecommons.org/licenses/GPL/2.0/"),
        "untold": svg(" ", ""),
        "icons/one-theme/icon": svg("Icon"),
    }
    for i, (name, text) in enumerate(bad.items(), start=30):
        add(clipart, name, text, blocks(i))
    for name in ("broken png", "cut png", "alone", "undeclared"):
        add(
            clipart,
            name,
            svg(f"{name} of &uuml;", declared=name != "undeclared"),
            blocks(40 + len(name)),
        )
    (clipart / "png/broken png.png").write_bytes(b"\x89PNG\r\n\x1a\nno chunk at all")
    whole = (clipart / "png/cut png.png").read_bytes()
    (clipart / "png/cut png.png").write_bytes(whole[: len(whole) // 2])
    (clipart / "svg/alone.svg").unlink()
    size = struct.pack(">II5B", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
    add(clipart, "huge", svg("Huge"), blocks(50))
    (clipart / "png/huge.png").write_bytes(whole[:8] + chunk + whole[33:])
    results = command("openclipart", clipart, tmp_path / "out")
    assert results["left_out"] == {
        "without an SVG": ["alone"],
        "SVG that is broken": ["broken svg"],
        "icon of a desktop theme": ["icons/one-theme/icon"],
        "SVG that declares entities": ["laughs"],
        "under another licence than the public domain": ["licensed"],
        "without title and keywords": ["untold"],
        "picture that is broken, or too large to be decoded": ["broken png", "cut png", "huge"],
    }
    sources = (tmp_path / "out/SOURCES.md").read_text()
    for reason, names in results["left_out"].items():
        assert f"- {len(names)}, {reason}: {', '.join(names)}" in sources
    captions = np.concatenate([np.load(tmp_path / f"out/{n}.npz")["caption"] for n in SPLITS])
    assert "undeclared of ü" in captions
    assert len(captions) == 21


@pytest.mark.parametrize(
    ("titles", "names", "captions"),
    [
        (("Clip art by A. B. - Cat",), ("cat",), ("Cat, pet",)),
        (("set", "SET"), ("black_cat_ann_01", "dog"), ("black cat, pet", "dog, pet")),
        (("", ""), ("b_2", "cat-and_dog_ann_17"), ("b 2, pet", "cat and dog, pet")),
    ],
)
def test_titles_of_series_give_way_to_names_of_files(tmp_path, titles, names, captions):
    for title, name in zip(titles, names, strict=True):
        add(tmp_path, name, svg(title, "hash(0x8a3ecd4)", "HASH", "0x12f", "pet"), blocks(0))
    found = openclipart.read(tmp_path)
    assert tuple(candidate.caption for candidate in found.candidates) == captions
    assert [origin.version for origin in found.origins] == ["not found"] * 2
    assert [origin.text for origin in found.origins] == [None] * 2


@pytest.mark.parametrize(
    ("shape", "inside"), [((4, 8), np.s_[4:12, :]), ((8, 2), np.s_[:, 6:10]), ((16, 16), np.s_[:])]
)
def test_pictures_are_whole_and_on_white(tmp_path, shape, inside):
    pixels = np.zeros((*shape, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 128
    pixels[0, :, 3] = 0  # black below transparency
    Image.fromarray(pixels).save(tmp_path / "a.png")
    square = pictures.square(tmp_path / "a.png", 16)
    expected = np.full((16, 16, 3), 255, np.uint8)
    expected[inside] = np.round(255 + 128 / 255 * (np.array([200, 0, 0]) - 255))
    row = np.flatnonzero((square != 255).any((1, 2)))[0]
    expected[:row] = 255
    np.testing.assert_allclose(square.astype(int), expected, atol=1)
    assert row == (4 if shape == (4, 8) else 0) + 16 // max(shape)


def test_grey_of_16_bits_is_not_cut_off(tmp_path):
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(on_white(picture))[0, :, 0], [0, 128, 255])


def test_emoji(modules, tmp_path, without_a_sheet):
    (modules / emoji.IMAGES / "1F603.png").unlink()
    named = json.loads((modules / emoji.TAGS).read_text())
    del named[5], named[6]["tags"]
    (modules / emoji.TAGS).write_text(json.dumps(named))
    results = command("emoji", modules, tmp_path / "out")
    image = f"{emoji.IMAGES}/1F60"
    assert results["left_out"] == {
        "in a skin tone": [f"{image}0.png: 1F3FB", f"{image}0.png: 1F3FC"],
        "without a picture": [f"{image}3.png"],
        "without a name in CLDR": [f"{image}5.png"],
    }
    assert sum(results["pairs"].values()) == 10
    for name in SPLITS:
        arrays = np.load(tmp_path / f"out/{name}.npz")
        assert set(arrays["label"]) == {"Faces"}
        for x, caption in zip(arrays["image"], arrays["caption"], strict=True):
            i = int(caption.split()[1].rstrip(","))
            assert caption == (f"face {i}" if i == 7 else f"face {i}, face")
            np.testing.assert_array_equal(x[::2, ::2], blocks(i))
    text = (tmp_path / "out/SOURCES.md").read_text()
    licence = "MIT; its README of the pictures: Noto images, are available under the Apache License"
    assert f"| emoji-datasource-google | 16.0.0 | {licence}" in text
    assert (tmp_path / "out/LICENSE-emojibase-data.txt").read_text() == "MIT License"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (emoji.LIST, None, "expected emoji-datasource-google/emoji.json, found emoji-datasource-"),
        (emoji.LIST, "[", "emoji.json: expected JSON: "),
        (emoji.LIST, "{}", "expected a list in JSON, found dict"),
        (emoji.LIST, "[3]", "expected texts unified, image, category in entry 0, found 3"),
        (emoji.LIST, "[]", "and pictures in .*, found none of 0"),
        (emoji.TAGS, '[{"hexcode": "1F600"}]', "expected texts hexcode, label in entry 0, found"),
        (emoji.TAGS, '[{"hexcode": "", "label": "", "tags": [1]}]', "a list of texts tags in ent"),
        (emoji.TAGS, "[]", "with names in .*, found none of 12"),
        (f"{emoji.NAMES}/package.json", "[]", "expected an object in JSON, found list"),
    ],
)
def test_emoji_that_cannot_be_used(modules, file, content, message):
    if content is None:
        (modules / file).unlink()
    else:
        (modules / file).write_text(content)
    with pytest.raises(InputError, match=message):
        emoji.read(modules)


@pytest.mark.parametrize("source", ["openclipart", "emoji"])
def test_packages_that_are_not_there(source, tmp_path, capsys):
    install = {
        "openclipart": "apt-get install openclipart-png openclipart-svg",
        "emoji": "npm install emoji-datasource-google emojibase-data",
    }[source]
    (tmp_path / "empty").mkdir()
    for folder, found in (("none", "no such folder"), ("empty", "nothing")):
        with pytest.raises(SystemExit, match="2"):
            command(source, tmp_path / folder, tmp_path / "out")
        (line,) = capsys.readouterr().err.splitlines()
        assert f"found {found}; {install} installs it, and --folder says where" in line


def test_too_few_pairs(tmp_path, capsys):
    for kind in ("png", "svg"):
        (tmp_path / kind).mkdir()
    with pytest.raises(InputError, match=r"metadata in svg, found 0 .png files$"):
        openclipart.read(tmp_path)
    add(tmp_path, "a", svg(""), blocks(0))
    with pytest.raises(InputError, match=r"found 1 .png files: 1 without title and keywords"):
        openclipart.read(tmp_path)
    add(tmp_path, "b", svg("b"), blocks(0))
    with pytest.raises(SystemExit, match="2"):
        command("openclipart", tmp_path, tmp_path / "out")
    message = "expected at least 10 pairs, found 1; left out are 1 without title and keywords"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [({"side": 8}, "--side must be at least 16, got 8"), ({"seed": -1}, "--seed must be from 0")],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        Pairs("emoji", **options).check()
