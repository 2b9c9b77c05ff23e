"""Sandbox: bytes of strangers become pixels in a process of their own, which may die of them.

The same `read_input` as everywhere, so the pixels are the same. The process has limits of memory
and processor time, and a deadline on the clock; a new one takes the place of one that has died.
"""

import json
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

from regraft.data.decode import Pixels, UnreadableImage, quiet_codecs, read_input
from regraft.errors import EnvironmentFault
from regraft.inputs import InputSpec

# Beyond what the interpreter itself has mapped: 50 million pixels as RGBA, twice, in Pillow's four
# bytes a pixel, and their array. Measured: such a PNG needs 0.6 GiB.
MEMORY_BYTES = 2**30
TYPES = {"uint8": np.uint8, "uint16": np.uint16, "int16": np.int16, "float32": np.float32}
DECODE_S = 10.0  # assumed: 50 million pixels take 2 s on a slow core


class Sandbox:
    """One process that decodes; not for two threads at once."""

    def __init__(self, inputs: InputSpec, *, deadline_s: float = DECODE_S) -> None:
        self.inputs, self.deadline_s = inputs, deadline_s
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        environment = {
            # The import path as it is here; one thread of BLAS maps less memory.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        told = json.dumps(self.inputs.to_dict())
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "regraft.data.sandbox",
                str(theirs.fileno()),
                told,
                str(self.deadline_s),
            ],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt at the terminal is for the server alone
        )
        theirs.close()
        self._pipe.recv_bytes()  # it has imported what it needs

    def decode(self, content: bytes) -> Pixels:
        """Returns the pixels, as `read_input` does.

        Raises:
            UnreadableImage: It cannot be decoded, not in time, or the process died of it.
        """
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.deadline_s + 1, stop)  # the processor's limit comes first
        timer.daemon = True
        timer.start()
        try:
            self._pipe.send_bytes(content)
            reply = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self.close()
            died = self._process.returncode
            self._start()
            if late.is_set() or died == -signal.SIGXCPU:
                raise UnreadableImage(
                    "decode-timeout", f"not decoded within {self.deadline_s:g} s"
                ) from error
            raise UnreadableImage("decoder-crash", "the decoder died of it") from error
        finally:
            timer.cancel()
        return self._pixels(reply)

    def _pixels(self, reply: bytes) -> Pixels:
        """Returns what the process answered; nothing of it is trusted."""
        head, _, raw = reply.partition(b"\n")
        try:
            told = json.loads(head)
            if "reason" in told:
                reason = re.sub(r"[^a-z0-9-]", "", str(told["reason"]))[:40]
                raise UnreadableImage(reason, str(told["detail"])[:200])
            flat = np.frombuffer(bytearray(raw), TYPES[told["type"]])  # a copy: torch may write
            pixels: Pixels = flat.reshape(*self.inputs.size, self.inputs.channels)
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadableImage("decoder-crash", "the decoder gave no pixels") from error
        return pixels

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()


class Sandboxes:
    """So many processes that decode; for any number of threads."""

    def __init__(self, number: int, inputs: InputSpec) -> None:
        self._all = [Sandbox(inputs) for _ in range(number)]
        self._free: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        for sandbox in self._all:
            self._free.put(sandbox)

    def decode(self, content: bytes) -> Pixels:
        """Waits for a free process; see `Sandbox.decode`."""
        sandbox = self._free.get()
        try:
            return sandbox.decode(content)
        finally:
            self._free.put(sandbox)

    def close(self) -> None:
        for sandbox in self._all:
            sandbox.close()


def _work(pipe: Connection, inputs: InputSpec, deadline_s: float) -> None:
    """Decodes until the other side hangs up."""
    _answer(b"GIF89a", inputs)  # Pillow loads its formats
    _limit(resource.RLIMIT_AS, _mapped_bytes() + MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    pipe.send_bytes(b"ready")
    with quiet_codecs():
        while True:
            try:
                content = pipe.recv_bytes()
            except EOFError:
                return
            most = resource.getrlimit(resource.RLIMIT_CPU)[1]
            until = _within(int(time.process_time() + deadline_s) + 1, most)
            resource.setrlimit(resource.RLIMIT_CPU, (until, most))
            pipe.send_bytes(_answer(content, inputs))


def _answer(content: bytes, inputs: InputSpec) -> bytes:
    try:
        pixels = read_input(content, inputs)
    except UnreadableImage as error:
        return json.dumps({"reason": error.reason, "detail": error.detail}).encode()
    except MemoryError:
        return b'{"reason": "too-much-memory", "detail": "decoding it takes too much memory"}'
    except EnvironmentFault as error:
        return json.dumps({"reason": "not-installed", "detail": error.message}).encode()
    head = json.dumps({"type": pixels.dtype.name}).encode()
    return head + b"\n" + np.ascontiguousarray(pixels).tobytes()


def _limit(which: int, value: int) -> None:
    value = _within(value, resource.getrlimit(which)[1])
    resource.setrlimit(which, (value, value))


def _within(value: int, most: int) -> int:
    """Returns the value, or less where whoever started us has set less."""
    return value if most == resource.RLIM_INFINITY else min(value, most)


def _mapped_bytes() -> int:
    status = Path("/proc/self/statm")
    pages = int(status.read_text().split()[0]) if status.is_file() else 0
    return pages * resource.getpagesize() if pages else 2**30  # assumed where nobody tells


if __name__ == "__main__":
    _work(
        Connection(int(sys.argv[1])),
        InputSpec.from_dict(json.loads(sys.argv[2])),
        float(sys.argv[3]),
    )
