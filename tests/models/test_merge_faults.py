"""What a merge must not do in silence: other files than transformers would load, names it does not know, half-written results,
inputs that are written to, numbers that are not finite."""

import errno
import io
import json
import os
import resource
import shutil

import pytest
import torch
from families import built, parent, saved
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vlsafe import cli
from vlsafe.core import store
from vlsafe.models import checkpoints, weights
from vlsafe.models.merge import files, fisher, inputs
from vlsafe.models.merge.rules import RULES, How, merged

BLOCK = "model.layers.0.mlp.up_proj.weight"


def plain(folder, seed, dtype=torch.float32, scale=1.0, kind="llama", **more):
    """A few tensors of a decoder in one file."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    shapes = {BLOCK: (6, 4), "model.norm.weight": (4,), "model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)}
    tensors = {name: (scale * torch.randn(shape, generator=draw)).to(dtype) for name, shape in shapes.items()} | more
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.fixture
def pair(tmp_path):
    """Folders of two models and their base, with their tensors."""
    tensors = {name: plain(tmp_path / name, seed) for seed, name in enumerate(("a", "b", "base"))}
    return {name: tmp_path / name for name in tensors}, tensors


def digests(*folders):
    return {path: store.file_digest(path) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(folders, match, rule="linear", out=None, how=None, language_only=False, error=ValueError):
    """A merge that fails, says why, changes no input and leaves no result."""
    place = out or next(iter(folders.values())).parent / "out"
    places = place, place.with_name(f"{place.name}.partial")
    before, there = digests(*folders.values()), [os.path.lexists(path) for path in places]
    with pytest.raises(error, match=match):
        files.merge(rule, folders, place, how or How(0.5), language_only=language_only)
    assert digests(*folders.values()) == before and [os.path.lexists(path) for path in places] == there


def ab(folders):
    return {which: folders[which] for which in "ab"}


def test_an_index_beside_a_single_file_is_not_looked_at(pair, tmp_path):
    """F5: transformers loads model.safetensors; so does the merge, and drift; the index is not handed on."""
    folders, tensors = pair
    old = {name: torch.full_like(value, 9.0) for name, value in tensors["b"].items()}
    for which in "ab":
        save_file(old, folders[which] / "model-1.safetensors")
        mapped = dict.fromkeys(old, "model-1.safetensors")
        (folders[which] / weights.INDEX).write_text(json.dumps({"weight_map": mapped}))
    files.merge("linear", ab(folders), tmp_path / "out", How(1.0))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors["b"].items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "manifest.json", "model.safetensors"}
    places = checkpoints.language_places(folders["b"])
    assert {file.name for file, _ in places.values()} == {"model.safetensors"}
    (folders["b"] / "config.json").write_text('{"model_type": "llama", "transformers_weights": "model-1.safetensors"}')
    files.merge("linear", ab(folders), tmp_path / "named", How(1.0))
    assert load_file(tmp_path / "named" / "model.safetensors")["model.norm.weight"].tolist() == [9.0] * 4


def test_files_are_those_that_transformers_loads(tmp_path):
    """F5 against the library itself, with whole models."""
    for seed, name in enumerate(("new", "old")):
        saved(parent("llava", seed), tmp_path / name, max_shard_size="20KB" if name == "old" else "1GB")
    for path in (tmp_path / "old").glob("model*"):
        path.rename(tmp_path / "new" / path.name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    for entry in weights.entries(tmp_path / "new"):
        assert torch.equal(weights.read_tensor(entry[:2]), loaded[entry.name])
    (tmp_path / "new" / "model.safetensors").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    entries = weights.entries(tmp_path / "new")
    assert len({entry.shard for entry in entries}) > 3
    assert all(torch.equal(weights.read_tensor(entry[:2]), loaded[entry.name]) for entry in entries)


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"metadata": {}}', "no `weight_map`"),
        ('{"weight_map": []}', "no `weight_map`"),
        ('{"weight_map": {"w": 3}}', "no `weight_map`"),
        ("[1]", "holds no JSON object"),
        ('{"weight_map"', "is not JSON, or is cut short"),
        ('{"weight_map": {"w": "../a/model.safetensors"}}', "names files outside the folder"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "gone.safetensors is missing"),
    ],
)
def test_a_damaged_index_is_named(pair, text, match):
    """F22."""
    folders, _ = pair
    (folders["b"] / "model.safetensors").unlink()
    (folders["b"] / weights.INDEX).write_text(text)
    refused(ab(folders), match, error=(ValueError, FileNotFoundError))


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "is not JSON, or is cut short"),
        ("[]", "holds no JSON object"),
        (
            '{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}',
            "is no config of the type 'llama': The hidden size",
        ),
        ('{"model_type": ["llama"]}', r"has the model_type \['llama'\], which should be a name"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is no config of the type 'llama': .*hidden_size"),
    ],
)
def test_a_damaged_config_is_named(pair, text, match):
    folders, _ = pair
    (folders["b"] / "config.json").write_text(text)
    refused(ab(folders), rf"b/config\.json {match}")


def test_what_is_no_model_is_called_what_it_is(pair, tmp_path, capsys):
    """F24: a LoRA folder, Git LFS pointers, pickles, no folder, a file."""
    folders, _ = pair
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    lora, bins = tmp_path / "lora", tmp_path / "bins"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    save_file({"base_model.model.w": torch.ones(2)}, lora / "adapter_model.safetensors")
    bins.mkdir()
    (bins / "config.json").write_text("{}")
    (bins / "pytorch_model.bin").write_bytes(b"x")
    for b, match in (
        (lora, "is a LoRA adapter of some/base: add it to its base first"),
        (bins, "its weights are pickles"),
        (tmp_path / "gone", "there is no such folder"),
        (folders["b"] / "model.safetensors", "it is a file, name its folder"),
    ):
        call = ["merge", "linear", str(folders["a"]), str(b), "--ratio", "0.5", "--out", str(tmp_path / "out")]
        assert cli.main(call) == 2 and match in capsys.readouterr().err
    for which, name in (("b", "model.safetensors"), ("b", "config.json"), ("a", "tokenizer.json"), ("a", "tokenizer.model")):
        path = folders[which] / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(pointer)
        refused(ab(folders), rf"{name} is a Git LFS pointer, not the file itself; `git lfs pull`")
        path.unlink() if before is None else path.write_bytes(before)
    files.merge("linear", ab(folders), tmp_path / "out", How(0.5))


class Short(io.FileIO):
    """A file whose `write` takes at most `most` bytes, as Linux takes at most 2 GiB."""

    most = 7

    def write(self, data):
        return super().write(memoryview(data)[: self.most])


def test_short_writes_are_completed(pair, tmp_path, monkeypatch):
    """F4: merged tensors, tensors that are copied whole, and the header."""
    folders, tensors = pair
    for which in "ab":
        save_file(tensors[which] | {"model.ids": torch.arange(5000)}, folders[which] / "model.safetensors")
    monkeypatch.setattr(files, "open", lambda path, mode, **_: Short(path, mode.replace("b", "")), raising=False)
    files.merge("linear", ab(folders), tmp_path / "out", How(0.5))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[BLOCK], torch.lerp(tensors["a"][BLOCK], tensors["b"][BLOCK], 0.5))
    assert torch.equal(found["model.ids"], torch.arange(5000))
    inputs.verify(inputs.checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("problem", ["full", "none", "cut"])
def test_a_full_disk_a_dead_one_and_a_file_that_ends_early_are_errors(pair, problem, monkeypatch):
    """F4."""
    folders, _ = pair

    class Ending(Short):
        def write(self, data):
            if self.tell() > 100 and problem != "cut":
                if problem == "none":
                    return 0
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    if problem == "cut":
        monkeypatch.setattr(files, "write_all", lambda write, data: write(data))  # as it was before
    monkeypatch.setattr(files, "open", lambda path, mode, **_: Ending(path, mode.replace("b", "")), raising=False)
    says = {"full": "No space left", "none": "took none of", "cut": "bytes were written"}[problem]
    refused(ab(folders), rf"model.safetensors could not be written, and nothing is kept: .*{says}", error=OSError)


def test_a_limit_on_the_size_of_files_is_an_error(tmp_path, capsys):
    """F4: under `ulimit -f` a first write is short and the next one fails."""
    for seed, which in enumerate("ab"):
        plain(tmp_path / "large" / which, seed, **{"model.layers.1.mlp.up_proj.weight": torch.full((512, 512), seed + 1.0)})
    call = [
        "merge",
        "linear",
        *(str(tmp_path / "large" / which) for which in "ab"),
        "--ratio",
        "0.5",
        "--out",
        str(tmp_path / "out"),
    ]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        assert cli.main(call) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == "vlsafe: model.safetensors could not be written, and nothing is kept: File too large\n"
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_nothing_that_is_read_is_written_to(pair, tmp_path):
    """The result inside an input, through a link, and where what is left of a killed merge would be removed."""
    folders, _ = pair
    a, b = folders["a"], folders["b"]
    (tmp_path / "link").symlink_to(a)
    (tmp_path / "nothing").symlink_to(tmp_path / "not there")
    overlap = "would be written where a is read"
    refused(ab(folders), overlap, out=a / "out")
    refused(ab(folders), overlap, out=a / "deep" / "out")
    refused(ab(folders), overlap, out=tmp_path / "link" / "out")
    refused({"a": tmp_path / "link", "b": b}, overlap, out=a / "out")
    for out in (a, tmp_path / "link", tmp_path / "nothing"):
        refused(ab(folders), "exists; choose another place, or remove it", out=out)
    a.rename(tmp_path / "out.partial")
    refused({"a": tmp_path / "out.partial", "b": b}, overlap, out=tmp_path / "out")
    shard = tmp_path / "out.partial" / "model.safetensors"
    a.mkdir()
    (a / "config.json").write_text('{"model_type": "llama"}')
    (a / "model.safetensors").symlink_to(shard)
    refused(ab(folders), overlap, out=tmp_path / "out")
    (tmp_path / ".new.lock").symlink_to(shard)
    refused(ab(folders), overlap, out=tmp_path / "new")
    assert shard.stat().st_size > 100


def test_a_result_shares_no_file_with_an_input(pair, tmp_path):
    """Hard links and links into a cache: the result's files are its own."""
    folders, tensors = pair
    blob = tmp_path / "blob"
    (folders["a"] / "model.safetensors").rename(blob)
    os.link(blob, folders["a"] / "model.safetensors")
    (folders["a"] / "tokenizer_config.json").symlink_to(folders["a"] / "config.json")
    (folders["a"] / "folder.json").mkdir()
    before = digests(folders["a"], folders["b"])
    files.merge("linear", ab(folders), tmp_path / "out", How(0.5))
    assert digests(folders["a"], folders["b"]) == before and torch.equal(load_file(blob)[BLOCK], tensors["a"][BLOCK])
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_nlink == 1 and not path.is_symlink()


def test_results_that_are_not_finite_are_refused_by_name(pair, tmp_path, capsys):
    """F21: half precision cannot hold B's numbers; λ that is no number."""
    folders, _ = pair
    large = torch.full((6, 4), 1e6)
    plain(tmp_path / "half", 0, torch.float16)
    plain(tmp_path / "large", 1, scale=1.0, **{BLOCK: large})
    refused({"a": tmp_path / "half", "b": tmp_path / "large"}, rf"{BLOCK} would not be finite in F16")
    refused(folders, "would not be finite in F32", "task_arithmetic", how=How(0.5, scaling=1e39))
    for value in ("nan", "inf", "-inf"):
        call = [
            "merge",
            "task_arithmetic",
            str(folders["a"]),
            str(folders["b"]),
            "--base",
            str(folders["base"]),
            "--ratio",
            "0.5",
        ]
        assert cli.main([*call, f"--scaling={value}", "--out", str(tmp_path / "out")]) == 2
        assert f"scaling is a finite number, not {value}" in capsys.readouterr().err
    for name in ("ratio", "kept", "survived"):
        refused(folders, f"{name} is a share", "ties", how=How()._replace(**{name: float("nan")}))


@pytest.mark.parametrize("rule", ["linear", "ties", "dare_ties_l1", "model_stock"])
def test_empty_tensors_and_single_numbers(rule, tmp_path):
    """F22: no entry to trim."""
    more = {"model.layers.0.empty": torch.zeros(0, 4), "model.layers.0.one": torch.tensor(3.0), "model.ids": torch.arange(3)}
    folders = {name: tmp_path / name for name in ("a", "b", "base")}
    for seed, name in enumerate(folders):
        plain(folders[name], seed, **more | {"model.layers.0.one": torch.tensor(float(seed))})
    result = files.merge(rule, folders if rule != "linear" else ab(folders), tmp_path / "out", How(0.5))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["model.layers.0.empty"].shape == (0, 4) and found["model.layers.0.one"].shape == ()
    assert (result["merged"], result["copied"], result["left"]) == (5, 2, 0)


def test_derived_buffers_are_not_compared(tmp_path):
    """F8: files of the first Llama-2 hold the rotary frequencies of every block, old ones of CLIP the places of patches."""
    buffers = {"rotary_emb.inv_freq": torch.ones(4)}
    model, text = built("llava"), parent("llava", 1)
    saved(model, tmp_path / "a", "hub")
    a = load_file(tmp_path / "a" / "model.safetensors")
    a["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)
    save_file(a, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    saved(text, tmp_path / "b")
    b = load_file(tmp_path / "b" / "model.safetensors")
    b |= {f"model.layers.{i}.self_attn.{name}": value.clone() for i in range(3) for name, value in buffers.items()}
    save_file(b, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    result = files.merge("linear", {"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "out", How(1.0), language_only=True)
    assert (result["merged"], result["copied"]) == (len(b) - 3, 1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["language_model.lm_head.weight"], text.lm_head.weight)
    assert found["vision_tower.vision_model.embeddings.position_ids"].tolist() == [0, 1, 2, 3, 4]
    checkpoints.put_language(model, checkpoints.language_places(tmp_path / "b"))
    assert torch.equal(model.lm_head.weight, text.lm_head.weight)
    b2 = {name: value for name, value in b.items() if "inv_freq" not in name}
    (tmp_path / "c").mkdir()
    save_file({n: v + 1 for n, v in b2.items()}, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "c" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    whole = files.merge("linear", {"a": tmp_path / "b", "b": tmp_path / "c"}, tmp_path / "whole", How(0.5))
    assert (whole["merged"], whole["copied"]) == (len(b2), 3)


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_names_of_llavas_own_code_are_refused_with_the_remedy(kind, tmp_path):
    """F2: projector and tower lie under `model.` there, and were merged as if they were the language model."""
    more = {"model.mm_projector.0.weight": torch.ones(4, 4), "model.vision_tower.vision_tower.vision_model.w": torch.ones(3)}
    plain(tmp_path / "a", 0, kind=kind, **more)
    plain(tmp_path / "b", 1, kind=kind, **{name: value + 1 for name, value in more.items()})
    plain(tmp_path / "text", 2)
    for b in ("b", "text"):
        refused(
            {"a": tmp_path / "a", "b": tmp_path / b}, r"mm_projector\.0\.weight.*transformers' layout, whose name ends in -hf",
            language_only=True,
        )  # fmt: skip


def test_names_that_are_not_known_are_an_error_with_keys(tmp_path):
    """F1: of A, of B, in a model with pictures and in a plain one; two names for one tensor; messages have the files' names."""
    saved(built("qwen2_5_vl"), tmp_path / "a", "hub")
    saved(parent("qwen2_5_vl", 1), tmp_path / "b")
    whole = {which: load_file(tmp_path / which / "model.safetensors") for which in "ab"}

    def with_more(which, **more):
        kept = {name: value for name, value in (whole[which] | more).items() if value is not None}
        save_file(kept, tmp_path / which / "model.safetensors", metadata={"format": "pt"})

    pair = {which: tmp_path / which for which in "ab"}
    for which, name in (("a", "value_head.weight"), ("b", "model.score.weight"), ("a", "model.layers_extra.w")):
        with_more(which, **{name: torch.ones(2)})
        refused(pair, rf"of which it is not known to what part they belong \(1\): {name}", language_only=True)
        with_more(which)
    with_more("a", **{"model.language_model.norm.weight": torch.ones(32)})
    refused(pair, "holds one tensor under two names: model.*norm.weight and model.*norm.weight", language_only=True)
    with_more("a")
    with_more("a", **{"model.layers.0.mlp.new.weight": torch.ones(2)})
    refused(pair, r"only in a, not in b \(1\): model\.layers\.0\.mlp\.new\.weight", language_only=True)
    with_more("a")
    with_more("b", **{"model.norm.weight": None})
    refused(pair, r"only in a, not in b \(1\): model\.norm\.weight", language_only=True)
    with_more("b", **{"model.norm.weight": torch.ones(3)})
    refused(pair, r"other shapes in a and b \(1\): model\.norm\.weight \[32\] and \[3\]", language_only=True)
    with_more("b")
    assert files.merge("linear", pair, tmp_path / "out", How(0.5), language_only=True)["merged"] == len(whole["b"])


def test_a_merge_that_changes_nothing_is_an_error(pair, tmp_path, capsys):
    folders, tensors = pair
    same = {"a": folders["a"], "b": folders["a"]}
    refused(same, "nothing has changed: the result is .*a, weight by weight")
    refused(ab(folders), "nothing has changed", how=How(0.0))
    one = dict(tensors["a"])
    one["model.norm.weight"] = one["model.norm.weight"] + 1
    plain(tmp_path / "near", 0, **one)
    call = ["merge", "linear", str(folders["a"]), str(tmp_path / "near"), "--ratio", "0.5", "--out", str(tmp_path / "out")]
    assert cli.main(call) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: 4 tensors: 4 merged (3 of them as before), 0 copied, 0 left alone; 0 MiB in 1 shard(s)\n"
    )


def tokenizer(folder, words):
    added = [{"content": word, "id": i} for word, i in words.items() if word.startswith("<")]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": added}))


@pytest.mark.parametrize("piece", [5, 2**18])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_rows_of_tokens_that_one_model_lacks_are_as(piece, ratio, tmp_path, monkeypatch, capsys):
    """A has a token for pictures where the parent has an untrained row; in A rows 6 and 7 are the padding of a longer table."""
    monkeypatch.setattr(files, "PIECE", piece)
    a = plain(tmp_path / "a", 0)
    b = plain(tmp_path / "b", 1, **{name: torch.randn(6, 4) for name in ("lm_head.weight", "model.embed_tokens.weight")})
    words = {"w": 0, "x": 1, "y": 2, "z": 3}
    tokenizer(tmp_path / "a", words | {"<image>": 4})
    tokenizer(tmp_path / "b", words | {"<pad>": 5})
    pair = {which: tmp_path / which for which in "ab"}
    refused(pair, r"other tokens in a and b \(2\): '<image>', '<pad>'")
    call = [
        "merge",
        "linear",
        str(pair["a"]),
        str(pair["b"]),
        "--ratio",
        str(ratio),
        "--out",
        str(tmp_path / "out"),
        "--language-only",
    ]
    assert cli.main(call) == 0
    said = "of lm_head.weight the first 6 rows, without 2 whose tokens differ, the other 2 are A's; "
    assert said in capsys.readouterr().out
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        expected = a[name].clone()
        expected[:4] = torch.lerp(a[name][:4], b[name][:4], ratio)
        assert torch.equal(found[name], expected), name
    assert torch.equal(found[BLOCK], torch.lerp(a[BLOCK], b[BLOCK], ratio))
    assert all(torch.equal(value, b[name]) for name, value in load_file(tmp_path / "b" / "model.safetensors").items())


@pytest.mark.parametrize("rule", ["linear", "slerp", "task_arithmetic", "ties", "tsv_m", "iso_c"])
@pytest.mark.parametrize("rows", [(8, 12, 10), (12, 8, 8)])
def test_rows_that_are_not_shared_have_no_say_in_those_that_are(rule, rows, tmp_path):
    """Shorter and longer tables than A's; the row of a token of A's own is as large as it likes."""
    folders, found = {which: tmp_path / which for which in ("a", "b", "base")}, []
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    words = {"w": 0, "x": 1, "y": 2, "z": 3}
    for size in (1.0, 1000.0):
        for seed, (which, n) in enumerate(zip(folders, rows, strict=True)):
            more = {name: torch.randn(n, 4, generator=torch.Generator().manual_seed(9 + seed)) for name in tables}
            for table in more.values():
                table[4] *= size
            shutil.rmtree(folders[which], ignore_errors=True)
            plain(folders[which], seed, **more)
            tokenizer(folders[which], words | ({"<image>": 4} if which == "a" else {}))
        used = folders if RULES[rule].based else ab(folders)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        files.merge(rule, used, tmp_path / "out", How(0.5, kept=0.5), language_only=True)
        found.append(load_file(tmp_path / "out" / "model.safetensors"))
    keep = [0, 1, 2, 3, 5, 6, 7]
    for name in tables:
        assert found[0][name].shape == (rows[0], 4) and torch.equal(found[0][name][keep], found[1][name][keep])
        shared = [load_file(used[which] / "model.safetensors")[name][keep] for which in used]
        a, b, base = (*shared, None)[:3]
        alone = merged(rule, a, b, base, How(0.5, kept=0.5))
        assert torch.allclose(found[0][name][keep], alone, atol=1e-5)
        own = [4, *range(8, rows[0])]
        assert torch.equal(found[1][name][own], load_file(used["a"] / "model.safetensors")[name][own])


def test_a_task_vector_is_zero_also_behind_another_padding(tmp_path):
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    base = plain(tmp_path / "base", 0)
    plain(tmp_path / "b", 1)
    plain(tmp_path / "a", 0, **{name: torch.cat([base[name], torch.ones(2, 4)]) for name in tables})
    refused(
        {which: tmp_path / which for which in ("a", "b", "base")},
        r"the task vector of a \(a\) is zero",
        "ties",
        language_only=True,
    )


def test_numbers_of_eight_bits_on_one_side_are_named(tmp_path):
    plain(tmp_path / "a", 0, q=torch.ones(4).to(torch.float8_e4m3fn))
    plain(tmp_path / "b", 1, q=torch.ones(4))
    refused({which: tmp_path / which for which in "ab"}, r"no floating-point numbers, and not equal in a and b \(1\): q")


@pytest.mark.parametrize(("name", "value"), [("num_attention_heads", 4), ("hidden_act", "gelu"), ("rope_theta", 1e6)])
def test_weights_that_are_read_otherwise_are_refused(pair, name, value):
    own = {"model_type": "llama", "num_attention_heads": 2, "hidden_act": "silu", "rope_theta": 1e4}
    for which, of in (("a", own), ("b", own | {name: value})):
        (pair[0][which] / "config.json").write_text(json.dumps(of))
    refused(ab(pair[0]), f"has {name} {value!r}, a {own[name]!r}")


def test_fisher_information_that_finds_no_room_leaves_nothing(tmp_path, monkeypatch):
    def full(_, out):
        out.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(fisher, "save_file", full)
    with pytest.raises(OSError, match=r"fisher\.safetensors cannot be written: No space left"):
        fisher.save({"w": torch.ones(1)}, tmp_path / "fisher.safetensors")
    assert not any(tmp_path.iterdir())


def test_what_is_no_fisher_information_is_refused(pair, tmp_path):
    folders = ab(pair[0])
    weighing = [folder / "model.safetensors" for folder in folders.values()]
    with pytest.raises(ValueError, match=r"is no Fisher information: .* has negative values"):
        files.merge("fisher", folders, tmp_path / "out", How(0.5), fisher=weighing)
    assert not (tmp_path / "out").exists()


def test_other_tokens_are_refused(pair, tmp_path):
    """Added tokens of one model are no obstacle, be it that both have one at a place; another order or other words are."""
    folders, tensors = pair
    words = {"w": 0, "x": 1, "y": 2, "z": 3}
    tokenizer(folders["a"], words | {"<image>": 4})
    for other, named in (
        ({"x": 0, "w": 1, "y": 2, "z": 3}, "'w', 'x'"),
        ({"w": 0, "x": 1, "y": 2, "v": 3}, "'v', 'z'"),
        (words | {"<pad>": 4, "<image>": 5}, "'<image>'"),
    ):
        tokenizer(folders["b"], other)
        refused(ab(folders), rf"other tokens in a and b \(\d\): {named}$", language_only=True)
    tokenizer(folders["b"], words | {"<pad>": 4})
    files.merge("linear", ab(folders), tmp_path / "out", How(1.0), language_only=True)
    found = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(found[4], tensors["a"]["lm_head.weight"][4]) and torch.equal(found[5:], tensors["b"]["lm_head.weight"][5:])
    for text in ("{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {}}, "added_tokens": [3]}'):
        (folders["b"] / "tokenizer.json").write_text(text)
        refused(ab(folders), r"b/tokenizer\.json is no tokenizer", language_only=True, out=tmp_path / "out2")
