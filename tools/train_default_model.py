"""Makes the built-in model: `corpus` collects the text, `train` trains (one H200, ten minutes; resumable),
`export` writes what the package carries. See jax_mla_cp/default_model/README.md.

    python tools/train_default_model.py corpus --work DIR     on a Debian machine; no GPU
    python tools/train_default_model.py train --work DIR      on a GPU; again, to go on after an interruption
    python tools/train_default_model.py export --work DIR     no GPU
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from default_model import corpus, vocabulary
from default_model.sequences import Batch, Sequences

SEED = 20261124
VOCABULARY = 3072
CONFIG = Path(__file__).parent / "default_model" / "config.json"
_AHEAD = 24  # batches that are made while earlier ones are trained on
_SAVE_EVERY = 120.0  # seconds
_TESTED = ((512, 64), (2048, 32), (8192, 16), (16384, 16))  # length, sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["corpus", "train", "export"])
    parser.add_argument("--work", type=Path, required=True, help="a folder for the text, checkpoints and results")
    parser.add_argument("--workers", type=int, default=max(2, (os.cpu_count() or 2) - 2), help="that make batches")
    parser.add_argument("--scale", type=float, default=1.0, help="train: of the steps; 0.001 is a smoke test")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.command == "corpus":
        make_corpus(args.work)
    elif args.command == "train":
        train(args.work, args.workers, args.scale)
    else:
        from default_model.export import export

        export(args.work)


def make_corpus(work: Path) -> None:
    """Text and tokenizer."""
    documents = corpus.collect()
    corpus.save(documents, work / "corpus.xz")
    tokenizer = vocabulary.train((d.text for d in documents if not d.held_out), VOCABULARY)
    tokenizer.save(str(work / "tokenizer.json"))
    letters = sum(len(d.text) for d in documents)
    print(f"{len(documents)} documents, {letters / 1e6:.1f} million characters, in {work / 'corpus.xz'}")


def streams(work: Path) -> tuple[Path, Path]:
    """The tokens of all documents, shuffled: those to train on, and those held out."""
    import tokenizers

    paths = work / "train.npy", work / "held_out.npy"
    if not all(path.exists() for path in paths):
        tokenizer = tokenizers.Tokenizer.from_file(str(work / "tokenizer.json"))
        documents = corpus.load(work / "corpus.xz")
        order = np.random.default_rng(SEED).permutation(len(documents))
        for path, held_out in zip(paths, (False, True), strict=True):
            chosen = [documents[i].text for i in order if documents[i].held_out == held_out]
            ids = [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(chosen)]
            np.save(path, np.concatenate(ids))
    return paths


_maker: Sequences


def _start_worker(tokenizer: str, stream: Path) -> None:
    import tokenizers

    global _maker
    _maker = Sequences(tokenizers.Tokenizer.from_file(tokenizer), np.load(stream), SEED)


def _make(step: int, size: int, length: int) -> Batch:
    return _maker.batch(step, size, length)


def batches(work: Path, plan: list[tuple[int, int, int]], workers: int) -> Iterator[Batch]:
    """The batches of the steps (number, sequences, length), made by other processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (str(work / "tokenizer.json"), streams(work)[0]),
    ) as pool:
        pending = [pool.submit(_make, *item) for item in plan[:_AHEAD]]
        for i in range(len(plan)):
            if i + _AHEAD < len(plan):
                pending.append(pool.submit(_make, *plan[i + _AHEAD]))
            yield pending.pop(0).result()


def train(work: Path, workers: int, scale: float) -> None:
    """Runs the stages, from the last checkpoint if there is one."""
    import json

    import jax
    import orbax.checkpoint as ocp
    import tokenizers

    from default_model import network
    from default_model.training import ROUNDED_FROM, STAGES, State, optimizer, score, total_steps, train_step
    from jax_mla_cp.config.model import ModelConfig

    c = ModelConfig.from_hf(json.loads(CONFIG.read_text()))
    cudnn = jax.default_backend() == "gpu"
    stages = tuple(dataclasses.replace(s, steps=max(2, round(s.steps * scale))) for s in STAGES)
    steps = total_steps(stages)
    plan = [(s.batch, s.length) for s in stages for _ in range(s.steps)]
    params = network.initial(c, jax.random.key(SEED))
    state = State(params, jax.jit(optimizer(steps).init)(params))
    print(f"{sum(w.size for w in params.values()) / 1e6:.1f} M parameters, {steps} steps", flush=True)

    checkpointer = ocp.StandardCheckpointer()
    saved = sorted((work / "state").glob("[0-9]*"), key=lambda path: int(path.name))
    done = int(saved[-1].name) if saved else 0
    if saved:
        state = checkpointer.restore(saved[-1].resolve(), state)
        print(f"goes on after step {done}", flush=True)

    def save(step: int) -> None:
        checkpointer.save((work / "state" / str(step)).resolve(), state, force=True)
        checkpointer.wait_until_finished()
        for old in (work / "state").glob("[0-9]*"):
            if int(old.name) < step:
                shutil.rmtree(old)

    tests = Sequences(tokenizers.Tokenizer.from_file(str(work / "tokenizer.json")), np.load(streams(work)[1]), SEED)

    def test(step: int, longest: int) -> None:
        for length, size in _TESTED:
            if length <= max(longest, 512):
                b = tests.retrieval(length, size, length)
                rounded = step >= ROUNDED_FROM * steps
                parts = [
                    score(state.params, b.tokens[i : i + 8], b.kind[i : i + 8], c=c, rounded=rounded, cudnn=cudnn)
                    for i in range(0, size, 8)
                ]
                right, text = (float(np.mean([np.asarray(p[j]) for p in parts])) for j in (0, 1))
                print(f"  test at {length}: {right:.3f} right, text {text:.3f}", flush=True)

    begin = last_save = time.monotonic()
    items = [(step, *plan[step]) for step in range(done, steps)]
    losses: list[jax.Array] = []
    for (step, size, length), batch in zip(items, batches(work, items, workers), strict=True):
        state, both = train_step(
            state, batch.tokens, batch.kind, c=c, steps=steps, rounded=step >= ROUNDED_FROM * steps, cudnn=cudnn
        )
        losses.append(both)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            text, answers = np.mean([np.asarray(x) for x in losses], axis=0)
            losses = []
            rate = time.monotonic() - begin
            print(f"step {step + 1} {size}x{length} text {text:.3f} answers {answers:.4f} at {rate:.0f} s", flush=True)
        ends_stage = step + 1 == steps or plan[step + 1] != plan[step]
        if ends_stage or (step + 1) % 500 == 0:
            test(step + 1, length)
        if ends_stage or time.monotonic() - last_save > _SAVE_EVERY:
            save(step + 1)
            last_save = time.monotonic()
    print(f"done: {steps} steps in {time.monotonic() - begin:.0f} s since step {done}", flush=True)


if __name__ == "__main__":
    main()
