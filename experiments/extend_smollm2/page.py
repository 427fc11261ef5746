"""The page and the picture of the experiment, from what results.json holds. No number here is typed by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.common import table

__all__ = ["draw", "losses_by_eighth", "verdicts", "write_page", "write_results"]

EIGHTHS = 8
MEAN_BOUND = 0.01  # nats per token, MoBA over full attention
LAST_BOUND = 0.03  # the same, in the last eighth of the length
_NAMES = {
    "before": "as it came",
    "stretched_full": "YaRN, not trained, full",
    "stretched_moba": "YaRN, not trained, MoBA",
    "stretched_free": "the same, first block not forced",
    "full": "trained, full",
    "moba": "trained, MoBA",
}


def write_results(results: dict[str, Any], path: Path) -> str:
    """Write results.json at `path`, the page and the picture beside it; the page's text."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, path.with_suffix(".png"))
    text = write_page(results)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def losses_by_eighth(results: dict[str, Any], name: str, cut: bool = False) -> list[float]:
    """Mean loss of the whole length, then of its eighths; `cut`: from the last tokens of the context alone."""
    loss = _at_length(results, name, cut)
    buckets = loss["by_position"]
    bounds = [i * len(buckets) // EIGHTHS for i in range(EIGHTHS + 1)]
    return [loss["loss"], *(sum(buckets[a:b]) / (b - a) for a, b in pairwise(bounds))]


def verdicts(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(criterion, measured, at most): negative is better in each."""
    full, moba = (losses_by_eighth(results, arm) for arm in ("full", "moba"))
    known = max(1, min(EIGHTHS - 1, EIGHTHS * results["original"] // results["length"]))
    edge = known * results["length"] // EIGHTHS
    where = f"loss of the last eighth less that of the eighth before {_tokens(edge)}"
    paired = []
    if _has_cut(results):
        text = f"same tokens beyond {_tokens(edge)}: loss from the whole context less from its last {{}} at most"
        for label, name in (("full", "full"), ("MoBA", "moba")):
            gains, last = worth(results, name)[known:], _tokens(_at_length(results, name, True)["context"])
            paired.append((f"{text.format(last)}, {label}", sum(gains) / len(gains), 0.0))
    return [
        *paired,
        (f"{where}, full", full[EIGHTHS] - full[known], 0.0),
        (f"{where}, MoBA", moba[EIGHTHS] - moba[known], 0.0),
        ("MoBA less full, mean over all positions", moba[0] - full[0], MEAN_BOUND),
        ("MoBA less full, last eighth", moba[EIGHTHS] - full[EIGHTHS], LAST_BOUND),
    ]


def write_page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    original, length = _tokens(results["original"]), _tokens(results["length"])
    found = [name for name in _NAMES if name in results["evaluations"]]
    full = losses_by_eighth(results, "full")
    moba_gap = [b - a for a, b in zip(full, losses_by_eighth(results, "moba"), strict=True)]
    documents = _at_length(results, "full")["documents"]
    data = results["data"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        *(["**A quick run: it shows that the experiment works, and its numbers mean nothing.**"] * results["quick"]),
        f"# SmolLM2-135M-Instruct from {original} to {length} tokens, MoBA against full attention",
        f"`{results['command']}`",
        f"{results['device']}; {versions}, Python {results['python']}; {results['date']}.",
        table(
            ["criterion, nats per token", "measured", "at most", ""],
            *(
                [name, f"{value:+.4f}", f"{bound:g}", "met" if value <= bound else "not met"]
                for name, value, bound in verdicts(results)
            ),
        ),
        "![training loss, loss by position, passkeys](results.png)",
        f"## Loss by position, nats per token: the first {length} of each of {documents} validation documents",
        table(
            ["model", "all", *(f"{i}/{EIGHTHS}" for i in range(1, EIGHTHS + 1))],
            *([_NAMES[name], *(f"{loss:.4f}" for loss in losses_by_eighth(results, name))] for name in found),
            ["MoBA less full, trained", *(f"{gap:+.4f}" for gap in moba_gap)],
        ),
        *_paired(results),
        "All columns average the same documents. A document is whole Python source files of one installed package in "
        f"path order, each after a comment with its path; {data['train']['documents']:,} documents "
        f"({data['train']['tokens']:,} tokens) are for training, {data['valid']['documents']:,} "
        f"({data['valid']['tokens']:,}) for validation, by a hash of their text. "
        "Documents of both may come from one package.",
        "## Passkeys: greedy decoding would give the key, and how often the key is likelier than another number",
        _passkeys(results),
        "## Training",
        table(
            ["arm", "layers", "steps", "first loss", "last loss", "peak memory, GiB"],
            *(
                [
                    arm,
                    f"`{ran['layers']}`",
                    len(ran["losses"]),
                    f"{_first(ran['losses']):.4f}",
                    f"{_last(ran['losses']):.4f}",
                    f"{ran['memory_gib']:.1f}",
                ]
                for arm, ran in results["arms"].items()
            ),
        ),
        "Both arms start from the same weights and see the same batches. They may share a GPU, so nothing here is "
        "about speed. Settings of both:",
        "```\n" + "\n".join(results["common"]) + "\n```",
        *(f"{arm}: `{' '.join(overrides)}`" for arm, overrides in results["arm_overrides"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Training losses, losses by position, and passkeys (share of exact answers) before and after."""
    found = [name for name in _NAMES if name in results["evaluations"]]
    grids = [name for name in found if results["evaluations"][name]["passkey"]]
    figure = Figure(figsize=(15, 8), layout="tight")
    grid = figure.add_gridspec(2, 6)
    training, position = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    for arm, ran in results["arms"].items():
        steps = sorted(map(int, ran["losses"]))
        training.plot(steps, [_of(ran["losses"], step) for step in steps], linewidth=1, label=arm)
    training.set(xlabel="step", ylabel="loss (nats per token)", title="training")
    training.legend()
    for name in found:
        loss = _at_length(results, name)
        width = loss["length"] / len(loss["by_position"])
        places = [(i + 0.5) * width for i in range(len(loss["by_position"]))]
        position.plot(places, loss["by_position"], "o-", markersize=3, linewidth=1, label=_NAMES[name])
    position.axvline(results["original"], color="grey", linestyle=":", label="length it was made for")
    # The untrained model's loss explodes beyond its length: that it leaves the picture says enough.
    trained = [value for name in ("full", "moba") for value in _at_length(results, name)["by_position"]]
    low, high = min(trained), max(trained)
    position.set_ylim(low - 0.2 * (high - low) - 0.05, high + 1.8 * (high - low) + 0.05)
    position.set(xlabel="position (tokens)", ylabel="loss (nats per token)", title="validation, by position")
    position.legend(loc="upper right", ncol=2, fontsize="small")
    for column, name in enumerate(grids[:3]):
        axes = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        lengths, depths, values = _grid(results["evaluations"][name]["passkey"], "exact")
        axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", alpha=0.7, aspect="auto")
        axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set(xlabel="length", ylabel="depth", title=f"passkey, exact: {_NAMES[name]}")
        for y, row in enumerate(values):
            for x, share in enumerate(row):
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
    figure.savefig(path, dpi=110)


def _paired(results: dict[str, Any]) -> list[str]:
    """What context further back is worth, as sections of the page; none where it was not measured."""
    if not _has_cut(results):
        return []
    context = _tokens(_at_length(results, "full", True)["context"])
    return [
        "Each eighth is other text, and some text is harder for every model, whatever it has seen before. So below the "
        f"same tokens are predicted twice: from everything before them, and from their last {context} at most (three "
        "quarters of that at least). A difference below 0 is what the tokens further back are worth.",
        table(
            ["whole context less its end", *(f"{i}/{EIGHTHS}" for i in range(1, EIGHTHS + 1))],
            *([_NAMES[name], *(f"{gain:+.4f}" for gain in worth(results, name))] for name in ("full", "moba")),
        ),
    ]


def _passkeys(results: dict[str, Any]) -> str:
    rows = []
    names = [name for name in _NAMES if results["evaluations"].get(name, {}).get("passkey")]
    for name in names:
        cells = results["evaluations"][name]["passkey"]
        lengths, depths, exact = _grid(cells, "exact")
        _, _, preferred = _grid(cells, "preferred")
        for x, length in enumerate(lengths):
            shown = [f"{exact[y][x]:.0%}, {preferred[y][x]:.0%}" for y in range(len(depths))]
            rows.append([_NAMES[name], _tokens(length), *shown])
    cells = results["evaluations"][names[0]]["passkey"]
    depths = sorted({cell["depth"] for cell in cells})
    samples = f"{cells[0]['samples']} keys a cell"
    return table(["model", f"length ({samples})", *(f"depth {depth:g}" for depth in depths)], *rows)


def _grid(cells: list[dict[str, Any]], measure: str) -> tuple[list[int], list[float], list[list[float]]]:
    lengths, depths = (sorted({cell[key] for cell in cells}) for key in ("length", "depth"))
    by_place = {(cell["length"], cell["depth"]): cell[measure] for cell in cells}
    return lengths, depths, [[by_place[length, depth] for length in lengths] for depth in depths]


def _at_length(results: dict[str, Any], name: str, cut: bool = False) -> dict[str, Any]:
    """The loss by position of the longest length that was asked for, from the whole context or from its end alone."""
    losses = results["evaluations"][name]["loss_by_position"]
    of_kind = [loss for loss in losses if (loss.get("context") is not None) == cut]
    found: dict[str, Any] = max(of_kind, key=lambda loss: loss["length"])
    return found


def _has_cut(results: dict[str, Any]) -> bool:
    return any(loss.get("context") is not None for loss in results["evaluations"]["full"]["loss_by_position"])


def worth(results: dict[str, Any], name: str) -> list[float]:
    """Loss from the whole context less that of the same tokens from its end alone, by eighth: below 0 is a gain."""
    whole, cut = (losses_by_eighth(results, name, kind)[1:] for kind in (False, True))
    return [a - b for a, b in zip(whole, cut, strict=True)]


def _of(losses: dict[Any, float], step: int) -> float:
    return losses[step] if step in losses else losses[str(step)]  # JSON's keys are text


def _first(losses: dict[Any, float]) -> float:
    return _of(losses, min(map(int, losses)))


def _last(losses: dict[Any, float]) -> float:
    return _of(losses, max(map(int, losses)))


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
