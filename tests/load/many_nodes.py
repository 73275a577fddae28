"""Many owners' nodes on one machine: one process imports everything and forks a child for each home.

``python -m tests.load.many_nodes PORT HOME...`` reads the passphrase of all homes from standard input, and
ends its children when it is told to end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import torch

import client.node


def main(port: str, *homes: str) -> None:
    """Fork the nodes and wait."""
    torch.set_num_threads(1)
    passphrase, children = sys.stdin.buffer.read(), []
    for home in homes:
        child = os.fork()
        if child == 0:
            client.node.run_node(Path(home), passphrase, f"127.0.0.1:{port}")
            os._exit(0)
        children.append(child)

    def stop(_number: int, _frame: FrameType | None) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
