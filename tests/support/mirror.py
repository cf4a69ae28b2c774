"""A program that says how it was started and ends as it is told: for `test_launcher.py`."""

import json
import os
import signal
import sys
from pathlib import Path

OURS = ("replicator", "enrichment", "sinks", "checkpoint_store")

if __name__ == "__main__":
    seen = {
        "arguments": [sys.argv, sys.orig_argv],
        "python": [sys.path, sys.warnoptions, str(Path.cwd())],
        "environment": dict(os.environ),
        "ours": [name for name in sys.modules if name.partition(".")[0] in OURS],
        "open": [str(file) for file in Path("/proc/self/fd").iterdir() if file.exists()],
        "interrupt": str(signal.getsignal(signal.SIGINT)),
        "input": sys.stdin.read(),
    }
    sys.stdout.write(json.dumps(seen, indent=1))
    sys.stdout.flush()
    sys.stderr.write(__name__)
    code = int(os.environ["REPLICATOR_CODE"])
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
