"""A local server that answers as an LLM judge does, at a given latency: python benchmarks/judge_server.py --latency 0.1

It prints its URL as the first line.
"""

import argparse
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from served import answer
from stub_server import StubServer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.1)
    with StubServer(answer, latency=parser.parse_args().latency) as server:
        print(server.base_url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
