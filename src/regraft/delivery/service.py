"""Service: what is served and to whom, before any framework comes in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from regraft.delivery.gate import Access, Limits
from regraft.documents import sha256_of_file
from regraft.engine import Engine
from regraft.errors import EnvironmentFault, count
from regraft.evaluation.answers import Answers
from regraft.models.classifier import WEIGHTS, Classifier, final_folder


@dataclass(frozen=True)
class Service:
    """What is served.

    Attributes:
        answers: The Classifier.
        description: What `/model` tells.
        access: Who may ask.
        tell: Takes one line for each request.
        limits: What is granted.
    """

    answers: Answers
    description: dict[str, Any]
    access: Access
    tell: Callable[[str], None]
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def of(
        cls,
        run: Path,
        access: Access,
        tell: Callable[[str], None],
        *,
        arch: str | None,
        engine: Engine,
    ) -> "Service":
        """Loads the Classifier of a Run, or a bare one; the files are not needed afterwards."""
        folder = final_folder(run)
        classifier = Classifier.load(folder, arch=arch)
        description = {
            "name": run.resolve().name,
            "arch": Path(classifier.backbone.arch).name,  # of a network of one's own, no path
            "class_names": list(classifier.class_names),
            "size": list(classifier.inputs.size),
            "channels": classifier.inputs.channels,
            "weights_sha256": sha256_of_file(folder / WEIGHTS),
            "device": engine.device.type,
            "precision": engine.precision,
            "explains": True,
        }
        return cls(Answers(classifier, engine), description, access, tell)

    def welcome(self, host: str, port: int) -> str:
        """Returns what the one who starts it wants to know."""
        told = self.description
        height, width = told["size"]
        names = count(len(told["class_names"]), "class", "classes")
        place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        lines = [
            f"serving {told['name']}: {told['arch']}, {names}, {height}x{width} px, "
            f"{told['precision']}",
            f"page:    {place}/",
            f"predict: curl --data-binary @image.png -H 'Content-Type: image/png' {place}/predict",
            "stop:    Ctrl-C",
        ]
        if not self.access.only_loopback and self.access.token is None:
            lines.insert(0, "warning: everybody who reaches this machine may ask, without a token")
        return "\n".join(lines)


def web_part() -> ModuleType:
    """Returns the part that needs the web framework.

    Raises:
        EnvironmentFault: It is not installed.
    """
    try:
        from regraft.delivery import serve
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"serving needs a package that is not installed: `{error.name}`",
            hint="pip install 'regraft[serve]'",
        ) from error
    return serve
