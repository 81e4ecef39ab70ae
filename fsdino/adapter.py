"""The bottleneck adapter (Sec. 3.3.1): turns early encoder features into SAM-like image embeddings."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fsdino import checkpoint, paper
from fsdino.errors import UserError
from fsdino.state import state_digest


class BottleneckAdapter(nn.Module):
    """Reduce to 128 channels by 1x1, 3x3 and 1x1 convolutions, attend twice, and widen to the teacher's channels.

    1,249,408 parameters at 768 input and 256 output channels. ReLU between the convolutions is ours: the paper
    names none, and without one the three would be a single linear map.
    """

    def __init__(self, in_channels: int, out_channels: int = paper.EMBEDDING_CHANNELS):
        super().__init__()
        wide, mid, narrow = paper.ADAPTER_WIDTHS
        self.reduce = nn.Conv2d(in_channels, wide, 1)
        self.mix = nn.Conv2d(wide, mid, 3, padding=1)
        self.narrow = nn.Conv2d(mid, narrow, 1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(narrow, paper.ADAPTER_HEADS, paper.ADAPTER_FFN, dropout=0.0, batch_first=True)
            for _ in range(paper.ADAPTER_BLOCKS)
        )
        self.widen = nn.Conv2d(narrow, out_channels, 1)

    def forward(self, early: Float[Tensor, "b c g g"]) -> Float[Tensor, "b e g g"]:
        """Image embedding on the same grid as `early`."""
        x = F.relu(self.reduce(early))
        x = F.relu(self.mix(x))
        x = self.narrow(x)
        grid = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.widen(tokens.transpose(1, 2).unflatten(2, grid))

    def save(self, folder: str | Path, **origin: Any) -> None:
        """Write `adapter.safetensors` and `adapter.json`: channels, digest, and `origin` (JSON on where it is from)."""
        channels = {"in_channels": self.reduce.in_channels, "out_channels": self.widen.out_channels}
        record = {"config": channels, "digest": state_digest(self), **origin}
        checkpoint.save(folder, "adapter", self.state_dict(), record)

    @classmethod
    def load(cls, folder: str | Path) -> tuple["BottleneckAdapter", dict]:
        """The saved adapter in eval mode, and its JSON record. Raises UserError if the folder is no checkpoint."""
        state, record = checkpoint.read(folder, "adapter")
        try:
            adapter = cls(**record["config"])
            adapter.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{folder}: expected an adapter's checkpoint, got another's ({first})") from None
        return adapter.eval(), record
