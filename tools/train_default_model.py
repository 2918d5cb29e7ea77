"""Trains the built-in model: `corpus` collects the text, `train` trains (ten minutes on an H200; resumable),
`export` writes the files of jax_mla_cp/default_model. See its README.md.

    python tools/train_default_model.py corpus --work DIR     on a Debian machine; no GPU
    python tools/train_default_model.py train --work DIR      on a GPU; the same command resumes after an interruption
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
VOCAB_SIZE = 3072
CONFIG = Path(__file__).parent / "default_model" / "config.json"
_PREFETCH = 24  # batches that are made in advance
_SAVE_INTERVAL = 120.0  # seconds
_EVAL_SETS = ((512, 64), (2048, 32), (8192, 16), (16384, 16))  # length, sequences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["corpus", "train", "export"])
    parser.add_argument("--work", type=Path, required=True, help="directory for the text, checkpoints and results")
    parser.add_argument(
        "--workers", type=int, default=max(2, (os.cpu_count() or 2) - 2), help="processes that make batches"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="train: factor for the number of steps; 0.001 is a smoke test"
    )
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
    """Collects the text and trains the tokenizer."""
    documents = corpus.collect()
    corpus.save(documents, work / "corpus.xz")
    tokenizer = vocabulary.train((d.text for d in documents if not d.held_out), VOCAB_SIZE)
    tokenizer.save(str(work / "tokenizer.json"))
    characters = sum(len(d.text) for d in documents)
    print(f"{len(documents)} documents, {characters / 1e6:.1f} million characters, in {work / 'corpus.xz'}")


def token_files(work: Path) -> tuple[Path, Path]:
    """Tokenizes all documents, shuffled. Returns the files of training tokens and of held-out tokens."""
    import tokenizers

    paths = work / "train.npy", work / "held_out.npy"
    if not all(path.exists() for path in paths):
        tokenizer = tokenizers.Tokenizer.from_file(str(work / "tokenizer.json"))
        documents = corpus.load(work / "corpus.xz")
        order = np.random.default_rng(SEED).permutation(len(documents))
        for path, held_out in zip(paths, (False, True), strict=True):
            texts = [documents[i].text for i in order if documents[i].held_out == held_out]
            ids = [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(texts)]
            np.save(path, np.concatenate(ids))
    return paths


_sequences: Sequences  # of a worker process


def _start_worker(tokenizer: str, stream: Path) -> None:
    import tokenizers

    global _sequences
    _sequences = Sequences(tokenizers.Tokenizer.from_file(tokenizer), np.load(stream), SEED)


def _make(step: int, size: int, length: int) -> Batch:
    return _sequences.batch(step, size, length)


def batches(work: Path, plan: list[tuple[int, int, int]], workers: int) -> Iterator[Batch]:
    """Yields a batch for each step of the plan (step, sequences, length), made by worker processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (str(work / "tokenizer.json"), token_files(work)[0]),
    ) as pool:
        pending = [pool.submit(_make, *item) for item in plan[:_PREFETCH]]
        for i in range(len(plan)):
            if i + _PREFETCH < len(plan):
                pending.append(pool.submit(_make, *plan[i + _PREFETCH]))
            yield pending.pop(0).result()


def train(work: Path, workers: int, scale: float) -> None:
    """Runs all stages, resuming from the last checkpoint if there is one."""
    # Imported here: every worker process imports this module, and needs none of these.
    import json

    import jax
    import orbax.checkpoint as ocp
    import tokenizers

    from default_model import network
    from default_model.training import QAT_FROM, STAGES, State, optimizer, score, total_steps, train_step
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
        print(f"resuming after step {done}", flush=True)

    def save(step: int) -> None:
        checkpointer.save((work / "state" / str(step)).resolve(), state, force=True)
        checkpointer.wait_until_finished()
        for old in (work / "state").glob("[0-9]*"):
            if int(old.name) < step:
                shutil.rmtree(old)

    held_out = Sequences(
        tokenizers.Tokenizer.from_file(str(work / "tokenizer.json")), np.load(token_files(work)[1]), SEED
    )

    def evaluate(step: int, max_length: int) -> None:
        for length, size in _EVAL_SETS:
            if length <= max(max_length, 512):
                b = held_out.retrieval(length, size, length)
                fp8 = step >= QAT_FROM * steps
                parts = [
                    score(state.params, b.tokens[i : i + 8], b.kind[i : i + 8], c=c, fp8=fp8, cudnn=cudnn)
                    for i in range(0, size, 8)
                ]
                accuracy, text_loss = (float(np.mean([np.asarray(p[j]) for p in parts])) for j in (0, 1))
                print(f"  eval at {length}: accuracy {accuracy:.3f}, text loss {text_loss:.3f}", flush=True)

    begin = last_save = time.monotonic()
    items = [(step, *plan[step]) for step in range(done, steps)]
    losses: list[jax.Array] = []
    for (step, size, length), batch in zip(items, batches(work, items, workers), strict=True):
        state, loss = train_step(
            state, batch.tokens, batch.kind, c=c, steps=steps, fp8=step >= QAT_FROM * steps, cudnn=cudnn
        )
        losses.append(loss)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            text_loss, answer_loss = np.mean([np.asarray(x) for x in losses], axis=0)
            losses = []
            seconds = time.monotonic() - begin
            print(
                f"step {step + 1} {size}x{length} text loss {text_loss:.3f} answer loss {answer_loss:.4f} at {seconds:.0f} s",
                flush=True,
            )
        ends_stage = step + 1 == steps or plan[step + 1] != plan[step]
        if ends_stage or (step + 1) % 500 == 0:
            evaluate(step + 1, length)
        if ends_stage or time.monotonic() - last_save > _SAVE_INTERVAL:
            save(step + 1)
            last_save = time.monotonic()
    print(f"done: {steps} steps, {time.monotonic() - begin:.0f} s since step {done}", flush=True)


if __name__ == "__main__":
    main()
