"""What every test may ask for: the shared data, and a process that other tests have left as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from zeroskip import _core
from zeroskip.prune.learner import Learner

ROWS = [name for name, missing in _core.isa_rows() if missing is None]
DATA = Path(os.environ.get("ZEROSKIP_DATA", Path(__file__).parents[2] / "shared" / "data"))
ORIGINS = {
    "correlated": "a generator of one layer with correlated inputs, written for this project",
    "pylm15m": "a 15.7 M-parameter language model of Python code, trained for this project",
    "resnet_cifar10": "ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10, its arrays as npz",
}


settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):  # new examples are for those who can look into what they find
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and threads that wait for each other are slow on a busy machine."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def short_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that run every method need not tune long."""
    monkeypatch.setattr(Learner, "least", 8)


@pytest.fixture
def data() -> Callable[[str], Path]:
    """Return the folder of a data set, or skip the test saying what is missing."""

    def folder(name: str) -> Path:
        if not (DATA / name).is_dir():
            pytest.skip(f"needs the data set {name!r} ({ORIGINS[name]}) in {DATA}; set ZEROSKIP_DATA")
        return DATA / name

    return folder


@pytest.fixture
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compilation time little."""
    from cli_models import shorten_races

    shorten_races(monkeypatch)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small encoder; not to be written to."""
    from cli_models import write_encoder

    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small language model; not to be written to."""
    from cli_models import write_decoder

    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of sentences in the words that those two know."""
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(
        "\n\n".join(f"return the {word} of a list in order" for word in ("name", "key", "file", "item") * 4)
    )
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the decoder layers whose step the core computed, but for trials."""
    from zeroskip import decoder_stepper

    count, run = [0], decoder_stepper.run

    def counted(made: Any) -> None:
        count[0] += len(made)
        run(made)

    monkeypatch.setattr(decoder_stepper, "run", counted)
    return count


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every row of this CPU; return its name."""
    best = _core.isa_active()
    assert _core.isa_limit(request.param)
    yield request.param
    assert _core.isa_limit(best)
