"""Weights that come as pickles: tensors are read and become safetensors, anything else is refused and not run."""

import os
from pathlib import Path

import pytest
import torch
from conftest import NANO
from safetensors.torch import load_file
from transformers import CLIPModel

from vlsafe.core.assets import LoadedGuard, Origin
from vlsafe.core.scale import as_plain
from vlsafe.data import guards
from vlsafe.data.miniature.language import vocabulary
from vlsafe.models import chat, checkpoints


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "run")


@pytest.fixture(params=["parent", "tower"])
def repository(request, tmp_path):
    """A tiny model in hub layout whose weights are in `pytorch_model.bin` alone, how it is loaded, and its weights."""
    folder, tokenizer = tmp_path / "hub", chat.build_tokenizer(vocabulary(), NANO.language.context)
    build = {"parent": lambda: checkpoints.build_llm(NANO.language, tokenizer, 0),
             "tower": lambda: checkpoints.build_clip(NANO.vision, tokenizer, 0)}  # fmt: skip
    load = {"parent": lambda: checkpoints.from_hub(str(folder), "main", tokenizer),
            "tower": lambda: checkpoints.from_repository(CLIPModel, str(folder))}  # fmt: skip
    model = build[request.param]()
    checkpoints.save(model, folder, tokenizer)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, load[request.param], model.state_dict()


def test_pickled_tensors_are_read_and_saved_as_safetensors(repository, tmp_path, monkeypatch):
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    _, load, weights = repository
    model = load()
    checkpoints.save(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not list((tmp_path / "saved").glob("*.bin")) and set(saved) <= set(weights)
    assert len(saved) >= len(weights) - 1 and all(torch.equal(saved[key], weights[key]) for key in saved)
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1", "nothing about the repository is sent anywhere"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_by_name_in_one_line_and_not_run(repository, tmp_path, zipped):
    folder, load, weights = repository
    mark = tmp_path / "mark"
    state = {**weights, "more": Malicious(mark)}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="holds more than tensors, which could run code; it is not loaded") as refused:
        load()
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value) and not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.read_text() == "run", "the pickle does what it is for where nobody looks"


def test_a_folder_and_a_guard_without_safetensors_are_refused(tmp_path):
    """A folder for the code in its pickle; a guard because no stage saves its weights, and each run would unpickle them."""
    tokenizer = chat.build_tokenizer(vocabulary(), NANO.language.context)
    model = checkpoints.build_llm(NANO.language, tokenizer, 0)
    checkpoints.save(model, tmp_path, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**model.state_dict(), "more": Malicious(tmp_path / "mark")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="it is not loaded"):
        checkpoints.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not here as safetensors"):
        guards.load_guard(as_plain(LoadedGuard(Origin(str(tmp_path), kind="model"))))
    assert not (tmp_path / "mark").exists()
