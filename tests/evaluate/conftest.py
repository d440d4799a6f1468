"""A tiny fine-tune with its base, artifacts and data, made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr

from peru_cli import cli
from tests.support import models


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `family`."""
    folder = tmp_path_factory.mktemp("family")
    base, fine = models.pair(models.bert, folder)
    for name, how in (("a", ["--keep", "10%"]), ("all", ["--lossless"])):
        assert cli.run(["prune", str(fine), "-b", str(base), "-o", str(folder / f"{name}.safetensors"), *how, "--no-sync", "--quiet"]) == 0
    texts = models.sentences(150)
    rows = [{"text": t, "label": (int(k) if i % 7 else 0)} for i, (t, k) in enumerate(zip(texts, predictions(fine, texts), strict=True))]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def family(original: Path, tmp_path: Path) -> Path:
    """base, fine, a.safetensors (a tenth of it), all.safetensors (lossless), test.jsonl with labels that `fine` often gets right."""
    return Path(shutil.copytree(original, tmp_path, dirs_exist_ok=True))


def predictions(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """One text after the other, in the obvious way."""
    model = tr.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    read = tr.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return np.array([int(model(**read(t, truncation=True, max_length=24, return_tensors="pt")).logits.argmax()) for t in texts])
