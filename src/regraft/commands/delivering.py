"""Commands that hand a model to others."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.commands.arguments import DataArguments
from regraft.terminal import print_json, progress


def export(
    run: Path,
    /,
    *,
    to: str,
    out: Path,
    data: Path | None = None,
    images: int = 64,
    license: str = "unknown",
    arch: str | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    reading: DataArguments = DataArguments(),
) -> None:
    """Write a model for other programs, with a model card. It must say there what it says here.

    Parameters
    ----------
    run
        Folder of the Run.
    to
        onnx, timm (a folder, also for Hugging Face) or torch (torch.export).
    out
        The file, as model.onnx or model.pt2; or the folder of timm.
    data
        Images to check it on; left out: those of the Run, as its training has decoded them.
    images
        How many of them, at most.
    license
        Of the weights, in Hugging Face's words, as apache-2.0; yours to say.
    arch
        Only to name your own network again (file.py:factory).
    json_
        Print one JSON document.
    """
    from regraft import api
    from regraft.data.dataset import Dataset

    with progress() as told:
        dataset = None
        if data is not None:
            has_record = (run / "run.json").is_file()
            options = reading.options_as_in(run) if has_record else reading.options()
            dataset = Dataset.open(data, options, whole=True)
        agreement = api.export(
            run,
            to=to,
            out=out,
            data=dataset,
            images=images,
            license=license,
            arch=arch,
            on_progress=told,
        )
    if json_:
        print_json({"out": str(out), **vars(agreement)})
        return
    print(f"checked: {agreement.told()}")
    print(f"written: {out}, and its model card")
