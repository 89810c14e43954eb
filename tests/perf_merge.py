"""`make perf`, second part: the streaming merge beside a plain copy and beside mergekit, on random checkpoints of 558 M weights.

Wall and CPU time from end to end, merges in processes of their own, all sides in turn, from a warm page cache; the linear merge
also beside a core that something else keeps busy. It takes about 10 GB of disk for some minutes. mergekit is an optional extra:
MERGEKIT names its command, and without it that comparison is not made.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from perf import Line
from safetensors.torch import save_file

REPEATS = 5
WIDTH, MLP, LAYERS, VOCABULARY = 1280, 3456, 24, 32000
SHARDS = 3
# Not getrusage's maximum: a started process inherits it from the one that starts it, which has made checkpoints here.
NOTED = "from pathlib import Path; print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
OURS = f"import sys; from vlsafe import cli; code = cli.main(sys.argv[1:]); {NOTED}; sys.exit(code)"


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of 558 M weights."""
    found = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        found |= {f"{block}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        found |= {f"{block}mlp.{name}_proj.weight": (MLP, WIDTH) for name in ("gate", "up")}
        found |= {f"{block}mlp.down_proj.weight": (WIDTH, MLP)}
        found |= {f"{block}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return found


def written(folder: Path, seed: int, away: float) -> Path:
    """A random checkpoint in bf16: the same one for every seed, and `away` from it by the seed's own noise."""
    folder.mkdir()
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=WIDTH, intermediate_size=MLP, vocab_size=VOCABULARY,
        num_hidden_layers=LAYERS, num_attention_heads=20, num_key_value_heads=20, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names, mapped = sorted(shapes()), {}
    for shard in range(SHARDS):
        file, part = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors", {}
        for name in names[shard::SHARDS]:
            common, own = (torch.Generator().manual_seed(hash_of(name) + s) for s in (0, 1000 * seed))
            value = 0.02 * torch.randn(shapes()[name], generator=common) + away * torch.randn(shapes()[name], generator=own)
            part[name], mapped[name] = value.bfloat16(), file
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    return folder


def hash_of(name: str) -> int:
    return sum(ord(letter) * place for place, letter in enumerate(name, 1))


def copied(folders: Sequence[Path], out: Path) -> None:
    """A plain copy of the inputs and of one output as large as one of them."""
    for number, folder in enumerate([*folders, folders[0]]):
        shutil.copytree(folder, out / str(number))


def merged_by_us(rule: str, folders: Mapping[str, Path], out: Path) -> int:
    """The whole command; peak memory in bytes."""
    base = ["--base", str(folders["base"])] if "base" in folders else []
    call = ["merge", rule, str(folders["a"]), str(folders["b"]), "--ratio", "0.5", *base, "--out", str(out / "merged")]
    told = subprocess.run([sys.executable, "-c", OURS, *call], check=True, capture_output=True, text=True).stdout
    return 1024 * int(told.split()[-1])


def merged_by_mergekit(rule: str, folders: Mapping[str, Path], out: Path, command: str) -> None:
    models = [{"model": str(folders[which]), "parameters": {"weight": 0.5, "density": 0.2}} for which in "ab"]
    asked = {"merge_method": rule, "models": models, "dtype": "bfloat16"}
    if "base" in folders:
        asked |= {"base_model": str(folders["base"]), "parameters": {"normalize": True}}
    (out / "asked.yaml").write_text(json.dumps(asked))  # JSON is YAML
    subprocess.run([command, str(out / "asked.yaml"), str(out / "merged")], check=True, capture_output=True)


def seconds(work: Callable[[Path], object], place: Path) -> tuple[float, float, object]:
    """Wall time and CPU time of one piece of work, child processes included, in an empty folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        start, used = time.perf_counter(), sum(os.times()[:4])
        told = work(Path(folder))
        return time.perf_counter() - start, sum(os.times()[:4]) - used, told


@contextmanager
def busy_core() -> Iterator[None]:
    """Something else on one core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def compared(
    rule: str, folders: Mapping[str, Path], place: Path, mergekit: str | None, bound: float, where: str = ""
) -> list[Line]:  # fmt: skip
    """Our merge beside a copy and beside mergekit, in turn; and our memory beside one shard and a GiB."""
    works: dict[str, Callable[[Path], object]] = {
        "copy": lambda out: copied(list(folders.values()), out),
        "ours": lambda out: merged_by_us(rule, folders, out),
        "mergekit": lambda out: merged_by_mergekit(rule, folders, out, mergekit),
    }
    took: dict[str, list[float]] = {name: [] for name in works if name != "mergekit" or mergekit}
    used: dict[str, list[float]] = {name: [] for name in took}
    peaks = []
    for _ in range(REPEATS):
        for name in took:
            spent, cpu, told = seconds(works[name], place)
            took[name].append(spent)
            used[name].append(cpu)
            peaks += [told] if name == "ours" else []
    shard = max(path.stat().st_size for path in folders["a"].glob("*.safetensors"))
    for what, times in (("wall", took), ("CPU", used)):
        print(f"  {rule}, median seconds, {what}: { ({name: round(statistics.median(t), 2) for name, t in times.items()}) }")
    print(
        f"  {rule}: peak {max(peaks) / 2**20:.0f} MiB, shard {shard / 2**20:.0f} MiB, load {os.getloadavg()[0]:.1f}", flush=True
    )
    lines = [Line(f"{rule}, beside a copy of its inputs and output{where}", _ratios(took["ours"], took["copy"]), bound, True)]
    for what, times in (("wall", took), ("CPU", used)) if mergekit else ():
        lines.append(Line(f"mergekit {rule}, beside ours, {what}{where}", _ratios(times["mergekit"], times["ours"]), 3.0, False))
    limit = shard + 2**30
    return [*lines, Line(f"{rule}, peak memory beside one shard + 1 GiB{where}", [peak / limit for peak in peaks], 1.0, True)]


def _ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def main() -> int:
    mergekit = shutil.which(os.environ.get("MERGEKIT", "mergekit-yaml"))
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" + ("" if mergekit else "; mergekit is not installed"))
    with tempfile.TemporaryDirectory(dir=os.environ.get("PERF_DISK")) as folder:
        place = Path(folder)
        folders = {"a": written(place / "a", 1, 2e-3), "b": written(place / "b", 2, 2e-3), "base": written(place / "base", 3, 0)}
        two = {which: folders[which] for which in "ab"}
        lines = [*compared("linear", two, place, mergekit, 3.0), *compared("ties", folders, place, mergekit, 6.0)]
        with busy_core():
            lines += compared("linear", two, place, mergekit, 3.0, ", busy core")
    print(*lines, sep="\n")
    return 0 if all(line.held for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
