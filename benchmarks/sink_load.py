"""Why queries are not sent to the owners of blocks: the work of each context rank, had they been, by a model's picks.

    python benchmarks/sink_load.py --run runs/tiny-... --data data/stdlib --picture sink.png
    python benchmarks/sink_load.py --run models/SmolLM2 --data data/smol --routing 64 4    what full layers would pick

The first design of MoBA's authors sent every query to the ranks that hold its picked blocks (here: the r-th of c equal
parts of the row to rank r). In this project a query's work stays where the query is, under a zigzag layout. Both are
counted in (query, key) pairs, from the picks of a trained model on the beginnings of validation documents. A number is
the busiest rank's pairs over the mean rank's, the mean over all calls of attention (row x MoBA layer): ranks wait for
each other at each.

Letters: T tokens of a row, H query heads, K picks.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moba_train import device as devices
from moba_train.attention import SequenceInfo, select_blocks
from moba_train.context_parallel.layout import zigzag

Call = tuple[Tensor, SequenceInfo, int]  # picks [T, H, K] of a row in a layer, the row, the block size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="a run folder, a step folder or a Hugging Face folder")
    parser.add_argument("--data", required=True, help="a prepared folder of the model's tokens")
    parser.add_argument(
        "--routing",
        type=int,
        nargs=2,
        metavar=("BLOCK_SIZE", "TOP_K"),
        help="what every layer would pick, full ones too; otherwise, what the MoBA layers pick",
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--picture", type=Path, help="draw the load of the largest number of ranks here")
    options = parser.parse_args()
    routing = dict(zip(("block_size", "top_k"), options.routing, strict=True)) if options.routing else None
    calls = picks_of(options.run, options.data, options.length, options.documents, routing)
    picked, chance = sink_share(calls)
    share = f"{picked:.0%} pick the first block, {chance:.0%} would by chance"
    print(f"{len(calls)} calls of attention; of their queries with a choice {share}")
    print("| ranks | queries sent to the owners of blocks | queries stay (zigzag) |\n|---|---|---|")
    for size in options.ranks:
        sent, stay = zip(*(pair_loads(*call, size) for call in calls), strict=True)
        print(f"| {size} | {statistics.mean(map(busiest, sent)):.2f} | {statistics.mean(map(busiest, stay)):.2f} |")
        if options.picture and size == max(options.ranks):
            draw(options.picture, mean_load(sent), mean_load(stay))


def picks_of(run: str, data: str, length: int, count: int, routing: dict[str, int] | None) -> list[Call]:
    """Every MoBA layer's picks (or, by `routing`, every layer's) on the first `length` tokens of validation documents.

    Layers attend as the model says, either way.
    """
    from moba_train.eval.documents import Documents
    from moba_train.eval.model import close, find_source, hidden_states, open_model
    from moba_train.eval.position_loss import documents_of_length
    from moba_train.model.core_attention import CoreAttention, RowParams, observed_by
    from moba_train.model.layer_plan import LayerKind
    from moba_train.model.rope import rotary_table

    documents = Documents(data)
    source = find_source(run, [])
    documents.check_model(source.config.model.vocab_size, source.tokenizer)
    texts = documents_of_length(documents, length, count)
    model = open_model(source)
    found: list[Call] = []

    def watch(module: CoreAttention, q_THD: Tensor, k_TGD: Tensor, seq: SequenceInfo) -> None:
        if routing or module.layer.kind is LayerKind.MOBA:
            chosen = routing or module.layer.routing
            picks_THK = select_blocks(q_THD, k_TGD, seq, **chosen)
            found.append((picks_THK.cpu(), seq, chosen["block_size"]))

    positions_T = torch.arange(length, device=model.device)
    rotary = rotary_table(positions_T, model.frequencies)
    with observed_by(watch, [model.gpt]):
        for document in texts:
            params = RowParams(qkv_format="thd", sequence=SequenceInfo([0, length]), rotary=rotary)
            hidden_states(model, documents.read(document, length).to(model.device), positions_T, params)
    close()
    return found


def sink_share(calls: list[Call]) -> tuple[float, float]:
    """Of the queries with more earlier blocks than picks for them, the share that picks block 0, and if at random."""
    picked, chance = [], []
    for picks_THK, seq, block_size in calls:
        own_T, earlier = seq.blocks(block_size).own_T, picks_THK.shape[2] - 1
        choice_T = own_T > earlier
        picked.append((picks_THK[choice_T] == 0).any(-1).float().mean())
        chance.append((earlier / own_T[choice_T]).mean())
    return float(torch.stack(picked).mean()), float(torch.stack(chance).mean())


def pair_loads(picks_THK: Tensor, seq: SequenceInfo, block_size: int, size: int) -> tuple[Tensor, Tensor]:
    """(query, key) pairs by rank: if a block's owner (contiguous shards) did its work, and if the query's rank does."""
    table = seq.blocks(block_size)
    blocks = picks_THK.long().clamp(min=0)
    rows_T = torch.arange(seq.num_keys)
    seen = torch.minimum(rows_T[:, None, None] + 1, table.end_N[blocks]) - table.start_N[blocks]
    pairs_THK = seen * (picks_THK >= 0)
    owner = table.start_N[blocks] * size // seq.num_keys
    sent = torch.zeros(size, dtype=torch.int64).index_add_(0, owner.flatten(), pairs_THK.flatten())
    own_T, layout = pairs_THK.sum((1, 2)), zigzag(seq.num_keys, size)
    return sent.double(), torch.stack([own_T[layout.positions(rank)].sum() for rank in range(size)]).double()


def busiest(load: Tensor) -> float:
    return float(load.max() / load.mean())


def mean_load(loads: Sequence[Tensor]) -> Tensor:
    """Each rank's load over the mean rank's, the mean of all calls."""
    return torch.stack([load / load.mean() for load in loads]).mean(0)


def draw(path: Path, sent: Tensor, stay: Tensor) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for shift, (label, load) in enumerate((("queries sent to block owners", sent), ("queries stay (zigzag)", stay))):
        axes.bar([rank + 0.4 * shift for rank in range(len(load))], load.tolist(), 0.4, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="context rank", ylabel="work / mean")
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    devices.quiet_imports()
    main()
