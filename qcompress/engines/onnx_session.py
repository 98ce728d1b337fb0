"""An ONNX Runtime session, and the memory it takes; also a stand-alone program that imports nothing else.

    python -I onnx_session.py FILE INPUTS.npz THREADS

prints the bytes by which the peak memory of the process grew while it loaded the file and ran it once.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")  # Linux only; elsewhere memory is not measured


def opened(path: Path, threads: int) -> Any:
    """Open the file, ready to run, with the options that every session has by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def peak_bytes(path: Path, inputs: Path, threads: int) -> int | None:
    """Return the peak memory of loading and running a file in a separate process; None if it cannot be measured.

    Args:
        path: the file.
        inputs: ``.npz`` file of its inputs by name.
        threads: number of threads.
    """
    if not STATUS.exists():
        return None
    # isolated (-I), because the modules beside this file would hide packages of the same name
    command = [sys.executable, "-I", __file__, str(path), str(inputs), str(threads)]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return int(completed.stdout)


def _most_bytes() -> int:
    """Return the peak memory of this process."""
    peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1])


def _main() -> None:
    import numpy as np
    import onnxruntime  # noqa: F401  (imported first, so that its own memory is not counted)

    path, inputs, threads = sys.argv[1:]
    with np.load(inputs, allow_pickle=False) as held:
        feed = dict(held)
    before = _most_bytes()
    opened(Path(path), int(threads)).run(None, feed)
    sys.stdout.write(str(_most_bytes() - before))


if __name__ == "__main__":
    _main()
