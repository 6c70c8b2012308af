"""The drawings of Debian's packages openclipart-png and openclipart-svg."""

import collections
import html
import re
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.pairs.options import INSTALLING
from monge_sam_jax.experiments.pairs.package import (
    Candidate,
    Found,
    Origin,
    caption_of,
    check_folders,
    debian_version,
)

PACKAGES = ("openclipart-png", "openclipart-svg")
THEME = re.compile(r"(^|/)icons/[^/]*-theme/")  # icons of a desktop, drawn in several sizes
# Keywords that say nothing of the picture: names of objects in a program, and of places in the
# collection.
IDLE = re.compile(
    r"hash|hash\(0x[0-9a-f]+\)|0x[0-9a-f]+|unsorted|special|examples|openclipart", re.IGNORECASE
)
CREDIT = re.compile(r"clip ?art by .*? - ", re.IGNORECASE)  # before many titles
# Of name_author_01, the way names are given in the collection; all of other names.
OWN_NAME = re.compile(r"(.+?)(?:_[^_]+_\d+)?")
PUBLIC = "publicdomain"
CAPTIONS = (
    "The title in the SVG's metadata (dc:title), then its keywords (dc:subject). Where other "
    "pictures have the same title, which is then a series' name, and where there is none, the "
    "words of the file's name, without author and number, take its place."
)


class Metadata(NamedTuple):
    """What an SVG says of itself: its title, keywords and licence, empty if it does not."""

    title: str
    keywords: list[str]
    licence: str


class UnsafeError(Exception):
    """An SVG declares entities, which could expand without end."""


def read(folder: Path) -> Found:
    """The pictures whose SVG has a caption.

    Args:
      folder: has png and svg, with the same names in both.

    Returns:
      What is found; of links, which are other names of a picture, and of icons of desktop themes
      nothing is taken.

    Raises:
      InputError: the folder is not what it should be, or has no picture with a caption.
    """
    check_folders(folder, ("png", "svg"), INSTALLING["openclipart"])
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    described: dict[str, Metadata] = {}
    pictures = sorted((folder / "png").rglob("*.png"))
    for picture in pictures:
        name = picture.relative_to(folder / "png").with_suffix("").as_posix()
        reason, metadata = _look(folder, name)
        if metadata is None:
            left_out[reason].append(name)
        else:
            described[name] = metadata
    if not described:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items())
        raise InputError(
            f"--folder {folder}: expected pictures in png with metadata in svg, found "
            f"{len(pictures)} .png files" + (f": {reasons}" if reasons else "")
        )
    titles = collections.Counter(metadata.title.lower() for metadata in described.values())
    candidates = []
    for name, metadata in described.items():
        own = OWN_NAME.fullmatch(name.rpartition("/")[2])
        assert own is not None
        is_its_own = metadata.title and titles[metadata.title.lower()] == 1
        title = CREDIT.sub("", metadata.title) if is_its_own else re.sub(r"[\W_]+", " ", own[1])
        keywords = (word for word in metadata.keywords if not IDLE.fullmatch(word))
        candidates.append(
            Candidate(
                folder / "png" / f"{name}.png",
                name,
                caption_of([title, *keywords]),
                name.partition("/")[0] if "/" in name else "none",
            )
        )
    return Found(candidates, [_origin(folder, package) for package in PACKAGES], CAPTIONS, left_out)


def _look(folder: Path, name: str) -> tuple[str, Metadata | None]:
    """The metadata of a picture, or why it is not taken."""
    svg = folder / "svg" / f"{name}.svg"
    if THEME.search(name):
        return "icon of a desktop theme", None
    if (folder / "png" / f"{name}.png").is_symlink():
        return "link to another picture", None
    try:
        found = metadata_of(svg.read_bytes())
    except FileNotFoundError:
        return "without an SVG", None
    except OSError:
        return "SVG that cannot be read", None
    except UnsafeError:
        return "SVG that declares entities", None
    except expat.ExpatError:
        return "SVG that is broken", None
    if not (found.title or found.keywords):
        return "without title and keywords", None
    if PUBLIC not in found.licence.lower().replace(" ", "") and found.licence:
        return "under another licence than the public domain", None
    return "", found


def metadata_of(svg: bytes) -> Metadata:
    """Title, keywords and licence of an SVG.

    Names are compared without their prefixes, so that a prefix that is nowhere declared, as old
    programs wrote them, does no harm.

    Args:
      svg: content of the file.

    Raises:
      UnsafeError: it declares entities.
      ExpatError: it is no XML.
    """
    path: list[str] = []
    titles: list[str] = []
    keywords: list[str] = []
    licences: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        path.append(tag.rpartition(":")[2])
        if path[-2:] == ["Work", "title"]:
            titles.append("")
        elif path[-2:] == ["Work", "license"]:
            named = (v for k, v in attributes.items() if k.rpartition(":")[2] == "resource")
            licences.append(next(named, ""))
        elif path[-3:] == ["subject", "Bag", "li"]:
            keywords.append("")

    def text(part: str) -> None:
        if path[-2:] == ["Work", "title"]:
            titles[-1] += part
        elif path[-3:] == ["subject", "Bag", "li"]:
            keywords[-1] += part

    def entity(*_: object) -> None:
        raise UnsafeError

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: path.pop()
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = entity
    parser.Parse(svg, True)
    # Some texts have been escaped twice.
    title, *words = (
        " ".join(html.unescape(text).split()) for text in ("".join(titles[:1]), *keywords)
    )
    return Metadata(title, [*filter(None, words)], "".join(licences[:1]))


def _origin(folder: Path, package: str) -> Origin:
    doc = folder.parent / "doc" / package
    text = doc / "copyright"
    return Origin(package, debian_version(doc), "public domain", text if text.is_file() else None)
