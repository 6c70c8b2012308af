"""What `monge-sam clip` reports: chosen on the validation set, measured on the test set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monge_sam_jax.experiments.clip.data import WORDS
from monge_sam_jax.experiments.clip.training import LABELS
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.report import Difference

PAPER_ALIGNMENT = {"none": 0.351, "sgd": 0.387, "adam": 0.388, "sam": 0.405, "monge_sam": 0.446}
DIVERGED = 0.95  # of the loss of chance, ln(batch size)
IMPROVED = 1.05  # of the pre-trained model's alignment
Json = Mapping[str, Any]


def summarise_cell(cell: Json, loss_of_chance: float) -> dict[str, Any]:
    """Adds to a cell at which step each run is best, and what it has there.

    Steps are chosen on the validation set, step 0 among them, by the largest alignment and by the
    smallest loss. A run has diverged if its loss ends near that of chance, or is not finite.

    Args:
      cell: method, learning_rate, rho, and seeds, the records of its runs.
      loss_of_chance: ln(batch size).

    Returns:
      The cell with best, by run; summary, over runs; and the number of diverged ones.
    """
    best, diverged = [], 0
    for seed in cell["seeds"]:
        curves = {name: np.array(seed[name], float) for name in seed}  # null becomes NaN
        at_alignment = int(np.nanargmax(curves["val_alignment"]))
        at_loss = int(np.nanargmin(curves["val_loss"]))
        best.append(
            {
                "alignment_step": seed["steps"][at_alignment],
                "loss_step": seed["steps"][at_loss],
                "val_alignment": float(curves["val_alignment"][at_alignment]),
                "val_loss": float(curves["val_loss"][at_loss]),
                "alignment": float(curves["test_alignment"][at_alignment]),
                "loss": float(curves["test_loss"][at_loss]),
                "final_alignment": float(curves["test_alignment"][-1]),
                "final_loss": float(curves["test_loss"][-1]),
            }
        )
        diverged += not curves["val_loss"][-1] < DIVERGED * loss_of_chance
    return {**cell, "best": best, "summary": report.summarise(best), "diverged": diverged}


def choose(cells: Sequence[Json], method: str) -> Json:
    """The method's cell of largest validation alignment, a mean over seeds at their best steps."""
    own = [cell for cell in cells if cell["method"] == method]
    return max(own, key=lambda cell: cell["summary"]["val_alignment"]["mean"])


def has_diverged(cell: Json) -> bool:
    """Whether more than half of its runs have."""
    return cell["diverged"] > len(cell["seeds"]) / 2


def starts(cells: Sequence[Json]) -> dict[str, list[float]]:
    """Test alignment and loss before fine-tuning, by seed."""
    return {
        name: [seed[f"test_{name}"][0] for seed in cells[0]["seeds"]]
        for name in ("alignment", "loss")
    }


def radius_to_show(cells: Sequence[Json]) -> float:
    """Table 2's: the smallest at which SAM diverges at some learning rate, or else the largest."""
    of_sam = [cell for cell in cells if cell["method"] == "sam"]
    diverging = [cell["rho"] for cell in of_sam if has_diverged(cell)]
    return min(diverging) if diverging else max(cell["rho"] for cell in of_sam)


def mechanism(cells: Sequence[Json]) -> dict[str, float]:
    """The cells to draw: table 2's radius, at the largest learning rate."""
    rates = [cell["learning_rate"] for cell in cells if cell["method"] == "sam"]
    return {"learning_rate": max(rates), "rho": radius_to_show(cells)}


def claims(cells: Sequence[Json], correlation: float) -> list[dict[str, str]]:
    """The paper's claims, with what speaks for or against them here.

    Args:
      cells: summarised ones.
      correlation: of the first principal component with the modality, before fine-tuning.

    Returns:
      Claims, each with evidence and verdict. Differences between alignments are taken seed by seed;
      those of runs that are the same are left out.
    """
    none = starts(cells)["alignment"]
    alignment = {name: [run["alignment"] for run in choose(cells, name)["best"]] for name in LABELS}
    chosen = choose(cells, "monge_sam")
    row = [
        cell
        for cell in cells
        if cell["method"] == "monge_sam" and cell["learning_rate"] == chosen["learning_rate"]
    ]
    narrow, wide = (pick(row, key=lambda cell: cell["rho"]) for pick in (min, max))
    compared = [
        _compare("alignment: none < Adam", none, alignment["adam"]),
        _compare("alignment: Adam < SAM", alignment["adam"], alignment["sam"]),
        _compare("alignment: SGD < SAM", alignment["sgd"], alignment["sam"]),
        _compare("alignment: SAM < M-SAM", alignment["sam"], alignment["monge_sam"]),
        _compare(
            f"M-SAM's alignment grows with rho (from {narrow['rho']:g} to {wide['rho']:g}, "
            f"at its chosen learning rate)",
            *([run["alignment"] for run in cell["best"]] for cell in (narrow, wide)),
        ),
    ]
    return [
        *filter(None, compared),
        _divergence(cells),
        {
            "claim": "the main variation of the joint space is the modality (figure 7)",
            "evidence": f"correlation {correlation:.3f} before fine-tuning",
            "verdict": "holds" if correlation > 0.9 else "does not hold",
        },
    ]


def _compare(claim: str, low: Sequence[float], high: Sequence[float]) -> dict[str, str] | None:
    """Whether `high` is above `low`, by more than two standard errors; None if they are equal."""
    found = Difference.of(high, low)
    if found.is_nothing:
        return None
    return {
        "claim": claim,
        "evidence": f"difference {found.text(3)}",
        "verdict": found.verdict("holds", "does not hold: the other way round"),
    }


def _divergence(cells: Sequence[Json]) -> dict[str, str]:
    diverged = {
        name: {
            (cell["learning_rate"], cell["rho"])
            for cell in cells
            if cell["method"] == name and has_diverged(cell)
        }
        for name in ("sam", "monge_sam")
    }
    sam, monge = diverged["sam"], diverged["monge_sam"]
    grid = sum(cell["method"] == "sam" for cell in cells)
    if not sam - monge:
        verdict = "does not hold"
    else:
        verdict = "holds" if not monge - sam else "holds in some cells, the reverse in others"
    return {
        "claim": "SAM diverges in cells of the grid where M-SAM does not",
        "evidence": (
            f"SAM alone in {len(sam - monge)}, M-SAM alone in {len(monge - sam)}, both in "
            f"{len(sam & monge)} of {report.count(grid, 'cell')}"
        ),
        "verdict": verdict,
    }


def markdown(results: Json) -> str:
    """Tables 1 to 3 in the paper's layout, and the claims.

    Args:
      results: content of results.json.

    Returns:
      The tables; numbers of the paper are in a row of that name.
    """
    cells, chance = results["cells"], results["chance"]
    seeds = len(cells[0]["seeds"])
    base = LABELS[results["configuration"]["base"]]
    means = "Means ± standard errors over " if seeds > 1 else ""
    lines = [
        f"{means}{report.count(seeds, 'seed')}, on the test set; steps and cells are "
        f"chosen on the validation set. SAM and M-SAM on {base}. The "
        f"alignment of unrelated embeddings is {chance['alignment']:.3f}, their loss "
        f"{chance['loss']:.3f}.",
        "",
        *_captions(results),
        *_table_1(cells),
        *_table_2(cells),
        *_table_3(cells),
        "**Claims of the paper**",
        "",
        *report.claims_table(results, {"claim": "claim", "evidence": "here", "verdict": "verdict"}),
        "",
    ]
    return "\n".join(lines)


def _captions(results: Json) -> list[str]:
    """What is not read of the user's captions."""
    if results["configuration"]["data"] is None:
        return []
    data = results["data"]
    cut = report.count(data["cut_captions"], "caption")
    return [
        f"Pairs of {data['name']}: {', '.join(f'{n} {x}' for n, x in data['pairs'].items())}. "
        f"{data['unknown_words']:.0%} of the words in test captions are in none to train with; "
        f"of {cut} only the first {WORDS} words are read.",
        "",
    ]


def _table_1(cells: Sequence[Json]) -> list[str]:
    ours = [_of(starts(cells)["alignment"])]
    ours += [_summary(choose(cells, name), "alignment") for name in LABELS]
    paper = [f"{value:.3f}" for value in PAPER_ALIGNMENT.values()]
    return [
        "**Table 1.** Alignment at the chosen cell and step.",
        "",
        f"| | None | {' | '.join(LABELS.values())} |",
        "|---" * (2 + len(LABELS)) + "|",
        f"| S_kNN | {' | '.join(ours)} |",
        f"| paper (CLIP, MS-COCO) | {' | '.join(paper)} |",
        "",
    ]


def _table_2(cells: Sequence[Json]) -> list[str]:
    rho = radius_to_show(cells)
    rows = {
        name: [c for c in cells if c["method"] == name and c["rho"] == rho]
        for name in ("sam", "monge_sam")
    }
    rates = " | ".join(f"{cell['learning_rate']:g}" for cell in rows["sam"])
    return [
        f"**Table 2.** Loss after the last step by learning rate, rho = {rho:g}, the smallest at "
        "which SAM diverges (else the largest).",
        "",
        f"| | {rates} |",
        "|---" * (1 + len(rows["sam"])) + "|",
        *(
            f"| {LABELS[name]} | {' | '.join(_final(cell) for cell in row)} |"
            for name, row in rows.items()
        ),
        "",
    ]


def _table_3(cells: Sequence[Json]) -> list[str]:
    initial = starts(cells)
    last = cells[0]["seeds"][0]["steps"][-1]
    chosen = {name: choose(cells, name) for name in LABELS}
    lines = [
        "**Table 3.** All cells. Bold: chosen by alignment. Star: before the first step in most "
        "runs. ▲: alignment more than 5 % above the pre-trained model's.",
        "",
        f"| optimizer | learning rate | rho | alignment, T = T\\*_alignment | loss, T = {last} | "
        "loss, T = T\\*_loss |",
        "|---" * 6 + "|",
        f"| None | - | - | {_of(initial['alignment'])} | - | {_of(initial['loss'])} |",
    ]
    for cell in cells:
        alignment = _summary(cell, "alignment") + _star(cell, "alignment_step")
        if cell is chosen[cell["method"]]:
            alignment = f"**{alignment}**"
        if cell["summary"]["alignment"]["mean"] > IMPROVED * np.mean(initial["alignment"]):
            alignment += " ▲"
        loss = _summary(cell, "loss") + _star(cell, "loss_step")
        rho = "-" if cell["rho"] is None else f"{cell['rho']:g}"
        lines.append(
            f"| {LABELS[cell['method']]} | {cell['learning_rate']:g} | {rho} | {alignment} | "
            f"{_final(cell)} | {loss} |"
        )
    return [*lines, ""]


def _star(cell: Json, step: str) -> str:
    at_start = sum(run[step] == 0 for run in cell["best"])
    return " \\*" if at_start > len(cell["best"]) / 2 else ""


def _final(cell: Json) -> str:
    count = f"{cell['diverged']}/{len(cell['seeds'])}"
    return _summary(cell, "final_loss") + (f" ({count} diverged)" if cell["diverged"] else "")


def _summary(cell: Json, name: str) -> str:
    return report.estimate(cell["summary"][name], 3)


def _of(values: Sequence[float]) -> str:
    return report.estimate(report.summarise([{"v": value} for value in values])["v"], 3)
