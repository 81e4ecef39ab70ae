"""A training-free yardstick after PerSAM: the peak of the similarity map as a point prompt of SAM's own decoder."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fsdino import paper
from fsdino.decoder import MaskDecoder, PositionalEncoding
from fsdino.prompts import mask_to_grid, masked_mean, prototype_similarity


class PeakPrompt(nn.Module):
    """SAM's decoder and the parts of its prompt encoder that points need, under SAM's key names but for ours of the
    decoder (state.py)."""

    def __init__(self, channels: int = paper.EMBEDDING_CHANNELS):
        super().__init__()
        self.positional_encoding = PositionalEncoding(channels)
        self.decoder = MaskDecoder(channels)
        self.background_point, self.foreground_point = nn.Embedding(1, channels), nn.Embedding(1, channels)
        self.not_a_point_embed = nn.Embedding(1, channels)
        self.no_mask_embed = nn.Embedding(1, channels)

    def forward(
        self,
        late: Float[Tensor, "b k c g g"],
        masks: Float[Tensor, "b k h w"],
        query: Float[Tensor, "b c g g"],
        embedding: Float[Tensor, "b e g g"],
    ) -> Float[Tensor, "b 1 m m"]:
        """Mask logits for a foreground point where the query resembles the class most, and a background point where
        least."""
        grid = query.shape[-1]
        flat = late.flatten(0, 1)
        weights = mask_to_grid(masks.flatten(0, 1).to(late.dtype), grid)
        prototype = masked_mean(flat, weights).unflatten(0, late.shape[:2]).mean(1)
        similarity = prototype_similarity(prototype, query).flatten(1)
        encoding = self.positional_encoding(grid)
        return self.prompted(embedding, encoding, similarity.argmax(1), similarity.argmin(1))

    def prompted(
        self, embedding: Float[Tensor, "b e g g"], encoding: Float[Tensor, "1 e g g"], peak: Tensor, least: Tensor
    ) -> Float[Tensor, "b 1 m m"]:
        """Mask logits for a point of the class and one of the background, as positions of the grid."""
        places = encoding.flatten(2)[0].T
        points = [
            places[peak] + self.foreground_point.weight,
            places[least] + self.background_point.weight,
            self.not_a_point_embed.weight.expand(len(peak), -1),  # SAM's, where no box is given
        ]
        dense = self.no_mask_embed.weight[..., None, None].expand_as(embedding)
        return self.decoder(embedding, encoding, torch.stack(points, 1), dense)
