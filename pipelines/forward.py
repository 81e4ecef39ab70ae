"""A network on its device: whole shards in, features as arrays out."""

from collections.abc import Sequence

import numpy as np
import torch

from fsdino.encoder import to_input
from pipelines import cluster
from pipelines.networks import Network
from pipelines.recipes import Extraction


class Forward:
    """Runs a network in batches under the settings' precision."""

    def __init__(self, network: Network, settings: Extraction):
        torch.set_num_threads(max(1, int(settings.actor_cpus)))
        self.device = torch.device("cuda" if settings.actor_gpus else "cpu")
        self.network, self.settings = network, settings
        network.module.to(self.device)
        if settings.compile:
            network.module.compile()

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Pixels (n, r, r, 3) uint8 or stored features (n, g, g, c) in, wanted features (n, g, g, c) out."""
        outputs: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        for start in range(0, len(pixels), self.settings.forward_batch):
            part = np.array(pixels[start : start + self.settings.forward_batch])
            if part.dtype == np.uint8:
                x = to_input(part, self.network.mean, self.network.std)
            else:
                x = torch.from_numpy(part).movedim(-1, 1).float()
            with cluster.autocast(self.settings.precision, self.device):
                features = self.network.features(x.to(self.device), wanted)
            for name in wanted:
                outputs[name].append(features[name].float().movedim(1, -1).cpu().numpy())
        return {name: np.concatenate(parts) for name, parts in outputs.items()}
