"""Parts of packages whose `__init__` loads far more than the part needs."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


def sam_modeling() -> Any:
    """segment_anything.modeling, without the package's own import of torchvision and, through it, of torch's compiler:
    4 of the 8 seconds in which a worker starts (docs/benchmarks/startup.md)."""
    name = "segment_anything"
    if name in sys.modules:
        return importlib.import_module(f"{name}.modeling")
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None
    stand_in = ModuleType(name)
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = stand_in
    try:
        return importlib.import_module(f"{name}.modeling")
    finally:
        del sys.modules[name]  # whoever wants the package gets the package
