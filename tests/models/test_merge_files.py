"""Merging whole models: in memory and streaming from disk, in both LLaVA layouts, killed, damaged and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from vlsafe import cli
from vlsafe.core import store
from vlsafe.core.presets import SCALES
from vlsafe.data.miniature.language import vocabulary
from vlsafe.models import architectures, chat, checkpoints, weights
from vlsafe.models.merge import files, inputs, rules
from vlsafe.models.merge.rules import RULES, How

HOW = How(0.6, kept=0.5)


def combined(*arguments, **more):
    """The streamed merge, all of it in memory."""
    return dict(rules.streamed(*arguments, **more))


def checkpoint(folder, seed, sizes, shards=1, dtype=torch.float32, words=("a", "b")):
    """Random tensors as a model folder: config, a word-level tokenizer, one shard or more with an index."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"w{i}": torch.randn(size, generator=draw).to(dtype) for i, size in enumerate(sizes)}
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = {"model": {"vocab": {word: i for i, word in enumerate(words)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    mapped = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(mapped.values()):
        save_file({name: tensors[name] for name in tensors if mapped[name] == shard}, folder / shard)
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": mapped}))
    return tensors


def loaded(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def three(place, sizes=((1,), (2,), (50,), (3, 7)), **more):
    """Folders of a, b and their base, with their tensors."""
    tensors = {which: checkpoint(place / which, seed, sizes, **more) for seed, which in enumerate(("a", "b", "base"))}
    return {which: place / which for which in tensors}, tensors


def flip(path, place):
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 64]))


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.weighed])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_streamed_merge_is_the_merge_in_memory(name, shards, tmp_path, monkeypatch):
    """Pieces of 7 elements, so that tensors pass in several; another number of shards in b than in a."""
    monkeypatch.setattr(files, "PIECE", 7)
    folders, tensors = three(tmp_path, shards=shards, dtype=torch.bfloat16)
    rule = RULES[name]
    how = HOW._replace(ratio=1.4) if rule.beyond else HOW
    used = folders if rule.based else {which: folders[which] for which in "ab"}
    summary = files.merge(name, used, tmp_path / "out", how, seed=5)
    expected = combined(name, tensors["a"], tensors["b"], tensors["base"] if rule.based else None, how, seed=5)
    found = loaded(tmp_path / "out")
    assert set(found) == set(expected) and summary == {
        "tensors": 4, "bytes": summary["bytes"], "shards": shards, "merged": 4, "copied": 0, "left": 0, "rows": {},
        "measured": summary["measured"],
        "changed": sum(not torch.equal(value, tensors["a"][key]) for key, value in expected.items()),
    }  # fmt: skip
    for key, value in expected.items():
        assert found[key].dtype == torch.bfloat16 and torch.equal(found[key], value), key
    assert files.checkpoint(tmp_path / "out").tensors.keys() == set(expected)
    inputs.verify(files.checkpoint(tmp_path / "out"))
    assert not list(tmp_path.glob("*.partial"))


def test_what_only_a_has_and_which_blocks_are_merged():
    name = "model.language_model.layers.{}.w"
    a = {"model.vision_tower.encoder.layers.1.w": torch.ones(2), "lm_head.weight": torch.ones(2)}
    a |= {name.format(i): torch.ones(2) for i in range(3)}
    b = {key: 3 * value for key, value in a.items() if "vision" not in key}
    half = How(0.5)

    def means(**more):
        return {key.split(".")[-2]: value.mean().item() for key, value in combined("linear", a, b, None, half, **more).items()}

    assert means() == {"1": 2.0, "lm_head": 2.0, "0": 2.0, "2": 2.0}  # the tower's block 1 comes first, the language model's last
    assert combined("linear", a, b, None, half)["model.vision_tower.encoder.layers.1.w"].tolist() == [1, 1]
    assert means(blocks={1}) == {"1": 2.0, "lm_head": 1.0, "0": 1.0, "2": 1.0}
    assert means(blocks={0, 2, None}) == {"1": 1.0, "lm_head": 2.0, "0": 2.0, "2": 2.0}
    base = {key: torch.zeros(2) for key in b if key != "lm_head.weight"}
    added = combined("task_arithmetic", a, b, base, half._replace(scaling=2.0))
    assert added[name.format(0)].tolist() == [4, 4] and added["lm_head.weight"].tolist() == [2, 2]  # no base: linear
    with pytest.raises(ValueError, match="task vector of b is zero"):
        combined("ties", a, base, base, half)
    with pytest.raises(ValueError, match="b has 1 tensors that a lacks"):
        combined("linear", b, a, None, half)


@pytest.fixture(scope="module")
def llavas(tmp_path_factory):
    """Two tiny LLaVAs in the layout in memory, the second one also in the hub's; and a plain language model."""
    place, scale = tmp_path_factory.mktemp("llavas"), SCALES["nano"]
    tokenizer = chat.build_tokenizer(vocabulary(), scale.language.context)
    tokenizer.chat_template = chat.template("llama2")
    spec = scale.vision
    processor = chat.build_processor(tokenizer, spec.image_size, spec.patch_size, spec.feature_strategy)
    for seed, name in enumerate(("a", "b")):
        language = checkpoints.build_llm(scale.language, tokenizer, seed)
        model = checkpoints.graft(language, checkpoints.build_clip(spec, tokenizer, seed), processor, spec, seed)
        checkpoints.save(model, place / name, processor)
    checkpoints.save(language, place / "language", tokenizer)
    hub = LlavaForConditionalGeneration(model.config)
    hub.load_state_dict(model.state_dict())
    hub.save_pretrained(place / "hub")
    processor.save_pretrained(place / "hub")
    return place


def test_both_layouts_of_llava_merge_alone_and_with_each_other(llavas, tmp_path):
    raw = load_file(llavas / "hub" / "model.safetensors")
    assert all(key.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")) for key in raw)
    merged = {}
    for name, one, other in (("memory", "a", "b"), ("mixed", "a", "hub"), ("from hub", "hub", "a")):
        ratio = "0.6" if one == "a" else "0.4"
        assert (
            cli.main(
                ["merge", "linear", *(str(llavas / n) for n in (one, other)), "--ratio", ratio, "--out", str(tmp_path / name)]
            )
            == 0
        )
        merged[name] = checkpoints.load(tmp_path / name).state_dict()
        assert checkpoints.load_processor(tmp_path / name).image_processor.size["shortest_edge"] == 32
    a, b = (checkpoints.load(llavas / name).state_dict() for name in ("a", "b"))
    for key, value in combined("linear", a, b, None, How(0.6)).items():
        assert torch.equal(merged["memory"][key], value) and torch.equal(merged["mixed"][key], value), key
        assert torch.allclose(merged["from hub"][key], value, atol=1e-6), key


def test_a_plain_language_model_as_partner(llavas, tmp_path, capsys):
    call = ["merge", "linear", str(llavas / "a"), str(llavas / "language"), "--ratio", "1", "--out", str(tmp_path / "out")]
    assert cli.main(call) == 2 and "only in b, not in a" in capsys.readouterr().err
    assert cli.main([*call, "--language-only"]) == 0
    merged, a = checkpoints.load(tmp_path / "out"), checkpoints.load(llavas / "a")
    parent = checkpoints.load(llavas / "language")
    for mine, theirs in zip(
        architectures.language_part(merged).parameters(), architectures.language_part(parent).parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert torch.equal(architectures.projector_part(merged).linear_1.weight, architectures.projector_part(a).linear_1.weight)


def test_differences_are_listed_before_a_byte_is_written(tmp_path):
    folders, _ = three(tmp_path)
    checkpoint(tmp_path / "other", 3, ((1,), (3,), (50,), (3, 7), (4,)), words=("a", "c"))
    with pytest.raises(ValueError) as error:
        files.merge("linear", {"a": folders["a"], "b": tmp_path / "other"}, tmp_path / "out", HOW)
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "  only in b, not in a (1): w4",
        "  other shapes in a and b (1): w1 [2] and [3]",
        "  other tokens in a and b (2): 'b', 'c'",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "other"]


def test_what_a_merge_must_not_be_asked(tmp_path, capsys):
    three(tmp_path)
    a, b, base, out = (str(tmp_path / name) for name in ("a", "b", "base", "out"))
    for call, message in (
        (["ties", a, b, "--ratio", "0.5"], "ties needs a base (--base)"),
        (["linear", a, b, "--ratio", "0.5", "--base", base], "linear has no use for a base"),
        (["linear", a, b], "linear needs --ratio"),
        (["model_stock", a, b, "--base", base, "--ratio", "0.5"], "model_stock has no --ratio"),
        (["liner", a, b, "--ratio", "0.5"], "did you mean 'linear'"),
        (["linear", a, b, "--ratio", "1.5"], "ratio is a share in [0, 1], not 1.5"),
        (["task_arithmetic", a, base, "--base", base, "--ratio", "0.5"], "the task vector of b (base) is zero"),
        (["linear", a, str(tmp_path), "--ratio", "0.5"], "holds no model"),
    ):
        assert cli.main(["merge", *call, "--out", out]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert cli.main(["merge", "linear", a, b, "--ratio", "0.5", "--out", out]) == 2
    assert "exists; choose another place" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_a_damaged_shard_is_refused_by_name(tmp_path):
    folders, _ = three(tmp_path, shards=3)
    two = {which: folders[which] for which in "ab"}
    shard = folders["b"] / "model-1.safetensors"
    whole = shard.read_bytes()

    def refused(match):
        with pytest.raises(ValueError, match=match):
            files.merge("linear", two, tmp_path / "out", HOW)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name and path.suffix != ".lock"]
        shard.write_bytes(whole)

    for length in (len(whole) - 1, 20, 3):
        shard.write_bytes(whole[:length])
        refused(r"b/model-1.safetensors is truncated or damaged")
    flip(shard, 8)
    refused(r"b/model-1.safetensors is truncated or damaged")
    flip(shard, 11)
    refused(r"b/model-1.safetensors is damaged, or not the shard that its index tells of: they disagree on")
    shard.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")
    refused(r"b/model-1.safetensors is damaged: w1 has weights that are not finite")
    digest = store.file_digest(shard)
    (folders["b"] / store.MANIFEST).write_text(json.dumps({"files": {shard.name: {"sha256": digest}}}))
    flip(shard, len(whole) - 3)
    refused(r"b/model-1.safetensors is damaged: its content is not the one that was recorded")
    (folders["b"] / store.MANIFEST).unlink()
    blob = tmp_path / digest  # the Hub's cache: a file is a link to a blob named by its digest
    shutil.move(shard, blob)
    shard.symlink_to(blob)
    inputs.verify(files.checkpoint(folders["b"]))
    flip(blob, len(whole) - 3)
    with pytest.raises(ValueError, match="is damaged: its content"):
        files.merge("linear", two, tmp_path / "out", HOW)
    (folders["b"] / weights.INDEX).write_text(json.dumps({"weight_map": {"w0": shard.name, "w1": shard.name}}))
    with pytest.raises(ValueError, match="they disagree on w0"):
        files.merge("linear", two, tmp_path / "out", HOW)


def test_killed_in_the_middle_it_leaves_nothing_that_loads_and_a_second_run_completes(llavas, tmp_path):
    """The process stops before its second tensor until it is killed; what it leaves has weights of no model and no config."""
    code = "import sys, time; from vlsafe.models.merge import files; from vlsafe import cli\n"
    code += "plain, calls = files._combined, []\n"
    code += "def slow(*a):\n    calls.append(a)\n    time.sleep(60 * (len(calls) == 2))\n    yield from plain(*a)\n"
    code += "files._combined = slow; cli.main(sys.argv[1:])"
    call = ["merge", "linear", str(llavas / "a"), str(llavas / "b"), "--ratio", "0.5", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", code, *call])
    partial = tmp_path / "out.partial" / store.WORK / "model.safetensors"
    until = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="holds no model"):
        checkpoints.load(partial.parent)
    assert cli.main(call) == 0 and not list(tmp_path.glob("*.partial"))
    a, b = (checkpoints.load(llavas / name).state_dict() for name in ("a", "b"))
    merged = checkpoints.load(tmp_path / "out").state_dict()
    assert all(torch.equal(merged[key], torch.lerp(a[key], b[key], 0.5)) for key in merged)
    assert json.loads((tmp_path / "out" / store.MANIFEST).read_text())["merge"]["ratio"] == 0.5


LEAN = """
import sys, torch
from pathlib import Path
from vlsafe.models.merge import files, rules
torch.set_num_threads(2)
threads = []
linear = rules.RULES["linear"]
counted = lambda *rest: (threads.append(torch.get_num_threads()), linear.combine(*rest))[1]
rules.RULES["linear"] = linear._replace(combine=counted)
folder = Path(sys.argv[1])
files.merge("linear", {"a": folder / "a", "b": folder / "b"}, folder / "out", rules.How(0.6))
slow = [name for name in ("transformers.modeling_utils", "torch._dynamo", "sympy") if name in sys.modules]
print(slow, set(threads), torch.get_num_threads())
"""


def test_a_merge_imports_no_model_code_and_computes_on_one_thread(tmp_path):
    """Half of a small merge's time was imports, and idle threads waited busily; where the config says whether the head is tied,
    the library's classes are not needed."""
    for seed, name in enumerate("ab"):
        checkpoint(tmp_path / name, seed, [(8, 4)])
        (tmp_path / name / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    done = subprocess.run([sys.executable, "-c", LEAN, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "[] {1} 2\n", done.stdout + done.stderr
