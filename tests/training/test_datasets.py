"""Rows for training: what they hold until they are taken."""

import zipfile

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from vlsafe.core.schema import Example, Stored, Turn
from vlsafe.data.miniature.pictures import to_png
from vlsafe.training import datasets
from vlsafe.training.trainers import BY_LENGTH

TURNS = (Turn("user", "a b c"), Turn("assistant", "d"))


@pytest.fixture
def pictured(tmp_path, monkeypatch):
    """Six rows, every second one with a picture in a zip file, and how often a picture was opened."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("0.png", to_png(np.full((8, 8, 3), 60, np.uint8)))
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    cells = [(Stored("images.zip!0.png"),) if i % 2 else () for i in range(6)]
    opened, plain = [], datasets.open_picture
    monkeypatch.setattr(datasets, "open_picture", lambda picture: (opened.append(picture), plain(picture))[1])
    return datasets.chat_dataset([Example(f"r{i}", "captions", TURNS, cell) for i, cell in enumerate(cells)], True), opened


def test_a_column_opens_no_picture_and_a_row_its_own(pictured, tmp_path):
    """Trainers read all lengths before the first step: at the paper's size a million pictures would be decoded for them."""
    data, opened = pictured
    datasets.save(data, tmp_path / "rows")
    for rows in (data, datasets.load(tmp_path / "rows"), data.remove_columns(["pictures"])):
        assert list(rows["length"]) == [4, 21, 4, 21, 4, 21] and rows["length"][1] == 21 and not opened
        assert [row["images"][0].size for row in rows.select([1, 3])] == [(8, 8)] * 2
        assert rows[1]["images"][0].size == (8, 8) and rows[0]["images"] == [] and rows[1:4]["length"] == [21, 4, 21]
        assert len(opened) == 5
        opened.clear()


def test_the_trainers_sampler_opens_no_picture(pictured, tmp_path):
    data, opened = pictured
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=2, **BY_LENGTH)
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=data)
    order = [i for batch in trainer._get_train_sampler() for i in (batch if isinstance(batch, list) else [batch])]
    assert sorted(order) == list(range(6)) and not opened
