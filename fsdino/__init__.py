"""FS-DINO: few-shot segmentation with a frozen encoder and a light segmenter that has learnt from SAM.

`Predictor` is the way in for those who want masks; it loads on first use, so that commands start without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsdino.predictor import ClassEncoding, Predictor, Segmentation

__all__ = ["ClassEncoding", "Predictor", "Segmentation"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fsdino' has no attribute {name!r}")
    from fsdino import predictor

    return getattr(predictor, name)
