"""The models on which the cost of a private step is measured beside a plain one.

Each is a common size of its kind: a LeNet for 28 x 28 images (57 thousand parameters), the network of
PyTorch's MNIST example (1.2 million), and a small language model (0.84 million).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, CONTEXT, WIDTH, HEADS, BLOCKS = 128, 32, 128, 4, 4


@dataclass(frozen=True)
class BenchModel:
    """A model with the batch that it is measured on.

    Attributes:
        name: Key in results.
        build: Returns the model with weights from the global generator.
        batch: Returns examples and targets of the measured batch size.
        loss: Returns one loss for each example, shape (n,).
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def lenet() -> nn.Module:
    """Return a LeNet of 57,190 parameters for (n, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def wide_cnn() -> nn.Module:
    """Return the 1,199,882 parameters of PyTorch's MNIST example, without dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class Attention(nn.Module):
    """Causal multi-head attention whose parameters are in Linear layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended values, (n, t, width)."""
        n, t, _ = x.shape
        parts = self.queries_keys_values(x).view(n, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(n, t, WIDTH))
        return result


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.dense_norm = nn.LayerNorm(WIDTH)
        self.dense = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (n, t, width)."""
        x = x + self.attention(self.attention_norm(x))
        result: Tensor = x + self.dense(self.dense_norm(x))
        return result


class LanguageModel(nn.Module):
    """A decoder-only transformer that predicts the next of 128 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (n, t, 128) for ids (n, t)."""
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        result: Tensor = self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(positions))))
        return result


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 28, 28), torch.randint(10, (n,))


def _texts(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(VOCABULARY, (n, CONTEXT)), torch.randint(VOCABULARY, (n, CONTEXT))


def _class_loss(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y, reduction="none")


def _text_loss(logits: Tensor, y: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    return losses.view_as(y).mean(dim=1)


BENCH_MODELS = (
    BenchModel("cnn57k", lenet, lambda: _images(256), _class_loss),
    BenchModel("cnn1.2M", wide_cnn, lambda: _images(64), _class_loss),
    BenchModel("transformer0.84M", LanguageModel, lambda: _texts(64), _text_loss),
)
"""The three models, in the order of published results."""
