"""The command that serves."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.terminal import progress


def serve(
    run: Path,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: Annotated[str | None, Parameter(env_var="REGRAFT_TOKEN", show_default=False)] = None,
    allow_host: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    insecure: Annotated[bool, Parameter(negative="")] = False,
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
