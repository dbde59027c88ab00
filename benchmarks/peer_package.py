"""Time one package of ours in a process of its own; `benchmarks.peers` starts it.

    python -m benchmarks.peer_package PACKAGE JOB

JOB and what is printed: see `benchmarks.peers.Job`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.decode import measure
from benchmarks.prefill import tokens_per_second
from runtime_py import Session


def main(package: str, job_text: str) -> int:
    """Run the job."""
    job = json.loads(job_text)
    session = Session(Path(package), threads=job["threads"])
    seconds = {f"depth {depth}": measure(session, depth, job["seconds"]) for depth in job["depths"]}
    for tokens in job["prompts"]:
        session.start().step([1, 2, 3])
        seconds[f"prompt {tokens}"] = [tokens / tokens_per_second(session, tokens)]
    print(json.dumps({"package": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
