"""Commands that take a model in from other tools, and hand one out."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.commands.arguments import DataArguments, Flag, Json, Many, parse_numbers
from regraft.terminal import print_json, progress


def import_(
    file: Path,
    /,
    *,
    source: str,
    out: Path,
    arch: str | None = None,
    preprocessing: str | None = None,
    mean: str = "",
    std: str = "",
    scale: float | None = None,
    image_size: int | None = None,
    classes: str = "",
) -> None:
    """Make a start from weights that Keras, torch or timm saved. Code in a file is never run.

    Parameters
    ----------
    file
        .h5, .weights.h5 or .keras; .pt or .pth (a state dict); .safetensors; or a folder of timm.
    source
        Where the weights are from, in words: 'own training on ...'. Kept for ever.
    out
        Folder of the model; new. For --start of `finetune` and `compare`.
    arch
        The network that was trained: a name of timm, or your own as file.py:factory.
    preprocessing
        How its images were scaled: keras-rescale, caffe, tf, torch or none.
    mean
        Subtracted from each channel, as 0.5,0.5,0.5, after --scale.
    std
        Divided by, likewise.
    scale
        What values from 0 to 255 were multiplied by first, as 0.00392.
    image_size
        Side of the square input in pixels.
    classes
        Class names in the order of the outputs, as NORMAL,PNEUMONIA.
    """
    from regraft import api

    numbers = {
        "mean": parse_numbers("mean", mean),
        "std": parse_numbers("std", std),
        "scale": scale,
    }
    with progress() as told:
        classifier = api.import_weights(
            file,
            out=out,
            source=source,
            arch=arch,
            preprocessing=preprocessing,
            numbers={name: value for name, value in numbers.items() if value},
            image_size=image_size,
            class_names=tuple(name for name in classes.split(",") if name),
            on_progress=told,
        )
    millions = classifier.backbone.num_parameters / 1e6
    print(f"imported: {out} ({classifier.backbone.arch}, {millions:.3g} million parameters)")
    print(f"weights from elsewhere: {source.strip()}")
    print(f"next: regraft finetune DATA --start {out} --out runs/target")


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
    json_: Json = False,
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


def serve(
    run: Path,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: Annotated[str | None, Parameter(env_var="REGRAFT_TOKEN", show_default=False)] = None,
    allow_host: Many = (),
    insecure: Flag = False,
    arch: str | None = None,
    device: str = "auto",
) -> None:
    """Answer over HTTP what predict would say, with a page to drop images on.

    It stops at Ctrl-C or a termination signal, after it has answered what it had begun.

    Parameters
    ----------
    run
        Folder of the Run.
    host
        Address to listen on; other machines can ask only if it is not this machine's own.
    port
        0 takes a free one.
    token
        What others must send as `Authorization: Bearer TOKEN`; needed where other machines can ask.
    allow_host
        Another name by which the server is known, as behind a proxy; once for each.
    insecure
        Let other machines ask without a token.
    arch
        Only to name your own network again (file.py:factory).
    device
        auto, cpu, cuda, cuda:0 or mps.
    """
    from regraft import api
    from regraft.engine import Engine

    with progress() as told:
        api.serve(
            run,
            host=host,
            port=port,
            token=token,
            allow_hosts=allow_host,
            insecure=insecure,
            arch=arch,
            engine=Engine(device),
            on_progress=told,
        )
