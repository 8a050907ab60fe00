"""Hyper-parameters of DP fine-tuning, compared on public text: LoRA rank and layers, learning rate, prompt.

    python benchmarks/choose.py --novels FILE --articles FILE --json OUT [--try NAME…]

No private row is needed to choose settings, and none should be: what follows from rows is not covered by ε.
Here 25,000 rows of public text, half of them passages of novels and half of encyclopedia articles, with that
as their label, take the place of IMDb: as many rows, cut to the same number of tokens. Each candidate of
`CANDIDATES` is trained for a few updates under the noise per update and per unit of the expected batch that
the long run will have (`--epsilon`, `--batch`, `--updates`), on the same drawn batches, and judged by the
loss on 128 other rows: in nats per token, under the prompt of their label and under that of the other one.
The difference between both tells whether the label is learnt. `--novels` and `--articles` are Parquet files
with a column `text`. OUT gets a result for each candidate as it ends; what is in it is not done again.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import numpy as np
import pandas as pd

from dpsynth.data import Records, TokenStore
from dpsynth.finetune import Trainer, prepare_model, row_losses, tokenize
from dpsynth.formats import make_format
from dpsynth.privacy import Randomness, make_mechanism
from dpsynth.settings import Settings

ROWS, TEST_ROWS, LABELS, WORDS = 25_000, 128, ("novel", "encyclopedia"), 400
CANDIDATES = {
    "qv8 .002": dict(learning_rate=0.002),
    "qv8 .004": {},
    "qv8 .008": dict(learning_rate=0.008),
    "qv8 .016": dict(learning_rate=0.016),
    "qv2 .004": dict(lora_rank=2),
    "qv2 .008": dict(lora_rank=2, learning_rate=0.008),
    "qv2 .016": dict(lora_rank=2, learning_rate=0.016),
    "all1 .004": dict(lora_rank=1, lora_targets="all"),
    "all1 .008": dict(lora_rank=1, lora_targets="all", learning_rate=0.008),
    "all1 .016": dict(lora_rank=1, lora_targets="all", learning_rate=0.016),
    "all2 .008": dict(lora_rank=2, lora_targets="all", learning_rate=0.008),
    "all8 .008": dict(lora_rank=8, lora_targets="all", learning_rate=0.008),
    "all4 .002": dict(lora_rank=4, lora_targets="all", learning_rate=0.002),
    "all4 .004": dict(lora_rank=4, lora_targets="all"),
    "all8 .002": dict(lora_rank=8, lora_targets="all", learning_rate=0.002),
}


def passages(texts, count, rng):
    """`count` passages of `WORDS` characters that begin after a full stop, from texts chosen at random."""
    found = []
    while len(found) < count:
        text = texts[rng.integers(len(texts))]
        start = text.find(". ", rng.integers(max(1, len(text) - 3 * WORDS))) + 2
        part = " ".join(text[start : start + WORDS].split())
        if start > 1 and len(part) > WORDS / 2:
            found.append(part)
    return found


def public_records(args, count, seed):
    """`Records` of `count` passages, labelled by where they come from."""
    rng = np.random.default_rng(seed)
    texts = [
        pd.read_parquet(path, columns=["text"])["text"].tolist() for path in (args.novels, args.articles)
    ]
    labels = np.arange(count) % 2
    kinds = [passages(texts[kind], int((labels == kind).sum()), rng) for kind in (0, 1)]
    frame = pd.DataFrame({"text": [kinds[label].pop() for label in labels], "label": labels})
    return Records(frame, "public", LABELS, {})


def judge(model, records, fmt, settings):
    """(loss under the right prompt, how much higher it is under the other one)."""
    turned = Records(records.frame.assign(label=1 - records.frame["label"]), records.name, LABELS, {})
    right, wrong = (row_losses(model, rows, fmt, settings).mean() for rows in (records, turned))
    return float(right), float(wrong - right)


def attempt(args, name, train, test, folder):
    """Train a candidate; what came out, a dict."""
    base = dict(
        model=args.model,
        vocabulary="english",
        data="public",
        label_names=",".join(LABELS),
        prompt="[text][{label}]:",
        sequence_length=args.tokens,
        tuning="lora",
        lora_rank=8,
        lora_targets="query,value",
        lr_schedule="linear",
        learning_rate=0.004,
        delta=1.5e-5,
        epsilon=args.epsilon,
        batch_size=args.batch,
        epochs=args.updates * args.batch / ROWS,
    )
    settings = Settings(**{**base, **CANDIDATES[name]})
    long = make_mechanism(settings, ROWS)
    short = dataclasses.replace(
        long,
        expected_batch_size=args.try_batch,
        steps=args.try_updates,
        target_epsilon=float("inf"),
        noise_multiplier=long.noise_multiplier * args.try_batch / args.batch,
    )
    model, fmt = prepare_model(settings), make_format(settings)
    if not (folder / "tokens").exists():
        tokenize(model, train, fmt, folder / "tokens", settings.sequence_length)
    trainer = Trainer(model, TokenStore(folder / "tokens"), settings, short, Randomness(b"0" * 32, "choose"))
    started = time.process_time()
    for step in range(short.steps):
        trainer.update()
        print(
            f"{name}: update {step + 1} of {short.steps}, {time.process_time() - started:.0f} core-seconds",
            flush=True,
        )
    model.assign(trainer.trainable)
    after = judge(model, test, fmt, settings)
    return {
        "candidate": name,
        "rank": settings.lora_rank,
        "layers": settings.lora_targets,
        "learning_rate": settings.learning_rate,
        "trained_parameters": int(sum(a.size for a in trainer.trainable)),
        "noise_multiplier": short.noise_multiplier,
        "long_noise_multiplier": long.noise_multiplier,
        "loss": after[0],
        "label_gain": after[1],
        "core_seconds": time.process_time() - started,
        **{
            key: getattr(args, key)
            for key in ("tokens", "epsilon", "batch", "updates", "try_batch", "try_updates")
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--novels", required=True)
    parser.add_argument("--articles", required=True)
    parser.add_argument("--json", required=True)
    parser.add_argument("--model", default="gemma3_270m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--epsilon", type=float, default=10)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--try-batch", type=int, default=256)
    parser.add_argument("--try-updates", type=int, default=8)
    parser.add_argument("--try", nargs="*", default=list(CANDIDATES), dest="names")
    args = parser.parse_args()
    out = pathlib.Path(args.json)
    known = json.loads(out.read_text())["results"] if out.exists() else []
    done = {(one["candidate"], one["epsilon"]) for one in known}
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    train, test = public_records(args, ROWS, 1), public_records(args, TEST_ROWS, 2)
    for name in args.names:
        if (name, args.epsilon) not in done:
            found = attempt(args, name, train, test, folder)
            known.append(found)
            out.write_text(json.dumps({"name": "choose", "results": known}, indent=1) + "\n")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
