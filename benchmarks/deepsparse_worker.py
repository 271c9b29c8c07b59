"""Run an ONNX file in DeepSparse: `PYTHON -I deepsparse_worker.py MODEL INPUT OUTPUT CORES`, started by `rivals.py`.

DeepSparse 1.8 is its last release and needs Python 3.10 or older. So this file runs in an environment of its own and
imports nothing of this repository. INPUT and OUTPUT are ``.npy`` files. Standard output gets one JSON object when the
network is ready, and then one for each line of standard input: the seconds of a call, measured here.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine prints its version
    os.environ["NM_DISABLE_ANALYTICS"] = "1"  # it reports each use to a server otherwise

    import deepsparse  # pyright: ignore[reportMissingImports]
    import numpy

    model, source, target, cores = sys.argv[1:]
    x = numpy.load(source)
    engine = deepsparse.Engine(model, batch_size=len(x), num_cores=int(cores))
    numpy.save(target, engine.run([x])[0])
    print(json.dumps({"supported": engine.fraction_of_supported_ops}), file=replies, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        engine.run([x], val_inp=False)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=replies, flush=True)


if __name__ == "__main__":
    main()
