"""Transfer learning without ImageNet weights: the public names."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.api import (
        check,
        compare,
        evaluate,
        explain,
        export,
        finetune,
        import_weights,
        predict,
        pretrain,
        report,
        resume,
        serve,
        verify,
    )
    from regraft.data.dataset import DataOptions, Dataset
    from regraft.models.backbone import Backbone
    from regraft.models.classifier import Classifier
    from regraft.run import Run
    from regraft.training.recipe import Phase, Recipe

_HOMES = {
    "check": "regraft.api",
    "pretrain": "regraft.api",
    "finetune": "regraft.api",
    "compare": "regraft.api",
    "evaluate": "regraft.api",
    "explain": "regraft.api",
    "export": "regraft.api",
    "import_weights": "regraft.api",
    "predict": "regraft.api",
    "report": "regraft.api",
    "resume": "regraft.api",
    "serve": "regraft.api",
    "verify": "regraft.api",
    "DataOptions": "regraft.data.dataset",
    "Dataset": "regraft.data.dataset",
    "Backbone": "regraft.models.backbone",
    "Classifier": "regraft.models.classifier",
    "Run": "regraft.run",
    "Phase": "regraft.training.recipe",
    "Recipe": "regraft.training.recipe",
}
__all__ = [
    "Backbone",
    "Classifier",
    "DataOptions",
    "Dataset",
    "Phase",
    "Recipe",
    "Run",
    "check",
    "compare",
    "evaluate",
    "explain",
    "export",
    "finetune",
    "import_weights",
    "predict",
    "pretrain",
    "report",
    "resume",
    "serve",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `regraft --help` never waits for torch.
    if name not in _HOMES:
        raise AttributeError(f"module `regraft` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)
