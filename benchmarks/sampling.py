"""Rows finished per second: dpsynth's decode engine, keras_hub's `generate`, and transformers' `generate`.

    python benchmarks/sampling.py --json OUT

All contenders decode the same architecture (the bundled model) from the same prompts, at the same batch size and length limit, with
top-p .95, in one process and in alternating rounds, after a round for compilation. Lengths are those of IMDb by construction, whatever the
weights are: a table says at which (position, newest token) a text ends, and every contender looks into it at every token. It is drawn so
that lengths, end token included, are log-normal above a least length and have the quartiles of the first 2,000 training reviews of IMDb
under the bundled tokenizer: 203, 283 and 455 tokens. The length limit cuts a fifth of them, there as here. `keras_hub` is what the
JAX-Privacy tutorial does (`TopPSampler(p=0.95)`); `keras_hub_k` sets `k=256`, which avoids the sort of the whole vocabulary but is no
longer exactly top-p. transformers gets the architecture with random weights, and one thread or all, whichever is faster on this machine.
`generate` decodes one batch after another, so its rate is timed on `--peer-batches` batches; dpsynth decodes all `--rows`, with the idle
slots at the end of them.
"""
import argparse
import importlib.util
import json
import os
import platform
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from dpsynth.models import load_model
from dpsynth.sampling import assign_prompts, sample_stream

import jax.numpy as jnp

PROMPTS = ["[imdb][negative]:", "[imdb][positive]:"]
QUARTILES, TOP_P, NEVER = (203, 283, 455), 0.95, -1e9


def share_of_lengths(tokens):
    """Share of the texts that have at most so many tokens: log-normal above a least length, with the quartiles `QUARTILES`."""
    first, median, third = QUARTILES
    ratio = (third - median) / (median - first)
    scale = (median - first) / (1 - 1 / ratio)
    above = np.log(max(tokens - median + scale, 1e-9) / scale)
    return statistics.NormalDist(0, np.log(ratio) / statistics.NormalDist().inv_cdf(0.75)).cdf(above)


def longest_prompt(model):
    """Tokens of the longest prompt."""
    return max(len(model.prompt_ids(prompt)) for prompt in PROMPTS)


def end_table(model, length):
    """Whether the next token after `token` at `position` is the end: bool [length, vocabulary]."""
    tokens = np.arange(length) + 2 - longest_prompt(model)  # of the text, if it ends there
    cdf = np.array([share_of_lengths(n) for n in (tokens[0] - 1, *tokens)])
    hazard = np.diff(cdf) / (1 - cdf[:-1])
    return np.random.default_rng(0).random((length, model.vocabulary_size)) < hazard[:, None]


def tiny_with_ends(length):
    """The bundled model, its cached call changed to end texts by the table and by nothing else."""
    model = load_model("tiny")
    table, original = jnp.asarray(end_table(model, length)), model.causal_lm.call_with_cache

    def call_with_cache(token_ids, cache, cache_update_index, **rest):
        logits, hidden, cache = original(token_ids, cache, cache_update_index, **rest)
        end = jnp.where(table[cache_update_index, token_ids[:, -1]], -NEVER, NEVER).astype(logits.dtype)
        return logits.at[..., jnp.array(model.stop_ids)].set(NEVER).at[:, -1, model.end_id].set(end), hidden, cache
    model.causal_lm.call_with_cache = call_with_cache
    return model


def dpsynth_contender(length, batch_size):
    model = tiny_with_ends(length)

    def run(rows, seed):
        stream = sample_stream(model, PROMPTS, assign_prompts(rows, (0.5, 0.5), seed), seed=seed, max_length=length, batch_size=batch_size,
                               top_p=TOP_P, progress=False)
        return [sample.tokens for sample in stream]
    return run


def keras_hub_contender(length, batch_size, k):
    import keras_hub
    model = tiny_with_ends(length)
    model.causal_lm.compile(sampler=keras_hub.samplers.TopPSampler(p=TOP_P, k=k))

    def run(rows, seed):
        texts = []
        for first in range(0, rows, batch_size):
            texts += model.causal_lm.generate(PROMPTS * (batch_size // 2), max_length=length, strip_prompt=True)
        return [len(ids) for ids in model.encode(texts)]
    return run


def transformers_contender(length, batch_size):
    import torch
    import transformers
    model = load_model("tiny")
    backbone, table = model.causal_lm.backbone, torch.tensor(end_table(model, length))
    config = transformers.Gemma3TextConfig(
        vocab_size=model.vocabulary_size, num_hidden_layers=backbone.num_layers, hidden_size=backbone.hidden_dim,
        head_dim=backbone.head_dim, intermediate_size=backbone.intermediate_dim, num_attention_heads=backbone.num_query_heads,
        num_key_value_heads=backbone.num_key_value_heads, pad_token_id=model.pad_id, bos_token_id=model.start_id, eos_token_id=model.end_id)
    peer = transformers.Gemma3ForCausalLM(config).eval()

    class Ends(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, list(model.stop_ids)] = NEVER
            scores[:, model.end_id] = torch.where(table[ids.shape[1] - 1, ids[:, -1]], -NEVER, NEVER)
            return scores
    longest = longest_prompt(model)
    prompt = torch.tensor([ids + [10] * (longest - len(ids)) for ids in map(model.prompt_ids, PROMPTS)])

    def generate(limit):
        return peer.generate(prompt.repeat(batch_size // 2, 1), do_sample=True, top_p=TOP_P, top_k=0, max_length=limit,
                             logits_processor=transformers.LogitsProcessorList([Ends()]))

    def seconds(threads):
        torch.set_num_threads(threads)
        generate(longest + 4)
        began = time.perf_counter()
        generate(longest + 16)
        return time.perf_counter() - began
    torch.set_num_threads(min((1, os.cpu_count()), key=seconds))

    def run(rows, seed):
        torch.manual_seed(seed)
        lengths = []
        for first in range(0, rows, batch_size):
            out = generate(length)
            lengths += (out[:, longest:] != model.pad_id).sum(1).tolist()
            model.tokenizer.detokenize(out.numpy())
        return lengths
    return run


def contenders(length, batch_size, names):
    """name -> run(rows, seed) -> tokens of each row."""
    makers = {"dpsynth": lambda: dpsynth_contender(length, batch_size),
              "keras_hub": lambda: keras_hub_contender(length, batch_size, None),
              "keras_hub_k": lambda: keras_hub_contender(length, batch_size, 256),
              "transformers": lambda: transformers_contender(length, batch_size)}
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None and makers.pop("transformers", None):
            print(f"transformers: skipped, {module} is not installed")
    return {name: makers[name]() for name in names if name in makers}


def measure(runs, rows, rounds):
    """name -> rows per second of each round, and tokens of each row; `rows` says how many a contender decodes; rounds alternate."""
    speeds, tokens = {name: [] for name in runs}, {name: [] for name in runs}
    for name, run in runs.items():
        run(rows[name], 0)
    for seed in range(1, rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            lengths = run(rows[name], seed)
            speeds[name].append(len(lengths) / (time.perf_counter() - began))
            tokens[name] += lengths
            print(f"round {seed} {name:12s} {speeds[name][-1]:7.2f} rows/s, {np.mean(lengths):5.0f} tokens/row", flush=True)
    return speeds, tokens


def report(speeds, tokens, arguments):
    """The JSON of the benchmark, printed as a table."""
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {f"ours_over_{name}": median["dpsynth"] / median[name] for name in median if name != "dpsynth"}
    for name in median:
        print(f"{name:12s} {median[name]:7.2f} rows/s   ratio {ratios.get(f'ours_over_{name}', 1):6.2f}")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
               "load": os.getloadavg()[0]}
    found = {name: {"rows_per_second": median[name], "runs": speeds[name], "mean_tokens": float(np.mean(tokens[name]))} for name in median}
    return {"name": "sampling", "machine": machine, "arguments": vars(arguments), "contenders": found, "ratios": ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peer-batches", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default="dpsynth,keras_hub,keras_hub_k,transformers")
    arguments = parser.parse_args()
    runs = contenders(arguments.length, arguments.batch, arguments.contenders.split(","))
    rows = {name: arguments.rows if name == "dpsynth" else arguments.batch * arguments.peer_batches for name in runs}
    speeds, tokens = measure(runs, rows, arguments.rounds)
    result = report(speeds, tokens, arguments)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
