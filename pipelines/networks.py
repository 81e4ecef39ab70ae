"""What an extraction's actors run: each network described here in a few fields, and built where it runs.

A description travels to the actors; torch is loaded, and weights are read, only there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fsdino.errors import UserError
from fsdino.weights import weights_digest
from pipelines.checkpoints import AdapterPlan
from pipelines.recipes import Backbone, Teaching

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A built network: a normalised batch (or stored features) and the names of the features that are wanted in, each
    as `b c g g` out."""

    module: "nn.Module"
    features: "Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class NetworkPlan(Protocol):
    """A network that is built on arrival."""

    @property
    def weights(self) -> tuple[tuple[str, str | None], ...]:
        """Published networks that it needs, and the files named for their weights."""
        ...

    def build(self) -> Network:
        """The network, frozen. Raises UserError if the weights here are others than the driver's."""
        ...


@dataclass(frozen=True)
class EncoderPlan:
    """The encoder, computing only the features that are wanted."""

    backbone: Backbone
    digest: str

    @property
    def weights(self) -> tuple[tuple[str, str | None], ...]:
        """See NetworkPlan."""
        return ((self.backbone.encoder, self.backbone.encoder_weights),)

    def build(self) -> Network:
        """See NetworkPlan."""
        from fsdino.encoder import build_encoder

        of = self.backbone
        _check_weights(of.encoder, of.encoder_weights, self.digest)
        encoder = build_encoder(of.encoder, of.encoder_weights, early_norm=of.early_norm, late_norm=of.late_norm)

        def features(x: "Tensor", wanted: Sequence[str]) -> "Mapping[str, Tensor]":
            return {"early": encoder.early(x)} if tuple(wanted) == ("early",) else encoder(x)._asdict()

        return Network(encoder, features, encoder.mean, encoder.std)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TeacherPlan:
    """The teacher's embedding."""

    teaching: Teaching
    digest: str

    @property
    def weights(self) -> tuple[tuple[str, str | None], ...]:
        """See NetworkPlan."""
        return ((self.teaching.teacher, self.teaching.teacher_weights),)

    def build(self) -> Network:
        """See NetworkPlan."""
        from fsdino.teacher import build_teacher

        _check_weights(self.teaching.teacher, self.teaching.teacher_weights, self.digest)
        teacher = build_teacher(self.teaching.teacher, self.teaching.teacher_weights)
        return Network(teacher, lambda x, _: {"teacher": teacher(x)}, teacher.mean, teacher.std)  # type: ignore[arg-type]


@dataclass(frozen=True)
class BakePlan:
    """The frozen adapter, on stored early features."""

    adapter: AdapterPlan

    @property
    def weights(self) -> tuple[tuple[str, str | None], ...]:
        """See NetworkPlan."""
        return ()

    def build(self) -> Network:
        """See NetworkPlan."""
        from fsdino.state import state_digest

        adapter = self.adapter.load()
        if state_digest(adapter) != self.adapter.digest:
            raise UserError(f"{self.adapter.url}: the adapter has changed since this job began; rerun the command")
        return Network(adapter, lambda x, _: {"embedding": adapter(x)})


def _check_weights(name: str, weights: str | None, digest: str) -> None:
    here = weights_digest(name, weights)
    if here != digest:
        raise UserError(
            f"{weights or name}: expected the weights {digest} that the driver has, got {here}; copy the same file to "
            "every node"
        )
