"""Random checkpoints merged on disk: family × layout × sharding × dtype × tying × extra keys × rule.

A merge gives a folder that transformers loads and whose tensors equal the formula, or an error that names the key. What is
expected is worked out here from models in memory and without the package's names. VLSAFE_CASES says how many cases of a family
are tried, the same ones each time; of one that fails what was drawn is shown, without minutes of search for a simpler one.
"""

import functools
import json
import os
import random
import tempfile
from pathlib import Path

import pytest
import torch
from families import CROSSED, NAMES, built, parent, saved
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlsafe.core import store
from vlsafe.models.merge import files, rules
from vlsafe.models.merge.rules import RULES, How

CASES = int(os.environ.get("VLSAFE_CASES", "7"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD, SEED, ONE = "lm_head.weight", 7, {"format": "pt"}
TROUBLES = ("unknown in a", "unknown in b", "twice in a", "missing in b", "other shape in b", "not finite in b", "no safetensors")
DRAWABLE = [name for name, rule in RULES.items() if not rule.weighed]  # what weighs needs files of its own: test_merge_matrices
DRAWN = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


def start(name, kind):
    """Where the decoder is in memory."""
    return "model." if kind == "text" else "model.text_model." if name in ("idefics3", "smolvlm") else "model.language_model."


def within(key, name, kind):
    """The name within the decoder of a name in memory; None for what is not the language model's."""
    if key == HEAD or not key.startswith(start(name, kind)):
        return HEAD if key == HEAD else None
    key = key.removeprefix(start(name, kind))
    parts = key.split(".")
    if name == "mllama" and kind == "vlm" and parts[0] == "layers":
        if int(parts[1]) in CROSSED:
            return None
        parts[1] = str(int(parts[1]) - sum(block < int(parts[1]) for block in CROSSED))
    return ".".join(parts)


@functools.cache
def models(place, name, kind, seed, tied, padding):
    """Config, and for each name in memory the hub's name and the tensor; found by value. A tied head is there as well."""
    model = (built if kind == "vlm" else functools.partial(parent, padding=padding))(name, seed, tie_word_embeddings=tied)
    folder = place / f"{name}-{kind}-{seed}-{tied}-{padding}"
    memory, hub = (load_file(saved(model, folder / layout, layout) / "model.safetensors") for layout in ("memory", "hub"))
    by_value = {value.numpy().tobytes(): key for key, value in hub.items()}
    names = {key: (by_value[value.numpy().tobytes()], value) for key, value in memory.items()}
    assert (HEAD in names) != tied and len(by_value) == len(hub) == len(memory)
    if tied:
        embedding, value = names[f"{start(name, kind)}embed_tokens.weight"]
        head = f"language_model.{HEAD}" if embedding.startswith("language_model.model.") else HEAD
        names[HEAD] = head, value
    return json.loads((folder / "memory" / "config.json").read_text()), names


class Side:
    """One random checkpoint: values by names in memory, and the names under which they are written."""

    def __init__(self, draw, place, folder, name, kind, seed, padding=0):
        self.name, self.kind, self.folder, which = name, kind, folder, folder.name
        self.tied = name != "mllama" and draw(st.booleans(), f"{which}: tied")
        self.dtype, self.hub = draw(st.sampled_from(DTYPES), f"{which}: dtype"), draw(st.booleans(), f"{which}: hub's layout")
        self.config, self.both = models(place, name, kind, seed, self.tied, padding)
        self.values = {key: value.to(self.dtype) for key, (_, value) in self.both.items()}
        self.embedding, self.norm = (f"{start(name, kind)}{part}.weight" for part in ("embed_tokens", "norm"))
        self.lacks = draw(st.sampled_from((HEAD, self.embedding, None)), f"{which} lacks") if self.tied else None
        self.names = {key: old if self.hub else key for key, (old, _) in self.both.items() if key != self.lacks}
        self.more = {f"{start(name, kind)}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        self.more = self.more if draw(st.booleans(), f"{which}: a buffer") else {}

    def of(self, name):
        """The tensor with a name in memory, or one within the decoder."""
        return self.values[
            name if name in self.values else next(k for k in self.values if within(k, self.name, self.kind) == name)
        ]

    def write(self, draw):
        """One file, perhaps with an index of older files beside it, or several files with their index."""
        tensors = {old: self.values[key].clone() for key, old in self.names.items()} | self.more
        self.folder.mkdir()
        (self.folder / "config.json").write_text(json.dumps(self.config))
        shards, stale = draw(st.integers(1, 3), f"{self.folder.name}: shards"), draw(st.booleans(), "index of older files")
        if shards == 1:
            save_file(tensors, self.folder / "model.safetensors", ONE)
            tensors = {key: torch.zeros_like(value) for key, value in tensors.items()}
        if shards > 1 or stale:
            spread = random.Random(draw(st.integers(0, 9), "spread over files"))
            mapped = {key: f"model-{spread.randrange(shards)}.safetensors" for key in tensors}
            for file in set(mapped.values()):
                save_file({key: tensors[key] for key in tensors if mapped[key] == file}, self.folder / file, ONE)
            (self.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))


def spoil(trouble, a, b):
    """Do what is wrong, and return the word that the error has to say."""
    if trouble == "unknown in a":
        a.more["value_head.weight"] = torch.ones(2)
        return "value_head.weight"
    if trouble == "unknown in b":
        b.more["model.score.weight"] = torch.ones(2)
        return "model.score.weight"
    if trouble == "twice in a":
        old = a.both[a.norm][0]
        a.more[a.norm if a.hub else old] = a.values[a.norm]
        return old if old != a.norm else "model"  # some families have one layout only: nothing is wrong then
    if trouble == "missing in b":
        del b.names[b.norm]
        return a.names[a.norm]
    if trouble == "other shape in b":
        b.values[b.norm] = b.values[b.norm][:-1]
        return a.names[a.norm]
    if trouble == "not finite in b":
        b.values[b.norm] = b.values[b.norm] * float("nan")
        return b.names[b.norm]
    return "only safetensors are read"


def expected(a, others, language_only, rule, how):
    """The tensors of A's files by the formula, None where one tensor would have to be two."""
    if a.lacks and not all(other.tied for other in others):
        return None
    found = {}
    for key, old in a.names.items():
        value, name = a.values[key], within(key, a.name, a.kind) if language_only else key
        if name is None:
            found[old] = value
            continue
        theirs = [other.of(name) for other in others]
        rows = min(len(tensor) for tensor in (value, *theirs))
        b, base = [*(tensor[:rows] for tensor in theirs), None][:2]
        drawn = a.embedding if key == HEAD and a.tied and not a.lacks else key  # equal ones stay equal
        found[old] = torch.cat([rules.merged(rule, value[:rows], b, base, how, rules.seed_of(SEED, drawn)), value[rows:]])
    return found | a.more


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", NAMES)
@settings(DRAWN, max_examples=CASES)
@given(data=st.data())
def test_random_checkpoints(name, data, place):
    merges_or_names_the_key(data.draw, place, name, None)


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("name", NAMES)
@settings(DRAWN, max_examples=2)
@given(data=st.data())
def test_random_checkpoints_with_a_mistake(name, trouble, data, place):
    merges_or_names_the_key(data.draw, place, name, trouble)


def merges_or_names_the_key(draw, place, name, trouble):
    with tempfile.TemporaryDirectory(dir=place) as folder:
        merged_or_named(draw, place, Path(folder), name, trouble)


def merged_or_named(draw, place, folder, name, trouble):
    kind = draw(st.sampled_from(("vlm", "vlm", "text")), "kind")
    rule, language_only = draw(st.sampled_from(DRAWABLE), "rule"), draw(st.booleans(), "language only")
    partner = draw(st.sampled_from((kind, "text")), "kind of the others") if language_only else kind
    padding = draw(st.sampled_from((0, 3)), "padding") if language_only and partner == "text" else 0
    ratio = draw(st.floats(0.1, 0.9), "ratio") if RULES[rule].rated else 0.6
    ratio += RULES[rule].beyond
    how = How(ratio, 0.5, 0.5, draw(st.sampled_from((1.0, 0.7)), "scaling"))
    a = Side(draw, place, folder / "a", name, kind, 0)
    ranks = ("b", "base") if RULES[rule].based else ("b",)
    others = [Side(draw, place, folder / which, name, partner, i, padding) for i, which in enumerate(ranks, 1)]
    result = expected(a, others, language_only, rule, how)
    words = ["one tensor in a for embedding and head"] if result is None else []
    if trouble and not (trouble == "twice in a" and a.both[a.norm][0] == a.norm):
        words.append(spoil(trouble, a, others[0]))
    for side in (a, *others):
        side.write(draw)
    if trouble == "no safetensors":
        for path in [*others[0].folder.glob("model*")]:
            path.unlink()
    folders, out = {side.folder.name: side.folder for side in (a, *others)}, folder / "out"
    before = {path: store.file_digest(path) for path in folder.rglob("*") if path.is_file()}
    if words:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            files.merge(rule, folders, out, how, SEED, language_only)
        assert any(word in str(error.value) for word in words), (words, error.value)
        assert not out.exists() and not out.with_name("out.partial").exists()
    else:
        summary = files.merge(rule, folders, out, how, SEED, language_only)
        same_as_expected(a, out, result, summary, language_only)
    assert all(store.file_digest(path) == digest for path, digest in before.items())


def same_as_expected(a, out, result, summary, language_only):
    """The files' tensors are the formula's, the counts are right, and the library loads them all."""
    found = {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}
    assert found.keys() == result.keys()
    for key, value in result.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    left = sum(within(key, a.name, a.kind) is None for key in a.names) if language_only else 0
    assert (summary["merged"], summary["copied"], summary["left"]) == (len(a.names) - left, len(a.more), left)
    auto = AutoModelForImageTextToText if a.kind == "vlm" else AutoModelForCausalLM
    model, report = auto.from_pretrained(out, dtype=a.dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    assert set(report["unexpected_keys"]) <= set(a.more)  # some types do not expect old files' buffers
    weights = model.state_dict()
    for key, old in a.names.items():
        assert torch.equal(weights[key].to(a.dtype), result[old]), key
