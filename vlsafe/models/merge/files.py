"""Streaming merge of checkpoints: tensor by tensor and in pieces, written completely or not at all, without a model in memory.

The result has the shards, names and precisions of A; it needs no more memory than one tensor in fp32 and a few pieces. Damage
is detected in headers and lengths, in weights that are not finite, and in any byte where a digest was recorded, in a vlsafe
manifest or as the name of a Hub blob. The format has no checksum: elsewhere a flipped bit that leaves a number goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlsafe.core import store
from vlsafe.core.scale import known
from vlsafe.models.merge import inputs
from vlsafe.models.merge.inputs import FLOATS, Checkpoint, Rows, checkpoint
from vlsafe.models.merge.rules import RULES, How, refuse_unweighed, seed_of, streams
from vlsafe.models.weights import Entry, header, listed, read_tensor, refuse_pointer

PIECE = 2**18  # elements; some fp32 pieces fit into a processor's cache
BESIDE = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, processor, template; never code
LEFT = (store.MANIFEST, "trainer_state.json", "adapter_config.json", "config.json")  # the config is written last


class Plan(NamedTuple):
    """A merge: the rule's name, the models as "a", "b" and "base", its numbers, the seed, the rows of embedding and head where
    not all are merged, the Fisher information of a and of b where it weighs; `measured` are numbers of tensors, as they come."""

    rule: str
    models: Mapping[str, Checkpoint]
    how: How
    seed: int
    rows: Mapping[str, Rows]
    fisher: Sequence[Mapping[str, Entry]]
    measured: dict[str, float]

    def merges(self, key: str) -> bool:
        """Whether a tensor of A is merged: not where it is not the language model's, no number, or empty."""
        entry = self.models["a"].tensors[key]
        return key in self.models["a"].keys and entry.dtype in FLOATS and 0 not in entry.shape


def merge(
    name: str, folders: Mapping[str, Path], out: Path, how: How, seed: int = 0, language_only: bool = False,
    fisher: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """Merge the checkpoints `folders["a"]` and `["b"]`, with `["base"]` where the rule asks for it, into the folder `out`; files
    of the `fisher` information of both where it weighs them.

    With `language_only` everything but the language model comes from A, and B and the base may be plain language models, or
    others of its kind. Their vocabularies may be padded differently: rows that all models have are merged, the rest is A's.

    Returns counts of A's tensors: `merged` by the rule; `copied`, as they are no numbers, empty or derived; `left`, as they are
    not the language model's; and `changed`, of the merged ones. `rows` says of which tensors a part is merged, `measured` the
    numbers that a rule tells of tensors, by their names.

    Raises:   ValueError before a byte is written where names, shapes, decoders or vocabularies differ, a task vector is zero, a
              file is damaged, or `out` exists or overlaps an input; ValueError naming the tensor, and nothing stays, where a
              weight is not finite, before or after; ValueError where nothing has changed
    """
    plan = _planned(name, folders, Path(out), how, seed, language_only, fisher)
    before = torch.get_num_threads()  # elementwise work on pieces has nothing to divide: other threads would wait for it busily
    torch.set_num_threads(before if RULES[name].whole else 1)
    try:
        return _merged(plan, Path(out), language_only)
    finally:
        torch.set_num_threads(before)


def _merged(plan: Plan, out: Path, language_only: bool) -> dict[str, Any]:
    """Write the result, shard by shard, and tell of it."""
    a, changed = plan.models["a"], set[str]()
    with store.whole(out) as work:
        files = {shard.name: _shard(plan, shard, work / shard.name, changed) for shard in a.shards}
        if not changed:
            raise ValueError(f"nothing has changed: the result is {a.folder}, weight by weight; is b the same, or its weight 0?")
        for path in _beside(a):
            shutil.copyfile(path, work / path.name)
        merged = [key for key in a.tensors if plan.merges(key)]
        left = [key for key in a.tensors if language_only and key not in a.keys and not inputs.DERIVED.search(key)]
        counts = {"merged": len(merged), "copied": len(a.tensors) - len(merged) - len(left), "left": len(left)}
        record = {"rule": plan.rule, **plan.how._asdict(), "seed": plan.seed, "language_only": language_only} | counts
        record["measured"] = plan.measured
        store.write_text(work / store.MANIFEST, json.dumps({"merge": record, "files": files}, indent=1) + "\n")
        shutil.copyfile(a.folder / "config.json", work / "config.json")
    sizes = {"tensors": len(a.tensors), "bytes": sum(file["bytes"] for file in files.values()), "shards": len(files)}
    rows = {a.tensors[key].name: rows for key, rows in plan.rows.items()}
    return {**sizes, **counts, "changed": len(changed), "rows": rows, "measured": plan.measured}


def sentence(result: Mapping[str, Any]) -> str:
    """What a merge did, in a line."""
    same = result["merged"] - result["changed"]
    parts = [
        f"{result['tensors']} tensors: {result['merged']} merged{f' ({same} of them as before)' if same else ''}, "
        f"{result['copied']} copied, {result['left']} left alone",
        *(f"of {name} {rows}" for name, rows in result["rows"].items()),
        f"{result['bytes'] / 2**20:.0f} MiB in {result['shards']} shard(s)",
    ]
    if values := result["measured"].values():
        parts.append(f"singular task interference of {len(values)} matrices: mean {sum(values) / len(values):.4g}")
    return "; ".join(parts)


def _planned(
    name: str, folders: Mapping[str, Path], out: Path, how: How, seed: int, language_only: bool, fisher: Sequence[Path]
) -> Plan:  # fmt: skip
    """Read what is to be merged, and refuse what cannot be."""
    rule = RULES[known(name, RULES, "merge rule")]
    how.checked(rule.beyond)
    refuse_unweighed(name, len(fisher))
    if rule.based != ("base" in folders):
        raise ValueError(f"{name} {'needs a base' if rule.based else 'has no use for a base'} (--base)")
    models = {which: checkpoint(folder, language_only) for which, folder in folders.items()}
    inputs.refuse_overlap(out, models)
    models = {which: model if which == "a" else inputs.like(models["a"], model) for which, model in models.items()}
    inputs.refuse_different(models, language_only)
    for path in _beside(models["a"]):
        refuse_pointer(path)
    for model in models.values():
        inputs.verify(model)
    rows = inputs.shared_rows(models) if language_only else {}
    inputs.refuse_zero(models, rows)
    weighing = [inputs.diagonal(path, models[which], language_only) for which, path in zip("ab", fisher, strict=False)]
    return Plan(name, models, how, seed, rows, weighing, {})


def _beside(model: Checkpoint) -> list[Path]:
    """What is copied from A: tokenizer, processor, and the index that tells of its shards, not one of other files."""
    used = listed(model.folder)[0]
    return sorted(
        path for path in model.folder.iterdir()
        if path.suffix in BESIDE and path.name not in LEFT and path.is_file()
        and (path.name == used or not path.name.endswith(".index.json"))
    )  # fmt: skip


def _pieces(entries: Sequence[Entry | None], rows: list[int] | None, whole: bool = False) -> Iterator[Any]:
    """The flat fp32 pieces of tensors of one shape, or of some of their rows; None for one that is None. `whole`: all of each, in
    its shape."""
    flat: list[Any] = [None if entry is None else _read(entry, rows) for entry in entries]
    if whole:
        shape = entries[0].shape if rows is None else (len(rows), *entries[0].shape[1:])  # type: ignore[union-attr]
        yield tuple(None if values is None else values.reshape(shape).float() for values in flat)
        return
    for start in range(0, len(flat[0]), PIECE):
        yield tuple(None if values is None else values[start : start + PIECE].float() for values in flat)


def _read(entry: Entry, rows: list[int] | None = None) -> torch.Tensor:
    """A flat tensor, or some of its rows, in their order."""
    tensor = read_tensor(entry[:2])
    if rows is not None:
        tensor = tensor[: len(rows)] if rows == [*range(len(rows))] else tensor[rows]
    return tensor.reshape(-1)


def _combined(plan: Plan, key: str) -> Iterator[torch.Tensor]:
    """The pieces of one merged tensor, in A's precision.

    Raises:   ValueError naming a tensor with a weight that is not finite, before or after
    """
    rule, seeds = RULES[plan.rule], seed_of(plan.seed, inputs.seed_name(plan.models["a"], key))
    entries = [plan.models[which].tensors[key] if which in plan.models else None for which in ("a", "b", "base")]
    entries += (weighing := [of[key] for of in plan.fisher])
    own, rows = plan.models["a"].tensors[key], plan.rows[key].shared() if key in plan.rows else None

    def pieces(sound: bool = True) -> Iterator[Any]:
        for piece in _pieces(entries, rows, rule.whole):
            for entry, values in zip(entries, piece, strict=True):
                if sound and entry and not finite(values):
                    raise ValueError(f"{entry.shard} is damaged: {entry.name} has weights that are not finite")
                if sound and entry in weighing and (values < 0).any():
                    raise ValueError(f"{entry.shard} is no Fisher information: {entry.name} has negative values")
            yield piece

    summary, draws = rule.summarise(lambda: pieces(rule.whole), plan.how, streams(seeds)), streams(seeds)
    if (value := rule.measure(summary)) is not None:
        plan.measured[own.name] = value
    results = (rule.combine(*piece, plan.how, summary, draws).to(FLOATS[own.dtype]).reshape(-1) for piece in pieces())
    for result in results if rows is None or not plan.rows[key].own else _among(own, rows, results):
        if not finite(result.float()):
            raise ValueError(f"{own.name} would not be finite in {own.dtype}, though all models' weights are; is B larger, or λ?")
        yield result
    if rows is not None and not plan.rows[key].own:
        yield _read(own)[len(rows) * (own.shape[1] if len(own.shape) > 1 else 1) :]


def _among(own: Entry, rows: list[int], results: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """All rows of A's as one piece, those that are merged among them."""
    table = _read(own).reshape(own.shape).clone()
    table[rows] = torch.cat([*results]).reshape(len(rows), *own.shape[1:])
    yield table.reshape(-1)


def finite(values: torch.Tensor) -> bool:
    """Whether all numbers are finite; their sum tells it faster where it is."""
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())


def _tensor(plan: Plan, key: str, changed: set[str]) -> Iterator[torch.Tensor]:
    """The pieces of one tensor of the result; its name is added to `changed` where they are not A's."""
    own = _read(plan.models["a"].tensors[key])
    if not plan.merges(key):
        yield own
        return
    start = 0
    for piece in _combined(plan, key):
        mine = own[start : start + len(piece)]
        if key not in changed and not torch.equal(piece, mine):
            changed.add(key)
        start += len(piece)
        yield piece


def _shard(plan: Plan, shard: Path, out: Path, changed: set[str]) -> dict[str, Any]:
    """Write one shard: A's header, which fits the result byte by byte, then every tensor in its place."""
    keys = {entry.name: key for key, entry in plan.models["a"].tensors.items() if entry.shard == shard}
    first, entries = header(shard)
    hashed = hashlib.sha256(first)

    def write(piece: torch.Tensor) -> None:
        data = memoryview(piece.contiguous().view(torch.uint8).numpy())
        write_all(file.write, data)
        hashed.update(data)

    try:
        with open(out, "xb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
            write_all(file.write, memoryview(first))
            written = writer.submit(lambda: None)
            for piece in (piece for name in entries for piece in _tensor(plan, keys[name], changed)):
                written.result()  # the next piece is computed while this one is written and hashed
                written = writer.submit(write, piece)
            written.result()
            if file.tell() != shard.stat().st_size:
                raise OSError(None, f"{file.tell()} of {shard.stat().st_size} bytes were written")
            return {"bytes": file.tell(), "sha256": hashed.hexdigest()}
    except OSError as error:
        raise OSError(
            error.errno, f"{shard.name} could not be written, and nothing is kept: {error.strerror or error}"
        ) from error


def write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    """Write all bytes: one call writes 2 GiB at most, and less where a disk or a limit ends, whose error the next call tells."""
    while data:
        n = write(data)
        if not n:
            raise OSError(None, f"the system took none of {len(data)} bytes")
        data = data[n:]
