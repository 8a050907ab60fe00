"""Rows finished per second: dpsynth's decode engine, keras_hub's `generate`, transformers' `generate`, and
llama.cpp.

    python benchmarks/sampling.py --json OUT
    python benchmarks/sampling.py --model gemma3_270m:english --gguf FILE --json OUT

All contenders decode the same architecture from the same prompts, at the same batch size and length limit,
with top-p .95, each in a process of its own on the same cores and in alternating rounds, after one for
compilation, in which the peers' texts end at once. Lengths are those of IMDb by construction, whatever the
weights are: a rule says at which (position, newest token) a text ends, and every contender asks it at every
token. Chances are such that lengths, end token included, are log-normal above a least length and have the
quartiles of the first 2,000 training reviews of IMDb: 203, 283 and 455 tokens under the bundled tokenizer,
162, 224 and 358 in Gemma's English pieces. The length limit cuts some of them, there as here.

`keras_hub` is what the JAX-Privacy tutorial does (`TopPSampler(p=0.95)`); `keras_hub_k` sets `k=256`, which
avoids the sort of the whole vocabulary but is no longer exactly top-p. transformers has the same weights, and
one thread or as many as cores, whichever is faster. `llama_cpp` decodes the file `--gguf`, untuned, with its
quantized weights and its whole vocabulary, the rows of a batch side by side, top-p .95 over the whole
vocabulary; `llama_cpp_k` with its `top_k` at 256 before that. `generate` decodes one batch after another
until its last text ends, and so do they; a peer's rate is timed on `--peer-batches` batches. dpsynth decodes
all `--rows`, with the idle slots at the end of them.
"""

import argparse
import pathlib
import statistics
import time

import numpy as np
from side_by_side import (
    GIB,
    Contender,
    Lost,
    installed_model,
    machine,
    prepare_folder,
    start,
    transformers_folder,
    use_cores,
    versions,
    write_record,
)

PROMPTS = ["[imdb][negative]:", "[imdb][positive]:"]
TINY_QUARTILES, GEMMA_QUARTILES, TOP_P, NEVER = (203, 283, 455), (162, 224, 358), 0.95, -1e9


def _log_normal(quartiles):
    """(least length, median above it, logarithm of the scale) of the lengths with these quartiles."""
    first, median, third = quartiles
    ratio = (third - median) / (median - first)
    above = (median - first) / (1 - 1 / ratio)
    return median - above, above, np.log(ratio) / statistics.NormalDist().inv_cdf(0.75)


def share_of_lengths(tokens, quartiles):
    """Share of the texts that have at most so many tokens: log-normal above a least length."""
    least, median, scale = _log_normal(quartiles)
    return statistics.NormalDist(0, scale).cdf(np.log(max(tokens - least, 1e-9) / median))


def draw_lengths(count, quartiles, seed):
    """int[count]: lengths of texts."""
    least, median, scale = _log_normal(quartiles)
    return np.ceil(least + median * np.exp(scale * np.random.default_rng(seed).normal(size=count))).astype(
        int
    )


def longest_prompt(model):
    """Tokens of the longest prompt."""
    return max(len(model.prompt_ids(prompt)) for prompt in PROMPTS)


def quartiles_for(model):
    """Quartiles of lengths in a model's tokens."""
    return TINY_QUARTILES if model.name == "tiny" else GEMMA_QUARTILES


def chances_to_end(prompt, length, quartiles):
    """int[length]: in how many of 2**32 cases the next token is the end, when the newest one is at this
    position.
    """
    tokens = np.arange(length) + 2 - prompt  # of the text, if it ends there
    cdf = np.array([share_of_lengths(n, quartiles) for n in (tokens[0] - 1, *tokens)])
    return np.minimum(np.diff(cdf) / np.maximum(1 - cdf[:-1], 1e-12) * 2.0**32, 2**32 - 1).astype(np.int64)


def at_once(length):
    """The same where each text ends with its first token."""
    return np.full(length, 2**32 - 1)


def case(position, token, number=int, most=0xFFFFFFFF):
    """Which of 2**32 cases a position and a token are, alike in each library; `number` makes 32 bits of
    an int where arithmetic is modulo them.
    """
    mixed = (token * number(0x9E3779B1) + position * number(0x85EBCA77)) & number(most)
    mixed = ((mixed ^ (mixed >> 15)) * number(0x2C1B3C6D)) & number(most)
    return mixed ^ (mixed >> 13)


def model_with_ends(options):
    """The model of the options, its cached call changed to end texts by the rule and by nothing else."""
    import jax.numpy as jnp
    from dpsynth.models import load_model

    model, length = load_model(options["model"]), options["length"]
    original, chances = (
        model.causal_lm.call_with_cache,
        chances_to_end(longest_prompt(model), length, options.get("quartiles") or quartiles_for(model)),
    )
    now = model.causal_lm.add_weight(
        name="chances", shape=(length,), dtype="uint32", initializer="zeros", trainable=False
    )
    model.end_texts = lambda early: now.assign((at_once(length) if early else chances).astype(np.uint32))
    model.end_texts(early=False)

    def call_with_cache(token_ids, cache, cache_update_index, **rest):
        logits, hidden, cache = original(token_ids, cache, cache_update_index, **rest)
        position, newest = (jnp.asarray(x).astype(jnp.uint32) for x in (cache_update_index, token_ids[:, -1]))
        end = jnp.where(
            case(position, newest, jnp.uint32) < now.value[cache_update_index], -NEVER, NEVER
        ).astype(logits.dtype)
        return (
            logits.at[..., jnp.array(model.stop_ids)].set(NEVER).at[:, -1, model.end_id].set(end),
            hidden,
            cache,
        )

    model.causal_lm.call_with_cache = call_with_cache
    return model


def dpsynth_contender(options):
    """Slots that are filled again."""
    from dpsynth.sampling import assign_prompts, sample_stream

    model = model_with_ends(options)

    def run(rows, seed):
        stream = sample_stream(
            model,
            PROMPTS,
            assign_prompts(rows, (0.5, 0.5), seed),
            seed=seed,
            max_length=options["length"],
            batch_size=options["batch"],
            top_p=TOP_P,
            progress=False,
        )
        return [sample.tokens for sample in stream]

    return {"sample": run}


def keras_hub_contender(options, k=None):
    """`generate`, one batch after another."""
    model = model_with_ends(options)  # before keras_hub: dpsynth chooses the backend
    import keras_hub

    model.causal_lm.compile(sampler=keras_hub.samplers.TopPSampler(p=TOP_P, k=k))

    def run(rows, seed):
        model.end_texts(early=seed == 0)
        lengths = []
        for first in range(0, rows, options["batch"]):
            texts = model.causal_lm.generate(
                PROMPTS * (options["batch"] // 2), max_length=options["length"], strip_prompt=True
            )
            lengths += [len(ids) for ids in model.encode(texts)]
        return lengths

    return {"sample": run}


def keras_hub_k_contender(options):
    """The same with `k=256`."""
    return keras_hub_contender(options, 256)


def transformers_contender(options):
    """`generate`, one batch after another."""
    import torch
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(
        transformers_folder(options["model"]), dtype=torch.float32
    ).eval()
    facts, length = options["facts"], options["length"]
    longest = facts["longest"]
    ends = {
        False: chances_to_end(longest, length, facts["quartiles"]).tolist(),
        True: at_once(length).tolist(),
    }
    now = {"chances": ends[False]}

    class Ends(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, facts["stops"]] = NEVER
            place = ids.shape[1] - 1
            scores[:, facts["end"]] = torch.where(
                case(place, ids[:, -1]) < now["chances"][place], -NEVER, NEVER
            )
            return scores

    prompt = torch.tensor([ids + [10] * (longest - len(ids)) for ids in facts["prompts"]])

    def generate(limit):
        return peer.generate(
            prompt.repeat(options["batch"] // 2, 1),
            do_sample=True,
            top_p=TOP_P,
            top_k=0,
            max_length=limit,
            eos_token_id=facts["end"],
            pad_token_id=facts["pad"],
            logits_processor=transformers.LogitsProcessorList([Ends()]),
        )

    def seconds(threads):
        torch.set_num_threads(threads)
        generate(longest + 4)
        began = time.perf_counter()
        generate(longest + 16)
        return time.perf_counter() - began

    torch.set_num_threads(min({1, options["cores"]}, key=seconds))

    def run(rows, seed):
        torch.manual_seed(seed)
        now["chances"], lengths = ends[seed == 0], []
        for first in range(0, rows, options["batch"]):
            lengths += (generate(length)[:, longest:] != facts["pad"]).sum(1).tolist()
        return lengths

    return {"sample": run}


class Llama:
    """llama.cpp with a batch of rows side by side: `step` gives each live row its next token."""

    def __init__(self, options, top_k):
        import llama_cpp

        self.api, rows, threads = llama_cpp, options["batch"], options["cores"]
        self.llm = llama_cpp.Llama(
            options["gguf"],
            n_ctx=rows * (options["length"] + 8),
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            n_seq_max=rows,
            kv_unified=True,
            logits_all=False,
            verbose=False,
        )
        self.context, self.batch = self.llm.ctx, llama_cpp.llama_batch_init(512, 0, 1)
        self.vocabulary, self.prompts = (
            self.llm.n_vocab(),
            [self.llm.tokenize(prompt.encode(), add_bos=True) for prompt in PROMPTS],
        )
        self.stops = {self.llm.token_eos(), *self.llm.tokenize(b"<end_of_turn>", add_bos=False, special=True)}
        self.top_k = top_k

    def sampler(self, seed):
        """Top-p over the vocabulary, or over its `top_k` likeliest pieces, without the stop tokens: the
        rule ends texts.
        """
        api, stops = self.api, sorted(self.stops)
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        biases = (api.llama_logit_bias * len(stops))(
            *(api.llama_logit_bias(token, float("-inf")) for token in stops)
        )
        parts = [api.llama_sampler_init_logit_bias(self.vocabulary, len(stops), biases)]
        parts += [api.llama_sampler_init_top_k(self.top_k)] if self.top_k else []
        for part in (*parts, api.llama_sampler_init_top_p(TOP_P, 1), api.llama_sampler_init_dist(seed)):
            api.llama_sampler_chain_add(chain, part)
        return chain

    def decode(self, tokens, position, row, wanted):
        """Put tokens (lists alike) behind the rows, and compute; `wanted` says which of them need scores."""
        for i, (token, place, which, scores) in enumerate(zip(tokens, position, row, wanted, strict=True)):
            batch = self.batch
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token,
                place,
                1,
                which,
                scores,
            )
        self.batch.n_tokens = len(tokens)
        if self.api.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")

    def generate(self, chances, length, seed):
        """Lengths of the texts of one batch, all decoded until the last of them ends."""
        rows, sampler = self.llm.context_params.n_seq_max, self.sampler(seed)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        newest, place, lengths = {}, {}, [0] * rows
        for row in range(rows):
            ids = self.prompts[row % len(PROMPTS)]
            self.decode(ids, range(len(ids)), [row] * len(ids), [i + 1 == len(ids) for i in range(len(ids))])
            newest[row], place[row] = (
                self.api.llama_sampler_sample(sampler, self.context, len(ids) - 1),
                len(ids),
            )
        while newest:
            for row in [
                row
                for row in newest
                if case(place[row], newest[row]) < chances[place[row]] or place[row] + 1 >= length
            ]:
                lengths[row] = place.pop(row) + 1 - len(self.prompts[row % len(PROMPTS)])
                newest.pop(row)
            live = sorted(newest)
            if live:
                self.decode(
                    [newest[row] for row in live], [place[row] for row in live], live, [True] * len(live)
                )
            for i, row in enumerate(live):
                newest[row], place[row] = (
                    self.api.llama_sampler_sample(sampler, self.context, i),
                    place[row] + 1,
                )
        self.api.llama_sampler_free(sampler)
        return lengths


def llama_cpp_contender(options, top_k=0):
    """Rows of a batch side by side, one batch after another."""
    if not options["gguf"]:
        raise ValueError("needs --gguf FILE")
    llama = Llama(options, top_k)
    length = options["length"]
    ends = {
        False: chances_to_end(max(map(len, llama.prompts)), length, GEMMA_QUARTILES).tolist(),
        True: at_once(length).tolist(),
    }

    def run(rows, seed):
        lengths = []
        for first in range(0, rows, options["batch"]):
            lengths += llama.generate(ends[seed == 0], length, seed)
        return lengths

    return {"sample": run}


def llama_cpp_k_contender(options):
    """The same with a `top_k` of 256."""
    return llama_cpp_contender(options, 256)


MAKERS = {
    "dpsynth": (dpsynth_contender, ["dpsynth"]),
    "keras_hub": (keras_hub_contender, ["keras_hub"]),
    "keras_hub_k": (keras_hub_k_contender, ["keras_hub"]),
    "transformers": (transformers_contender, ["torch", "transformers"]),
    "llama_cpp": (llama_cpp_contender, ["llama_cpp"]),
    "llama_cpp_k": (llama_cpp_k_contender, ["llama_cpp"]),
}


def look(options):
    """A contender without runs but for `facts`: what the tokenizer says that a process without dpsynth
    needs.
    """
    from dpsynth.models import load_model

    model = load_model(options["model"])
    found = {
        "longest": longest_prompt(model),
        "prompts": [list(model.prompt_ids(p)) for p in PROMPTS],
        "stops": list(model.stop_ids),
        "end": model.end_id,
        "pad": model.pad_id,
        "quartiles": quartiles_for(model),
    }
    return {"facts": lambda: found}


def add_facts(options, names, limit):
    """`options` with what `look` finds, and the Hugging Face folder made, where one of the contenders
    needs it.
    """
    if "transformers" in names:
        prepare_folder(names, options, limit)
        contender = Contender("tokenizer", look, options, limit)
        options["facts"] = contender.run("facts")["result"]
        contender.close()
    return options


def measure(started, rows, rounds):
    """name -> rows per second of each round, and tokens of each row; `rows` says how many a contender
    decodes; rounds alternate.
    """
    speeds, tokens = {name: [] for name in started}, {name: [] for name in started}
    for seed in range(rounds + 1):
        for name, contender in list(started.items()):
            try:
                answer = contender.run("sample", rows[name], seed)
            except Lost as lost:
                print(f"{lost}: left out", flush=True)
                for table in (started, speeds, tokens):
                    table.pop(name)
                continue
            speed, lengths = len(answer["result"]) / answer["seconds"], answer["result"]
            print(
                f"round {seed} {name:12s} {speed:7.2f} rows/s, {np.mean(lengths):5.0f} tokens/row", flush=True
            )
            if seed:
                speeds[name].append(speed)
                tokens[name] += lengths
    return speeds, tokens


def report(speeds, tokens, peaks, cores, arguments):
    """The JSON of the benchmark, printed as a table."""
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = (
        {f"ours_over_{name}": median["dpsynth"] / median[name] for name in median if name != "dpsynth"}
        if "dpsynth" in median
        else {}
    )
    found = {
        name: {
            "rows_per_second": median[name],
            "runs": speeds[name],
            "mean_tokens": float(np.mean(tokens[name])),
            "tokens_per_core_second": median[name] * float(np.mean(tokens[name])) / cores,
            "peak_gib": peaks[name],
        }
        for name in median
    }
    for name, figures in found.items():
        print(
            f"{name:12s} {median[name]:7.2f} rows/s   {figures['tokens_per_core_second']:7.1f} tokens a"
            f" core-second   "
            f"ratio {ratios.get(f'ours_over_{name}', 1):6.2f}   {peaks[name]:5.2f} GiB"
        )
    said = {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in vars(arguments).items()
        if name != "gguf"
    }
    return {
        "name": "sampling",
        "machine": machine(),
        "versions": versions("dpsynth", "jax", "keras-hub", "torch", "transformers", "llama-cpp-python"),
        "arguments": said | {"cores": cores},
        "contenders": found,
        "ratios": ratios,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the result")
    parser.add_argument("--model", default="tiny")
    parser.add_argument(
        "--gguf", default="", help="file of the same model for llama.cpp; without it that is left out"
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peer-batches", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=0, help="0: all that this process may use")
    parser.add_argument(
        "--limit-gib", type=float, default=16.0, help="a contender that holds more memory is ended"
    )
    parser.add_argument("--contenders", default=",".join(MAKERS))
    arguments = parser.parse_args()
    names, limit = arguments.contenders.split(","), int(arguments.limit_gib * GIB)
    if not arguments.gguf:
        names = [name for name in names if not name.startswith("llama_cpp")]
    cores = use_cores(arguments.cores)
    options = add_facts(
        {**vars(arguments), "json": None, "cores": cores, "model": installed_model(arguments.model)},
        names,
        limit,
    )
    started = start(names, MAKERS, options, limit)
    rows = {
        name: arguments.rows if name == "dpsynth" else arguments.batch * arguments.peer_batches
        for name in started
    }
    speeds, tokens = measure(started, rows, arguments.rounds)
    write_record(
        arguments.json,
        report(
            speeds,
            tokens,
            {name: contender.peak / GIB for name, contender in started.items()},
            cores,
            arguments,
        ),
    )
    for contender in started.values():
        contender.close()


if __name__ == "__main__":
    main()
