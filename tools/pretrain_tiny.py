"""Pre-train the bundled `tiny` model: a small Gemma3, from public text only.

Three stages, each resumable and each skipped when its result is on disk:

    prepare   read the corpora, train the SentencePiece model, write token files
    train     pre-train from the token files, with a checkpoint every few minutes
    export    write the keras_hub preset and its figures

    python tools/pretrain_tiny.py all --data DATA --work .cache/pretrain --out dpsynth/assets/tiny

`DATA` holds `novels100/novels.parquet` and `eltec_eng/novels.parquet` (public-domain novels) and
`wiki_en_slice/articles.parquet` (encyclopedia articles, CC BY-SA). The generated reviews of things other than
films come from `dpsynth.demo` and need no file.
"""

import argparse
import json
import os
import pathlib
import random
import re
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np

ARCHITECTURE = dict(
    vocabulary_size=6144,
    image_size=16,
    num_layers=5,
    num_query_heads=4,
    num_key_value_heads=1,
    hidden_dim=256,
    intermediate_dim=768,
    head_dim=64,
    query_head_dim_normalize=True,
    use_query_key_norm=True,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    use_sliding_window_attention=True,
    sliding_window_size=1024,
    vision_encoder=None,
)
CONTROL = [
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<img>",
    "<br />",
    "\n",
    "\n\n",
]
PAD, EOS, BOS = 0, 1, 2
HELD_OUT_NOVELS, HELD_OUT_ARTICLES = 3, 300


# ---- prepare ---------------------------------------------------------------------------------


def clean(text):
    """One line per paragraph, straight quotes, single spaces."""
    text = re.sub(r"[\u2018\u2019]", "'", re.sub(r"[\u201c\u201d]", '"', text)).replace("\u2014", "--")
    paragraphs = (re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n|\n(?=[\"A-Z])", text))
    return [p for p in paragraphs if p]


def blocks(paragraphs, rng, low=800, high=3000):
    """Join paragraphs into documents of a random length, so that many documents begin and end."""
    out, size, target = [], 0, rng.randint(low, high)
    for paragraph in paragraphs:
        out.append(paragraph)
        size += len(paragraph)
        if size >= target:
            yield "\n".join(out)
            out, size, target = [], 0, rng.randint(low, high)
    if out:
        yield "\n".join(out)


def read_table(path, columns):
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=columns).to_pylist()


def read_documents(data, seed=0):
    """`{name: [document, …]}` for training and held-out text."""
    rng = random.Random(seed)
    novels = [r["text"] for r in read_table(data / "novels100/novels.parquet", ["text"])]
    novels += [
        r["text"]
        for r in read_table(data / "eltec_eng/novels.parquet", ["text", "in_novels100"])
        if not r["in_novels100"]
    ]
    articles = [
        r["title"] + "\n" + r["text"]
        for r in read_table(data / "wiki_en_slice/articles.parquet", ["title", "text"])
    ]
    rng.shuffle(novels)
    rng.shuffle(articles)
    cut = lambda texts: [b for t in texts for b in blocks(clean(t), rng)]
    return {
        "held_novels": cut(novels[:HELD_OUT_NOVELS]),
        "held_wiki": cut(articles[:HELD_OUT_ARTICLES]),
        "novels": cut(novels[HELD_OUT_NOVELS:]),
        "wiki": cut(articles[HELD_OUT_ARTICLES:]),
    }


def train_tokenizer(documents, prefix, seed=0):
    import sentencepiece as spm

    rng = random.Random(seed)
    sample = rng.sample(documents["wiki"], 12000) + rng.sample(documents["novels"], 12000)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(line for d in sample for line in d.split("\n")),
        model_prefix=str(prefix),
        vocab_size=ARCHITECTURE["vocabulary_size"],
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=CONTROL,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        max_sentence_length=8192,
        num_threads=2,
        minloglevel=1,
    )


def encode(tokenizer, documents, path):
    ids = tokenizer.encode(documents, num_threads=2)
    flat = np.concatenate([np.array([BOS, *i, EOS], np.uint16) for i in ids])
    np.save(path, flat)
    return len(flat), sum(len(d.encode()) for d in documents)


def prepare(data, work):
    import sentencepiece as spm

    work.mkdir(parents=True, exist_ok=True)
    if (work / "prepared.json").exists():
        return
    documents = read_documents(data)
    if not (work / "tokenizer.model").exists():
        train_tokenizer(documents, work / "tokenizer")
    tokenizer = spm.SentencePieceProcessor(model_file=str(work / "tokenizer.model"))
    figures = {}
    for name, docs in documents.items():
        tokens, size = encode(tokenizer, docs, work / f"{name}.npy")
        figures[name] = {"documents": len(docs), "tokens": tokens, "bytes": size}
        print(name, figures[name], flush=True)
    (work / "prepared.json").write_text(json.dumps(figures, indent=1))


def prepare_reviews(work, count):
    """Generated reviews of everything but films; made when the generator is there, mixed in from then on."""
    import sentencepiece as spm

    if (work / "reviews.npy").exists() or not count:
        return
    from dpsynth.demo import DOMAINS, reviews

    domains = [d for d in DOMAINS if d != "film"]
    rows = [r for k, d in enumerate(domains) for r in reviews(count // len(domains), seed=1000 + k, domain=d)]
    random.Random(0).shuffle(rows)
    texts = [r["text"] for r in rows]
    tokenizer = spm.SentencePieceProcessor(model_file=str(work / "tokenizer.model"))
    tokens, size = encode(tokenizer, texts, work / "reviews.npy.tmp.npy")
    os.replace(work / "reviews.npy.tmp.npy", work / "reviews.npy")
    (work / "reviews.json").write_text(json.dumps({"documents": len(texts), "tokens": tokens, "bytes": size}))


# ---- train -----------------------------------------------------------------------------------
# Training runs in PyTorch: compiled, it is more than twice as fast on CPUs as the same model under XLA. The
# forward pass
# below is keras_hub's Gemma3Backbone, written out; `export` checks that both give the same logits.


def build(dtype="float32"):
    import keras_hub

    return keras_hub.models.Gemma3Backbone(**ARCHITECTURE, dtype=dtype)


def parameter_names():
    """In the order of the Keras model's trainable variables."""
    block = [
        "pre_attention_norm",
        "post_attention_norm",
        "query",
        "key",
        "value",
        "query_norm",
        "key_norm",
        "output",
        "pre_ffw_norm",
        "post_ffw_norm",
        "gate",
        "up",
        "down",
    ]
    return [
        "embedding",
        *(f"{i}.{n}" for i in range(ARCHITECTURE["num_layers"]) for n in block),
        "final_norm",
    ]


def init_params(seed=0):
    """Matrices as [in, out]; norms hold `scale`, applied as 1 + scale."""
    import torch

    a = ARCHITECTURE
    torch.manual_seed(seed)
    width, head = a["hidden_dim"], a["head_dim"]
    q, kv, ff = a["num_query_heads"] * head, a["num_key_value_heads"] * head, a["intermediate_dim"]
    shapes = {
        "query": (width, q),
        "key": (width, kv),
        "value": (width, kv),
        "output": (q, width),
        "gate": (width, ff),
        "up": (width, ff),
        "down": (ff, width),
        "query_norm": (head,),
        "key_norm": (head,),
    }
    params = {}
    for name in parameter_names():
        kind = name.split(".")[-1]
        shape = (a["vocabulary_size"], width) if kind == "embedding" else shapes.get(kind, (width,))
        value = (
            torch.zeros(shape)
            if len(shape) == 1
            else torch.randn(shape) * (0.02 if kind == "embedding" else shape[0] ** -0.5)
        )
        params[name] = value.requires_grad_()
    return params


def rotate(x, cos, sin):
    import torch

    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def hidden_states(params, tokens):
    """tokens [batch, length] -> final normalised states [batch, length, width]."""
    import torch
    import torch.nn.functional as F

    a = ARCHITECTURE
    rms = lambda x, scale: F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale)
    batch, length = tokens.shape
    head, heads, kv = a["head_dim"], a["num_query_heads"], a["num_key_value_heads"]
    angle = torch.arange(length)[:, None] / 10_000.0 ** (torch.arange(0, head, 2) / head)
    cos, sin = angle.cos(), angle.sin()
    x = params["embedding"][tokens] * a["hidden_dim"] ** 0.5
    for i in range(a["num_layers"]):
        p = {
            n: params[f"{i}.{n}"]
            for n in (
                "pre_attention_norm",
                "post_attention_norm",
                "query",
                "key",
                "value",
                "query_norm",
                "key_norm",
                "output",
                "pre_ffw_norm",
                "post_ffw_norm",
                "gate",
                "up",
                "down",
            )
        }
        h = rms(x, p["pre_attention_norm"])
        split = lambda y, n: y.view(batch, length, n, head).transpose(1, 2)
        q = rotate(rms(split(h @ p["query"], heads), p["query_norm"]), cos, sin)
        k = rotate(rms(split(h @ p["key"], kv), p["key_norm"]), cos, sin).expand(batch, heads, length, head)
        v = split(h @ p["value"], kv).expand(batch, heads, length, head)
        attended = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, length, heads * head)
        )
        x = x + rms(attended @ p["output"], p["post_attention_norm"])
        h = rms(x, p["pre_ffw_norm"])
        x = x + rms(
            (F.gelu(h @ p["gate"], approximate="tanh") * (h @ p["up"])) @ p["down"], p["post_ffw_norm"]
        )
    return rms(x, params["final_norm"])


def loss_of(params, tokens):
    """Mean next-token cross-entropy over tokens [batch, length + 1], in nats."""
    import torch.nn.functional as F

    logits = hidden_states(params, tokens[:, :-1]) @ params["embedding"].T
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_optimizers(params, peak):
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    import torch

    matrices = [p for n, p in params.items() if p.ndim == 2 and n != "embedding"]
    rest = [p for n, p in params.items() if p.ndim < 2 or n == "embedding"]
    return [
        torch.optim.Muon(matrices, lr=peak, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step, done, warmup=200, final=0.03):
    """Warm-up, constant, then linear decay over the last 40 % of the tokens; `done` is the share of them
    that is seen.
    """
    return min((step + 1) / warmup, 1.0, final + (1 - final) * (1 - done) / 0.4)


class Windows:
    """Random windows of the token files; the draw depends only on the step and on which files there are."""

    def __init__(self, work, length):
        self.parts = {n: np.load(work / f"{n}.npy", mmap_mode="r") for n in ("novels", "wiki")}
        self.work, self.length = work, length

    def shares(self):
        if "reviews" not in self.parts and (self.work / "reviews.npy").exists():
            self.parts["reviews"] = np.load(self.work / "reviews.npy", mmap_mode="r")
        mixed = {"novels": 0.40, "wiki": 0.45, "reviews": 0.15}
        weights = mixed if "reviews" in self.parts else {"novels": 0.55, "wiki": 0.45}
        return list(weights), list(weights.values())

    def batch(self, step, rows):
        rng = np.random.default_rng([7, step])
        names, weights = self.shares()
        out = np.empty((rows, self.length + 1), np.int64)
        for r, name in enumerate(rng.choice(names, rows, p=weights)):
            part = self.parts[name]
            start = rng.integers(0, len(part) - self.length - 1)
            out[r] = part[start : start + self.length + 1]
        return out


def evaluate(measure, params, work, name, prepared, rows=32, length=256, batches=6):
    """(nats per token, bits per byte) on the first windows of a held-out token file."""
    import torch

    flat, values = np.load(work / f"{name}.npy"), []
    for b in range(min(batches, (len(flat) - 1) // (rows * length))):
        at = b * rows * length
        window = np.stack([flat[at + r * length : at + (r + 1) * length + 1] for r in range(rows)]).astype(
            np.int64
        )
        with torch.no_grad():
            values.append(float(measure(params, torch.from_numpy(window))))
    nats, figures = float(np.mean(values)), prepared[name]
    return round(nats, 4), round(float(nats / np.log(2) * figures["tokens"] / figures["bytes"]), 4)


def save_state(path, params, optimizers, step, seen, log):
    import torch

    torch.save(
        {
            "params": params,
            "optimizers": [o.state_dict() for o in optimizers],
            "step": step,
            "seen": seen,
            "log": log,
        },
        f"{path}.tmp",
    )
    os.replace(f"{path}.tmp", path)


def load_state(path, params, optimizers):
    import torch

    saved = torch.load(path, weights_only=True)
    for name, value in saved["params"].items():
        params[name].data.copy_(value)
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    return saved["step"], saved["seen"], saved["log"]


def train(work, tokens, length, rows, peak, stop_after):
    import torch

    prepared = json.loads((work / "prepared.json").read_text())
    params = init_params()
    optimizers, step, seen, log = make_optimizers(params, peak), 0, 0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        step, seen, log = load_state(checkpoint, params, optimizers)
        print(f"resumed at step {step}, {seen} of {tokens} tokens", flush=True)
    compiled = torch.compile(loss_of)
    windows, began, saved, recent, first = Windows(work, length), time.time(), time.time(), [], seen
    while seen < tokens and (not stop_after or time.time() - began < stop_after):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = peak * schedule(step, seen / tokens)
        value = compiled(params, torch.from_numpy(windows.batch(step, rows)))
        value.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(value.detach())
        step, seen = step + 1, seen + rows * length
        if step % 100 == 0:
            line = {
                "step": step,
                "tokens": seen,
                "loss": round(float(torch.stack(recent).mean()), 4),
                "tokens_per_second": round((seen - first) / (time.time() - began)),
            }
            recent = []
            if step % 1000 == 0:
                for name in ("held_novels", "held_wiki"):
                    line[name] = evaluate(loss_of, params, work, name, prepared)
            log.append(line)
            print(json.dumps(line), flush=True)
        if time.time() - saved > 240:
            save_state(checkpoint, params, optimizers, step, seen, log)
            saved = time.time()
    save_state(checkpoint, params, optimizers, step, seen, log)


def phases(log, step, seen):
    """[{updates, tokens_per_update}]: where a log says that the batch was changed; exact, as a line of it
    holds at most one change.
    """
    found, last = [], {"step": 0, "tokens": 0}
    marks = [*log, {"step": step, "tokens": seen}]
    sizes = [
        (b["tokens"] - a["tokens"]) / max(1, b["step"] - a["step"]) for a, b in zip([last, *marks], marks)
    ]
    for i, (size, mark) in enumerate(zip(sizes, marks)):
        count, following = mark["step"] - last["step"], sizes[i + 1] if i + 1 < len(sizes) else size
        if found and size != found[-1]["tokens_per_update"] and following != size:  # a line with both sizes
            earlier = round(count * (following - size) / (following - found[-1]["tokens_per_update"]))
            found[-1]["updates"] += earlier
            found.append({"updates": count - earlier, "tokens_per_update": int(following)})
        elif found and size == found[-1]["tokens_per_update"]:
            found[-1]["updates"] += count
        elif count:
            found.append({"updates": count, "tokens_per_update": int(size)})
        last = mark
    return found


# ---- export ----------------------------------------------------------------------------------


def to_keras(params, variables):
    """Assign the arrays to a backbone's trainable variables, which hold one matrix per head."""
    for (name, value), variable in zip(params.items(), variables):
        array = value.detach().numpy()
        if name.endswith((".query", ".key", ".value")):
            array = array.reshape(array.shape[0], -1, ARCHITECTURE["head_dim"]).transpose(1, 0, 2)
        variable.assign(array.reshape(variable.shape))


def export(work, out):
    import torch
    from keras_hub.models import Gemma3CausalLM, Gemma3CausalLMPreprocessor, Gemma3Tokenizer

    params = init_params()
    step, seen, log = load_state(work / "checkpoint.pt", params, [])
    with torch.no_grad():
        for value in params.values():
            value.copy_(value.bfloat16())
    full, half = build(), build("bfloat16")
    to_keras(params, full.trainable_variables)
    to_keras(params, half.trainable_variables)
    probe = np.load(work / "held_wiki.npy")[:64].astype(np.int64)[None]
    ours = hidden_states(params, torch.from_numpy(probe)).detach().numpy()
    theirs = np.asarray(
        full({"token_ids": probe.astype("int32"), "padding_mask": np.ones_like(probe, "int32")})
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    preprocessor = Gemma3CausalLMPreprocessor(
        tokenizer=Gemma3Tokenizer(proto=str(work / "tokenizer.model")), sequence_length=512
    )
    Gemma3CausalLM(backbone=half, preprocessor=preprocessor).save_to_preset(str(out))
    prepared = json.loads((work / "prepared.json").read_text())
    figures = {
        "parameters": sum(p.numel() for p in params.values()),
        "updates": step,
        "tokens_seen": seen,
        "phases": phases(log, step, seen),
        "corpora": dict(prepared),
        "held_out": {
            n: dict(zip(("nats_per_token", "bits_per_byte"), evaluate(loss_of, params, work, n, prepared)))
            for n in ("held_novels", "held_wiki")
        },
    }
    if (work / "reviews.json").exists():
        figures["corpora"]["reviews"] = json.loads((work / "reviews.json").read_text())
    (pathlib.Path(out) / "pretraining.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_card(figures, out)
    print(json.dumps(figures["held_out"]))


CARD = """# The bundled `tiny` model

A Gemma3 of {parameters:,} parameters (5 layers, width 256, 6,144 SentencePiece pieces with byte fallback), stored in bfloat16 and trained from
scratch for dpsynth. It exists so that every part of dpsynth runs offline; it writes English of a kind and knows little.

**Data**, all public, none of it film reviews:

| corpus | documents | tokens |
|---|---|---|
{corpora}

`novels`: 100 English novels and the English collection of ELTeC, public domain. `wiki`: articles of the English Wikipedia (en.wikipedia.org)
created in 2018, by their authors, CC BY-SA 3.0 (creativecommons.org/licenses/by-sa/3.0) and GFDL. `reviews`: generated by `dpsynth.demo` (books, restaurants, hotels, albums, gadgets, plays, series). The `held_` parts
were not trained on.

**Training**: {tokens_seen:,} tokens in {updates:,} updates on two CPU cores (Muon for the matrices, AdamW for the embedding; warm-up,
constant, linear decay): {phases}. The reviews were generated while the training had begun and joined it early on; `python tools/pretrain_tiny.py all
--data DATA` trains on as many tokens with {tokens_per_update:,} in each update and the reviews from the start.

**Held-out loss** of the stored weights:

| text | nats per token | bits per byte |
|---|---|---|
{held_out}

**Differential privacy**: none in pre-training (public text). **Licence**: Apache-2.0; the encyclopedia text it was trained on is CC BY-SA 3.0.
"""


def write_card(figures, out):
    """README.md of the preset, from the figures of the export."""
    corpora = "\n".join(
        f"| {n} | {c['documents']:,} | {c['tokens']:,} |" for n, c in figures["corpora"].items()
    )
    held = "\n".join(
        f"| {n} | {f['nats_per_token']:.3f} | {f['bits_per_byte']:.3f} |"
        for n, f in figures["held_out"].items()
    )
    (pathlib.Path(out) / "README.md").write_text(
        CARD.format(
            **{
                **figures,
                "corpora": corpora,
                "held_out": held,
                "tokens_per_update": figures["phases"][-1]["tokens_per_update"],
                "phases": ", then ".join(
                    f"{p['updates']:,} updates of {p['tokens_per_update']:,} tokens"
                    for p in figures["phases"]
                ),
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["prepare", "reviews", "train", "export", "all"])
    parser.add_argument("--data", type=pathlib.Path, help="folder of the corpora")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path(".cache/pretrain"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("dpsynth/assets/tiny"))
    parser.add_argument("--tokens", type=int, default=60_000_000, help="tokens to train on")
    parser.add_argument("--reviews", type=int, default=70_000, help="generated reviews to make")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--peak", type=float, default=0.004, help="peak learning rate")
    parser.add_argument(
        "--stop-after", type=float, default=0, help="seconds after which to checkpoint and stop"
    )
    args = parser.parse_args()
    if args.stage in ("prepare", "all"):
        prepare(args.data, args.work)
    if args.stage in ("reviews", "all"):
        prepare_reviews(args.work, args.reviews)
    if args.stage in ("train", "all"):
        train(args.work, args.tokens, args.length, args.rows, args.peak, args.stop_after)
    if args.stage in ("export", "all"):
        export(args.work, args.out)


if __name__ == "__main__":
    sys.exit(main())
