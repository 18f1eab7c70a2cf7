"""Models of Hugging Face as they come; ``scripts/families.py`` runs all of the matrix."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from captum_rlrp import LayerRelativeLRP, RelativeLRP

from .small import agree

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def families() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "families.py"
    specification = importlib.util.spec_from_file_location("families", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mixtral", "Bert", "ModernBert", "T5", "Swin"])
def test_hugging_face(families: ModuleType, name: str) -> None:
    model, inputs, output = families.hugging_face(name)
    explainer = RelativeLRP(model, output=output)
    target = 3 if output is not None else 1
    found, delta = explainer.attribute(inputs, target, return_convergence_delta=True)
    found = found["input_ids"] if isinstance(found, dict) else found
    assert 0 < found.abs().flatten(1).sum(1).min() <= 1.0001
    assert delta.max() < 1e-4
    if hasattr(model.config, "use_cache"):
        assert model.config.use_cache is type(model.config)().use_cache  # as it was


def test_positions_made_of_a_mask_are_constants(families: ModuleType) -> None:
    model, tokens, _ = families.hugging_face("Roberta")
    embedding = model.get_input_embeddings()
    of_tokens = LayerRelativeLRP(model, embedding).attribute(tokens, 1)
    vectors = embedding(tokens).detach()
    agree(of_tokens, RelativeLRP(model).attribute({"inputs_embeds": vectors}, 1)["inputs_embeds"])
    agree(RelativeLRP(model).attribute(tokens, 1), of_tokens.sum(2))


def test_tied_embeddings(families: ModuleType) -> None:
    model, inputs, output = families.hugging_face("T5")
    layer = LayerRelativeLRP(model, model.get_input_embeddings(), output=output)
    encoder, decoder = layer.attribute(inputs, 3)
    assert encoder.shape == (2, 12, 64)
    assert decoder.shape == (2, 5, 64)


def test_padding_receives_nothing(families: ModuleType) -> None:
    model, tokens, _ = families.hugging_face("Bert")
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    found = RelativeLRP(model).attribute({"input_ids": tokens, "attention_mask": mask}, 1)
    assert not found["attention_mask"].any()
    assert not found["input_ids"][1, 8:].any()
    short = {"input_ids": tokens[1:, :8], "attention_mask": mask[1:, :8]}
    agree(found["input_ids"][1:, :8], RelativeLRP(model).attribute(short, 1)["input_ids"], 1e-3)


def test_what_did_not_run_again_keeps_its_line(
    families: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "ROWS", tmp_path)
    document = tmp_path / "coverage.md"
    document.write_text("| hf/Old | OldModel | 1.0 | 0.1 | 5e-08 | 0e+00 |\n")
    row = {"name": "hf/New", "model": "NewModel", "first": 1.0, "mass": [0.5], "finite": True}
    row |= {"delta": 1e-7, "difference": 0.0}
    for _ in range(2):  # written again, it is not marked twice
        text = families.section(document)
        assert "| hf/Old † | OldModel | 1.0 | 0.1 | 5e-08 | 0e+00 |\n" in text
        document.write_text(text)
    (tmp_path / "new.json").write_text(json.dumps(row))
    text = families.section(document)
    assert "**2 of 2 pass**" in text
    assert text.index("| hf/New | NewModel") < text.index("| hf/Old † | OldModel")
    (tmp_path / "old.json").write_text(json.dumps(row | {"name": "hf/Old", "mass": [0.0]}))
    assert "†" not in families.section(document)
    assert "| hf/Old **not all** | NewModel" in families.section(document)
