"""One model of each family of timm and Hugging Face: does Relative LRP explain it?

Hugging Face's have tiny configurations and random weights, timm's are the smallest of each family.
Each model runs in a process of its own and leaves a row in a file, so that a run that was cut short
goes on where it stopped; ``scripts/coverage.py`` puts the rows into ``docs/coverage.md``::

    python scripts/families.py                     # all that is missing
    python scripts/families.py --only hf/Llama timm/resnet
    python scripts/families.py --again             # forget earlier rows
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
import warnings
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "build" / "families"
TOLERANCE = 1e-4

_TEXT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": 200,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200}
_PAIR = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 200,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip

# Name → the class behind it and its configuration. The names of both begin with it.
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("LMHeadModel", _GPT),
    "GPTJ": ("ForCausalLM", {**_GPT, "rotary_dim": 8}),
    "GPTNeoX": ("ForCausalLM", _TEXT),
    "OPT": (
        "ForCausalLM",
        {**_TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "Bloom": ("ForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200}),
    "Falcon": ("ForCausalLM", _TEXT),
    "Llama": ("ForCausalLM", _GROUPED),
    "Mistral": ("ForCausalLM", _GROUPED),
    "Qwen2": ("ForCausalLM", _GROUPED),
    "Qwen3": ("ForCausalLM", _GEMMA),
    "Gemma": ("ForCausalLM", _GEMMA),
    "Gemma2": ("ForCausalLM", _GEMMA),
    "Phi": ("ForCausalLM", _TEXT),
    "Phi3": ("ForCausalLM", {**_GROUPED, "pad_token_id": 0}),
    "Olmo2": ("ForCausalLM", _GROUPED),
    "Cohere": ("ForCausalLM", _GROUPED),
    "StableLm": ("ForCausalLM", _GROUPED),
    "Mixtral": ("ForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "Qwen2Moe": (
        "ForCausalLM",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32},
    ),
    "Mamba": (
        "ForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 200, "state_size": 8},
    ),
    "Mamba2": (
        "ForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 200, "state_size": 8,
         "num_heads": 8, "head_dim": 16, "n_groups": 1},
    ),
    "Bert": ("ForSequenceClassification", _TEXT),
    "Roberta": ("ForSequenceClassification", _TEXT),
    "XLMRoberta": ("ForSequenceClassification", _TEXT),
    "MPNet": ("ForSequenceClassification", _TEXT),
    "DistilBert": (
        "ForSequenceClassification",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 200},
    ),
    "Electra": ("ForSequenceClassification", {**_TEXT, "embedding_size": 32}),
    "Albert": ("ForSequenceClassification", {**_TEXT, "embedding_size": 32}),
    "DebertaV2": ("ForSequenceClassification", _TEXT),
    "ModernBert": (
        "ForSequenceClassification",
        {**_TEXT, "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2,
         "sep_token_id": 2},
    ),
    "T5": (
        "ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
         "vocab_size": 200},
    ),
    "Bart": ("ForConditionalGeneration", _PAIR),
    "Pegasus": ("ForConditionalGeneration", _PAIR),
    "Marian": ("MTModel", {**_PAIR, "pad_token_id": 0, "decoder_start_token_id": 0}),
    "ViT": ("ForImageClassification", _IMAGE),
    "DeiT": ("ForImageClassification", _IMAGE),
    "Dinov2": ("ForImageClassification", {**_IMAGE, "mlp_ratio": 2}),
    "Swin": (
        "ForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4},
    ),
    "ConvNext": (
        "ForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    ),
    "Segformer": (
        "ForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2,
         "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [7, 3],
         "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
    ),
    "Wav2Vec2": (
        "ForSequenceClassification",
        {**_TEXT, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 32},
    ),
}  # fmt: skip


# Families without a small model: that one with fewer and narrower blocks, at a smaller image.
SHRUNK: dict[str, tuple[str, int, dict[str, Any]]] = {
    "deepseek_vit": (
        "deepseek_vit_412m", 126, {"img_size": 126, "embed_dim": 64, "depth": 2, "num_heads": 2},
    ),
    "gemma4_vit": (
        "gemma4_vit_167m", 96,
        {"img_size": 96, "embed_dim": 64, "depth": 2, "num_heads": 2, "head_dim": 32,
         "intermediate_size": 128},
    ),
    "hieradet_sam2": ("hieradet_small", 256, {"embed_dim": 24}),
    "mobilenetv5": ("mobilenetv5_base", 128, {"channel_multiplier": 0.25}),
    "qwen3_vit": (
        "qwen3_vit_88m", 128, {"img_size": 128, "embed_dim": 64, "depth": 2, "num_heads": 2},
    ),
    "vision_transformer_sam": (
        "samvit_base_patch16_224", 224,
        {"embed_dim": 64, "depth": 2, "num_heads": 2, "global_attn_indexes": [1]},
    ),
}  # fmt: skip


def last_scores(returned: Any) -> Tensor:
    """Of a language model: the scores behind the last token."""
    scores: Tensor = returned.logits[:, -1]
    return scores


def hugging_face(name: str) -> tuple[nn.Module, Any, Any]:
    """The model, its inputs, and which output is explained."""
    import transformers

    kind, settings = HUGGING_FACE[name]
    torch.manual_seed(0)
    configuration = getattr(transformers, name + "Config")(**settings)
    model = getattr(transformers, name + kind)(configuration).eval()
    tokens = torch.randint(5, 199, (2, 12), generator=torch.Generator().manual_seed(3))
    if "Image" in kind:
        return model, torch.randn(2, 3, 32, 32), None
    if name == "Wav2Vec2":
        return model, torch.randn(2, 1600), None
    if kind in ("ForConditionalGeneration", "MTModel"):
        inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
        return model, inputs, last_scores
    return model, tokens, last_scores if "LM" in kind else None


def timm_families() -> dict[str, str]:
    """Family → its smallest model, as far as the names tell, or the one that is made smaller."""
    import timm

    order = ("test", "atto", "femto", "pico", "nano", "xxt", "xxs", "_xs", "tiny", "_s0", "_b0",
             "_t", "small", "_s", "_0", "18", "26", "50")  # fmt: skip
    found = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if module in SHRUNK:
            found[module] = SHRUNK[module][0]
        elif names:
            found[module] = min(
                names,
                key=lambda n: (next((i for i, k in enumerate(order) if k in n), 99), len(n), n),
            )
    return found


def timm_model(family: str) -> tuple[nn.Module, Any, Any]:
    """The model with its statistics moved away from their defaults, and an image of its size."""
    import timm
    from coverage import randomise

    torch.manual_seed(0)
    name, size, settings = SHRUNK.get(family, (timm_families()[family], None, {}))
    model = randomise(timm.create_model(name, **settings))
    shape = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    return model, torch.randn(2, *((3, size, size) if size else shape)), None


def names() -> list[str]:
    """All models of the matrix, as far as the packages are there."""
    listed = [f"hf/{name}" for name in HUGGING_FACE]
    try:
        return listed + [f"timm/{family}" for family in timm_families()]
    except ModuleNotFoundError:
        return listed


def examine(name: str) -> dict[str, Any]:
    """The row of one model."""
    from captum_rlrp import RelativeLRP

    source, own = name.split("/")
    model, inputs, output = (hugging_face if source == "hf" else timm_model)(own)
    explainer = RelativeLRP(model, output=output)
    target = 3 if output is not None else 1  # in vocabularies, 1 is often the padding
    begin = time.perf_counter()
    found = explainer.attribute(inputs, target)
    first = time.perf_counter() - begin
    _, delta = explainer.attribute(inputs, target, return_convergence_delta=True)
    plain = RelativeLRP(model, backend="reference", output=output).attribute(inputs, target)
    a, b = (next(iter(f.values())) if isinstance(f, dict) else f for f in (found, plain))
    mass = a.abs().flatten(1).sum(1)
    return {
        "name": name,
        "model": type(model).__name__ if source == "hf" else timm_families()[own],
        "first": first,
        "mass": mass.tolist(),
        "finite": bool(a.isfinite().all()),
        "delta": float(delta.max()),
        "difference": float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)),
    }


def passes(row: dict[str, Any]) -> bool:
    """Whether all that is measured holds."""
    return (
        "error" not in row
        and row["finite"]
        and row["delta"] <= TOLERANCE
        and 0 < min(row["mass"]) <= max(row["mass"]) <= 1 + TOLERANCE
    )


def rows() -> dict[str, dict[str, Any]]:
    """What has run."""
    found = (json.loads(path.read_text()) for path in sorted(ROWS.glob("*.json")))
    return {row["name"]: row for row in found}


EARLIER = "†"


def earlier(document: Path) -> dict[str, str]:
    """The lines of a document for models that have no row now, marked."""
    known, found = rows(), {}
    for line in document.read_text().splitlines() if document.exists() else ():
        match = re.match(rf"\| ((?:hf|timm)/\w+)(?: {EARLIER})?(.*)", line)
        if match is not None and match[1] not in known:
            found[match[1]] = f"| {match[1]} {EARLIER}{match[2]}"
    return found


def section(document: Path) -> str:
    """The part of the document; what did not run again keeps its line there."""
    known, kept = rows(), earlier(document)
    if not known and not kept:
        return ""
    good = sum(passes(row) for row in known.values())
    good += sum("**" not in line for line in kept.values())
    versions = []
    for package in ("torch", "transformers", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    lines = [
        "## Families of Hugging Face and timm",
        "",
        f"One model of each, by `scripts/families.py`. **{good} of {len(known) + len(kept)} "
        "pass**: captured, finite, Σ|R| above 0 and at most 1, delta at most 1e-4. Hugging Face's "
        "have tiny configurations and are explained as they are, from token numbers to logits; "
        "timm's are the smallest of each family, with random statistics. Those of "
        f"{', '.join(sorted(SHRUNK))}, which have no small model, are made with fewer or narrower "
        "blocks and a smaller image. *first*: seconds for the first call, capture included. "
        "*agree*: largest difference between reference and compiled backend, over the largest "
        "relevance; deep random networks amplify rounding. The seconds are of one CPU thread, "
        f"other work on the machine. {', '.join(versions)}, {date.today()}.",
        "",
        *(
            [f"{EARLIER}: by an earlier version of the package, not run again since.", ""]
            * bool(kept)
        ),
        "| family | model | first | Σ\\|R\\| | delta | agree |",
        "|---|---|---|---|---|---|",
    ]
    written = {name: _line(name, row) for name, row in known.items()}
    return "\n".join([*lines, *(line for _, line in sorted({**kept, **written}.items())), ""])


def _line(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        error = re.sub(r"/\S*/(?=[\w.]+)", "…/", row["error"].replace("|", "\\|"))
        return f"| {name} | | | | | **{error}** |"
    failed = "" if passes(row) else " **not all**"
    return (
        f"| {name}{failed} | {row['model']} | {row['first']:.1f} | {min(row['mass']):.2g} "
        f"| {row['delta']:.0e} | {row['difference']:.0e} |"
    )


def run(name: str, timeout: float) -> dict[str, Any]:
    """Examines a model in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--examine", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"more than {timeout:.0f} s"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    return {"name": name, "error": (lines or [f"ended with code {done.returncode}"])[-1][:200]}


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models whose names begin so")
    parser.add_argument("--again", action="store_true", help="run what has a row already")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="per model")
    parser.add_argument("--examine", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.examine:
        torch.set_num_threads(1)
        print(json.dumps(examine(options.examine)))
        return
    ROWS.mkdir(parents=True, exist_ok=True)
    known = {} if options.again else rows()
    for name in names():
        wanted = not options.only or name.startswith(tuple(options.only))
        if wanted and name not in known:
            row = run(name, options.timeout)
            (ROWS / f"{name.replace('/', '-')}.json").write_text(json.dumps(row, indent=1) + "\n")
            print(name, "ok" if passes(row) else row.get("error", "not all"), flush=True)


if __name__ == "__main__":
    main()
