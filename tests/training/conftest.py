from types import SimpleNamespace

import pytest
import warm

from vlsafe.core.schema import Pair, from_row
from vlsafe.training import datasets, launch


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture
def forked(monkeypatch):
    """The processes of a training start warm, for tests of the training and not of its start."""
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=warm.popen))


@pytest.fixture(scope="module")
def rows(begun):
    """Rows with pictures and rows without, enough for steps of each."""
    return datasets.chat_dataset(begun.examples("screen/filtered", "instructions.parquet"), with_images=True)


@pytest.fixture(scope="module")
def all_pairs(begun):
    """Preferences by kind: all with pictures, all of text, and both in a batch."""
    pictured, text = ([from_row(Pair, row) for row in begun.rows("world/corpora", f"{name}.parquet")]
                      for name in ("spa_vl", "safe_rlhf"))  # fmt: skip
    return {"pictures": datasets.pair_dataset(pictured, True), "text": datasets.pair_dataset(text, False),
            "mixed": datasets.pair_dataset([*pictured, *text], True)}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(all_pairs):
    return all_pairs["pictures"]
