"""A small decoder in the manner of Hugging Face: every argument has a default, layers get masks and tables by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipebd import BlockwiseDistillationModule, layer_blocks

__all__ = ["Decoder", "DistilledDecoder", "Layer"]


class Layer(nn.Module):
    """Mixes the places that the mask lets it see; gives a tuple, as such layers do.

    Without a mask it sees its own place, or all that come before if it completes masks (the near ones if it is odd).
    """

    def __init__(self, width: int, inner: int, index: int) -> None:
        super().__init__()
        self.completes = False
        self.is_odd = index % 2 == 1
        self.mix = nn.Linear(width, width)
        self.wide = nn.Linear(width, inner)
        self.narrow = nn.Linear(inner, width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Give the hidden states and nothing."""
        assert position_embeddings is not None
        cosine, sine = position_embeddings
        mixed = self.mix(hidden_states * cosine + hidden_states.flip(-1) * sine)
        if attention_mask is None and self.completes:
            attention_mask = make_masks(mixed.new_ones(1, mixed.shape[1]))[self.is_odd]
        if attention_mask is not None:
            mixed = attention_mask @ mixed
        if kwargs.get("scale") is not None:
            mixed = mixed * kwargs["scale"]
        return hidden_states + self.narrow(torch.relu(self.wide(mixed))), None


def make_masks(attention_mask: Tensor) -> list[Tensor]:
    """Give how much each place sees of each other: of all before it, and of the near ones."""
    length = attention_mask.shape[1]
    seen = attention_mask.new_ones(length, length).tril() * attention_mask[:, None, :]
    return [mask / mask.sum(-1, keepdim=True).clamp(min=1) for mask in (seen, seen.triu(-1))]


class Body(nn.Module):
    """Embeddings and layers."""

    offset: Tensor

    def __init__(self, num_layers: int, width: int, inner: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.dropout = nn.Dropout(0.1)
        self.begin = nn.Parameter(torch.randn(width))
        self.register_buffer("offset", torch.randn(width))
        self.layers = nn.ModuleList(Layer(width, inner, index) for index in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.cache: Any = None
        self.is_reversed = False
        self.leaves_out = False

    def leave_out_masks(self) -> None:
        """Hand no masks to the layers where nothing is padded."""
        self.leaves_out = True
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.completes = True

    def forward(self, tokens: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Give the last hidden states."""
        assert tokens is not None
        length = tokens.shape[1]
        angles = torch.arange(length, dtype=self.begin.dtype)[None, :, None] / 7
        masks: list[Any] = [None, None]
        if attention_mask is not None and not (self.leaves_out and bool(attention_mask.all())):
            masks = list(make_masks(attention_mask.to(self.begin)))
        scale = angles.new_ones(1) * 0.5
        hidden = self.dropout(self.embed(tokens)) + self.begin + self.offset
        for index, layer in enumerate(reversed(self.layers) if self.is_reversed else self.layers):
            hidden = layer(
                hidden,
                masks[index % 2],
                # Made anew for every layer, as some models do.
                position_embeddings=(angles.cos(), angles.sin()),
                past_key_values=self.cache,
                scale=scale,
            )[0]
        normed: Tensor = self.norm(hidden)
        return normed


class Decoder(nn.Module):
    """Body and head."""

    def __init__(self, num_layers: int = 3, width: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.body = Body(num_layers, width, inner)
        self.head = nn.Linear(width, 11)

    def forward(
        self, tokens: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Give logits."""
        logits: Tensor = self.head(self.body(tokens, attention_mask=attention_mask))
        return logits


class DistilledDecoder(BlockwiseDistillationModule):
    """Learns a decoder's layers, last norm and head."""

    def __init__(self, dropout: float = 0.1, *, leaves_out: bool = False) -> None:
        torch.manual_seed(5)
        teacher, student = Decoder(), Decoder(inner=4)
        student.body.dropout.p = dropout
        if leaves_out:
            teacher.body.leave_out_masks()
            student.body.leave_out_masks()
        example = {"tokens": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5)}
        cut = [layer_blocks(model, "body.layers", example, tail=["body.norm", "head"]) for model in (teacher, student)]
        super().__init__(teacher, student, teacher_blocks=cut[0], student_blocks=cut[1])

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        """Give the model's keyword arguments."""
        tokens, mask = batch
        return {"tokens": tokens, "attention_mask": mask}, None

    def configure_optimizers(self) -> Any:
        """Give one optimizer."""
        return torch.optim.AdamW(self.trainable_parameters(), lr=0.01)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log what the whole student gives."""
        self.log("val", self.student(*batch).square().mean(), batch_size=len(batch[0]))
