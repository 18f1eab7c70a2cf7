"""Tables and text: which measurements, which words?

    python examples/tabular_and_text.py [--out DIR]

1. Tabular: a dense network tells malignant from benign tumours by 30 measurements of their cells
   (scikit-learn's breast cancer data). Which of them does it go by, and in which does it treat
   the two classes differently?
2. Text: a small convolutional network judges one-line film reviews. Its input are integers, which
   have no relevance of their own, so the words are explained at the output of the embedding.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from captum_rlrp import LayerRelativeLRP, RelevanceStatistics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RED, BLUE = "#c8443c", "#3f6fb5"


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), labels[chosen]).backward()
            optimizer.step()
    model.eval()


def right(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == labels).double().mean().item()


# %% Tabular

MALIGNANT, BENIGN = 1, 0


def load_tumours() -> tuple[Tensor, Tensor, list[str]]:
    """Standardised: 0 is the average tumour, so relevance is about what departs from it."""
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    labels = 1 - torch.tensor(data.target)  # scikit-learn calls malignant 0
    return x, labels, [str(name) for name in data.feature_names]


def tabular(out: Path) -> dict[str, float]:
    x, labels, names = load_tumours()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learn, test = order[:400], order[400:]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    train(model, x[learn], labels[learn], epochs=15)
    accuracy = right(model, x[test], labels[test])

    # One output for all, so that the sign means the same in both classes: towards malignant.
    batches = [(x[part], labels[part]) for part in test.split(64)]
    statistics = RelevanceStatistics.collect(
        model, batches, layers=[], target=MALIGNANT, group_by="label"
    )
    difference = statistics.compare("input", MALIGNANT, BENIGN)
    ranked = difference.difference.abs().argsort(descending=True)
    significant = set(difference.significant(0.01).tolist())
    draw_features(out / "features.png", statistics, ranked[:12].tolist(), names, significant)

    print(f"1. Tumours: {accuracy:.1%} of {len(test)} test cases right.")
    print(f"   {len(significant)} of 30 measurements are used differently (Holm, p < 0.01). Most:")
    for i in ranked[:5].tolist():
        print(
            f"   {names[i]:<24}{difference.difference[i]:+.3f}   p = {difference.adjusted[i]:.1e}"
        )
    # What pathologists look at, and what the data set's authors found to separate the classes.
    known = {"worst concave points", "worst area", "worst texture", "worst radius",
             "worst perimeter", "mean concave points", "worst concavity"}  # fmt: skip
    found = len(known & {names[i] for i in ranked[:8].tolist()})
    return {"tumours": accuracy, "known features": found, "significant": len(significant)}


def draw_features(
    path: Path,
    statistics: RelevanceStatistics,
    shown: list[int],
    names: list[str],
    significant: set[int],
) -> None:
    figure, axis = plt.subplots(figsize=(8.2, 5), layout="constrained")
    rows = torch.arange(len(shown))
    for label, title, colour, shift in (
        (MALIGNANT, "malignant tumours", RED, -0.2),
        (BENIGN, "benign tumours", BLUE, 0.2),
    ):
        axis.barh(
            rows + shift,
            statistics.mean("input", label)[shown],
            0.38,
            xerr=1.96 * statistics.standard_error("input", label)[shown],
            color=colour,
            error_kw={"elinewidth": 0.8},
            label=f"in {statistics.counts[label]} {title}",
        )
    stars = [names[i] + (" *" if i in significant else "") for i in shown]
    axis.set_yticks(rows, stars)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("← speaks for benign        mean relevance        speaks for malignant →")
    axis.set_title(
        "Which measurements does the network go by?\n"
        "(with 95 % intervals; * the classes differ, p < 0.01 after correction)",
        fontsize=11,
    )
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# %% Text

GOOD = ["wonderful", "brilliant", "moving", "clever", "charming", "funny", "superb"]
BAD = ["dull", "awful", "tedious", "clumsy", "shallow", "boring", "terrible"]
PLAIN = ["long", "short", "french", "quiet", "recent", "black-and-white", "low-budget"]
THINGS = ["film", "plot", "cast", "ending", "music", "dialogue", "camera"]
OPENINGS = ["honestly", "overall", "frankly", "somehow", "again", "today", "yesterday"]
DEGREES = ["very", "quite", "really", "rather", "so", "truly"]
WORDS = ["<pad>", "the", "was", "is", "and", "not",
         *GOOD, *BAD, *PLAIN, *THINGS, *OPENINGS, *DEGREES]  # fmt: skip
INDEX = {word: i for i, word in enumerate(WORDS)}
LENGTH = 11


def write_review(chooser: random.Random) -> tuple[list[str], int]:
    """Words such as "overall the french plot was not very dull", and whether that is praise."""
    good = chooser.random() < 0.5
    negated = chooser.random() < 0.4
    words = [
        *chooser.sample(OPENINGS, chooser.randint(0, 1)),
        "the", chooser.choice(PLAIN), chooser.choice(THINGS), chooser.choice(["was", "is"]),
        *(["not"] if negated else []), *chooser.sample(DEGREES, chooser.randint(0, 1)),
        chooser.choice(GOOD if good != negated else BAD),
        *chooser.choice([[], [chooser.choice(OPENINGS)], ["and", chooser.choice(PLAIN)]]),
    ]  # fmt: skip
    return words, int(good)


def encode(reviews: Sequence[list[str]]) -> Tensor:
    padded = [[*review, *["<pad>"] * (LENGTH - len(review))] for review in reviews]
    return torch.tensor([[INDEX[word] for word in review] for review in padded])


class TextNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 16, padding_idx=INDEX["<pad>"])
        self.conv = nn.Conv1d(16, 32, 3)  # sees three neighbouring words at a time
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = F.relu(self.conv(self.embedding(ids).transpose(1, 2)))
        return self.head(h.amax(2))


def text(out: Path) -> dict[str, float]:
    chooser = random.Random(0)
    reviews, verdicts = zip(*(write_review(chooser) for _ in range(1500)), strict=True)
    ids, labels = encode(reviews), torch.tensor(verdicts)
    torch.manual_seed(0)
    model = TextNet()
    train(model, ids[:1200], labels[:1200], epochs=15)
    accuracy = right(model, ids[1200:], labels[1200:])

    # Relevance of every number of the embedding; a word's is their sum.
    explainer = LayerRelativeLRP(model, model.embedding)
    with torch.no_grad():
        named = model(ids[1200:]).argmax(1)
    words = explainer.attribute(ids[1200:], target=named).sum(2)
    verdict_words = {*GOOD, *BAD, "not"}
    highest = [reviews[1200 + i][k] if k < len(reviews[1200 + i]) else "<pad>"
               for i, k in enumerate(words.argmax(1).tolist())]  # fmt: skip
    found = sum(word in verdict_words for word in highest) / len(highest)

    print(f"2. Reviews: {accuracy:.1%} of {len(named)} test reviews right.")
    print(f"   The word with most relevance is one of the verdict in {found:.0%}. For example:")
    # The first of each kind: plain or negated, bad or good.
    kinds = {("not" in reviews[1200 + i], int(named[i])): i for i in reversed(range(len(named)))}
    some = [kinds[kind] for kind in sorted(kinds)]
    for i in some:
        pairs = zip(reviews[1200 + i], words[i].tolist(), strict=False)  # without the padding
        line = " ".join(f"{w}({r:+.2f})" if abs(r) >= 0.1 else w for w, r in pairs)
        print(f"   {('bad', 'good')[named[i]]:>4}: {line}")
    rows = [(reviews[1200 + i], words[i].tolist(), int(named[i])) for i in some]
    draw_reviews(out / "words.png", rows)
    return {"reviews": accuracy, "verdict words": found}


def draw_reviews(path: Path, rows: list[tuple[list[str], list[float], int]]) -> None:
    figure, axis = plt.subplots(figsize=(10, 0.52 * len(rows) + 1.1), layout="constrained")
    axis.set_title(
        "Which words speak for the verdict?   red: for it · blue: against it", fontsize=11
    )
    colours = plt.get_cmap("RdBu_r")
    for row, (review, relevance, verdict) in enumerate(rows):
        axis.text(0, row, f"judged {('bad', 'good')[verdict]}:", va="center", weight="bold")
        x, most = 1.25, max(map(abs, relevance))
        for word, r in zip(review, relevance, strict=False):
            colour = colours(0.5 + 0.4 * r / most)
            width = 0.14 + 0.105 * len(word)
            box = plt.Rectangle((x, row - 0.36), width, 0.72, facecolor=colour, edgecolor="none")
            axis.add_patch(box)
            ink = "white" if abs(r) > 0.8 * most else "black"
            axis.text(x + width / 2, row, word, ha="center", va="center", color=ink, fontsize=10)
            x += width + 0.05
    axis.set_xlim(0, 9)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# %% The whole


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tables"), help="folder for the figures")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    results = tabular(out) | text(out)
    print("Figures:", *(path.resolve() for path in sorted(out.glob("*.png"))), sep="\n  ")
    return results


if __name__ == "__main__":
    main()
