"""One DP-SGD update of LoRA adapters: dpsynth, jax_privacy's `keras_api`, and Opacus with PEFT and
transformers.

    python benchmarks/training.py --json OUT
    python benchmarks/training.py --model gemma3_270m --json OUT       the whole vocabulary
    python benchmarks/training.py --lengths imdb --length 256 --json OUT

All contenders have the same architecture, the same weights (their losses before the first update are
compared), adapters of the same rank on query and value, the same rows of random pieces, and the same batch,
and end in noise and Adam. Each is a process of its own on the same cores; rounds alternate, after one for
compilation. `dpsynth` bounds the gradient of each row on the grid, sums exactly and draws noise;
`dpsynth_plain` trains as the package does without privacy, and `dpsynth_plain_batched` takes the gradient of
a microbatch at once. `keras_api` is used as in the JAX-Privacy tutorial: `make_private`, accumulation of
`--keras-batch` rows at a time. `opacus` uses the fastest of its modes (hooks, functorch, ghost clipping),
which is looked for first, in microbatches of `--microbatch` rows, padded to the longest of them. Lengths are
all equal (`full`), or log-normal with the quartiles that the first 2,000 training reviews of IMDb have in
Gemma's English pieces, cut at `--length` (`imdb`); then dpsynth has its buckets and `keras_api` pads all rows
to `--length`.

Core-seconds are seconds times cores. The record also has the core's rate of float32 matrix products (127 ×
640 × 2,048) in the same run, by JAX and by PyTorch; the time of the gradient of the blocks alone (no
vocabulary); and the share of the better rate at which the blocks run. Operations counted there: forward and
backward to the activations of all linear layers, attention (all pairs of positions), and LoRA with its own
gradients; none for norms or softmax.
"""

import argparse
import contextlib
import functools
import math
import os
import pathlib
import statistics
import tempfile
import time
from unittest import mock

import numpy as np
from sampling import GEMMA_QUARTILES, draw_lengths
from side_by_side import (
    GIB,
    Lost,
    installed_model,
    machine,
    matrix_rate,
    prepare_folder,
    start,
    transformers_folder,
    use_cores,
    versions,
    write_record,
)

PROMPT, NOISE, NEEDED = 8, 1.0, 1e-3


def token_rows(options, vocabulary):
    """(int32[rows, length], int[rows]): ids of random ordinary pieces with zeros behind, and lengths;
    `PROMPT` tokens of each are prompt.
    """
    count, length = options["rows"], options["length"]
    full = options["lengths"] == "full"
    lengths = (
        np.full(count, length)
        if full
        else np.minimum(PROMPT + draw_lengths(count, GEMMA_QUARTILES, seed=1), length)
    )
    ids = np.random.default_rng(0).integers(300, vocabulary, (count, length), np.int32)
    return np.where(np.arange(length) < lengths[:, None], ids, 0).astype(np.int32), lengths


def _settings(options):
    from dpsynth.settings import Settings

    return Settings(
        tuning="lora",
        lora_rank=options["rank"],
        lora_targets=options["targets"],
        sequence_length=options["length"],
        microbatch_size=options["microbatch"],
    )


def _trainer(model, store, settings, noise):
    """A trainer whose batches always hold every row."""
    from dpsynth.finetune import Trainer
    from dpsynth.privacy import Mechanism, Randomness

    mechanism = Mechanism(
        num_units=len(store),
        expected_batch_size=len(store),
        steps=1000,
        noise_multiplier=noise,
        delta=1e-5,
        target_epsilon=math.inf,
    )
    return Trainer(model, store, settings, mechanism, Randomness(os.urandom(32), "benchmark"))


def dpsynth_contender(options):
    """Runs of dpsynth: updates, private and plain; loss, blocks and rate for the figures beside them."""
    import jax
    from dpsynth import finetune
    from dpsynth.data import TokenStore
    from dpsynth.models import load_model, setup_tuning

    model, settings = load_model(options["model"], seed=0), _settings(options)
    setup_tuning(model, settings)
    tokens, lengths = token_rows(options, model.vocabulary_size)
    pairs = ((row[:PROMPT].tolist(), row[PROMPT:n].tolist()) for row, n in zip(tokens, lengths))
    with tempfile.TemporaryDirectory() as folder:
        store = TokenStore.write(pathlib.Path(folder) / "tokens", pairs)
    trainers = {
        "dpsynth": _trainer(model, store, settings, NOISE),
        "dpsynth_plain": _trainer(model, store, settings, 0.0),
    }
    trainers["dpsynth_plain_batched"], one_by_one = _trainer(model, store, settings, 0.0), finetune.one_by_one

    def update(name):
        alone = one_by_one() and name != "dpsynth_plain_batched"
        with contextlib.ExitStack() as patches:
            for module in (finetune.loss, finetune.clipping, finetune.trainer):
                patches.enter_context(mock.patch.object(module, "one_by_one", lambda: alone))
            trainers[name].update()
        jax.block_until_ready(trainers[name].trainable)

    def loss():
        losses = finetune.make_mean_loss(model)
        each = [
            losses(model.trainable, model.frozen, store.batch(np.array([row]), options["length"]))
            for row in range(len(store))
        ]
        return float(np.mean(each))

    runs = {name: functools.partial(update, name) for name in trainers}
    return runs | {
        "loss": loss,
        "rate": jax_rate,
        "blocks": functools.partial(blocks_seconds, model, options["length"] - 1),
    }


def jax_rate():
    """Operations per second of matrix products by JAX."""
    import jax
    import jax.numpy as jnp

    wide, narrow = (
        jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        for shape in ((640, 2048), (2048, 640))
    )

    def pair(_, states):
        return (states @ wide) @ narrow * 1e-3

    products = jax.jit(
        lambda count: jax.lax.fori_loop(0, count // 2, pair, jnp.ones((127, 640), jnp.float32))
    )
    return matrix_rate(lambda count: products(count).block_until_ready())


def torch_rate(torch):
    """The same by PyTorch."""
    wide, narrow = torch.randn(640, 2048), torch.randn(2048, 640)

    def products(count):
        states = torch.ones(127, 640)
        for _ in range(count // 2):
            states = (states @ wide) @ narrow * 1e-3

    with torch.no_grad():
        return matrix_rate(products)


def blocks_seconds(model, length, rows=4, repeats=5):
    """Seconds for one row's gradient of the adapters through all blocks and no vocabulary, rows one after
    the other.
    """
    import jax
    import jax.numpy as jnp

    rng, width = np.random.default_rng(0), model.causal_lm.backbone.hidden_dim
    tokens = jnp.asarray(rng.integers(300, model.vocabulary_size, (rows, length)), jnp.int32)
    mask, ahead = jnp.ones((1, length), jnp.int32), jnp.asarray(rng.normal(size=(length, width)), jnp.float32)

    def gradients(trainable, frozen, tokens):
        def add(total, row):
            each = jax.grad(lambda t: jnp.vdot(model.hidden(t, frozen, row[None], mask)[0], ahead))(trainable)
            return [a + b for a, b in zip(total, each)], None

        return jax.lax.scan(add, [jnp.zeros_like(t) for t in trainable], tokens)[0]

    gradients, times = jax.jit(gradients), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(gradients(model.trainable, model.frozen, tokens))
        times.append((time.perf_counter() - began) / rows)
    shape = {
        name: getattr(model.causal_lm.backbone, name)
        for name in (
            "num_layers",
            "hidden_dim",
            "intermediate_dim",
            "num_query_heads",
            "num_key_value_heads",
            "head_dim",
            "vocabulary_size",
        )
    }
    return {"seconds": statistics.median(times[1:]), "shape": shape}


def block_operations(shape, tokens, rank):
    """Floating-point operations of one row's gradient through the blocks, as the top of this file counts
    them; `rank` on query and value.
    """
    width, queries, keys = (
        shape["hidden_dim"],
        *(shape[name] * shape["head_dim"] for name in ("num_query_heads", "num_key_value_heads")),
    )
    into, rest = width * (queries + 2 * keys), queries * width + 3 * width * shape["intermediate_dim"]
    linear = (
        2 * tokens * (2 * (into + rest) * shape["num_layers"] - into)
    )  # nothing in front of the first block needs a gradient
    attention = 3 * 2 * 2 * tokens**2 * queries * shape["num_layers"]
    adapters = 3 * 2 * tokens * rank * (2 * width + queries + keys) * shape["num_layers"]
    return linear + attention + adapters


def keras_api_contender(options):
    """The tutorial's `make_private`, `compile` and `fit`; the loss is corrected for what Keras divides by."""
    from dpsynth.models import load_model
    import keras
    from jax_privacy import keras_api

    model, batch = load_model(options["model"], seed=0), options["keras_batch"]
    tokens, lengths = token_rows(options, model.vocabulary_size)
    accumulated, inputs = len(tokens) // batch, options["length"] - 1
    position = np.arange(1, options["length"])
    weights = ((position >= PROMPT) & (position < lengths[:, None])).astype(np.float32)
    x = {"token_ids": tokens[:, :-1], "padding_mask": (position <= lengths[:, None]).astype(np.int32)}
    language_model = model.causal_lm
    language_model.preprocessor = None
    language_model.backbone.enable_lora(options["rank"], target_layer_names=options["targets"].split(","))
    language_model = keras_api.make_private(
        language_model,
        keras_api.DPKerasConfig(
            epsilon=1e6,
            delta=1e-5,
            clipping_norm=1.0,
            batch_size=batch,
            gradient_accumulation_steps=accumulated,
            train_steps=1000 * accumulated,
            train_size=len(tokens),
            noise_multiplier=NOISE,
            seed=42,
        ),
    )
    language_model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(
            learning_rate=0.003, gradient_accumulation_steps=accumulated if accumulated > 1 else None
        ),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    losses = []

    def update():
        language_model.reset_metrics()
        # `fit` waits seconds for the threads of its tf.data to end
        for start in range(0, len(tokens), batch):
            part = slice(start, start + batch)
            inputs_of = {name: array[part] for name, array in x.items()}
            logs = language_model.train_on_batch(inputs_of, tokens[part, 1:], weights[part], return_dict=True)
        losses.append(float(logs["loss"]) * inputs * len(tokens) / float(weights.sum()))

    return {"keras_api": update, "loss": lambda: losses[0]}


def opacus_contender(options):
    """Opacus around PEFT's adapters on the transformers model, in the fastest of its modes."""
    import torch

    torch.set_num_threads(options["cores"])
    modes = {}
    for mode in options["opacus_modes"].split(","):
        try:
            update = opacus_mode(options, mode, torch)
            update(options["microbatch"])
            began = time.perf_counter()
            update(options["microbatch"])
            modes[mode] = time.perf_counter() - began
        except Exception as error:  # not each mode takes each layer
            print(f"opacus, {mode}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    fastest = min(modes, key=modes.get)
    update = opacus_mode(options, fastest, torch)
    first = update(0)
    return {
        "opacus": lambda: update(options["rows"]),
        "loss": lambda: first,
        "rate": lambda: torch_rate(torch),
        "modes": lambda: {"seconds": modes, "fastest": fastest},
    }


def opacus_mode(options, mode, torch):
    """update(rows) does one update on the first rows; update(0) gives the mean loss of all rows."""
    import opacus
    import peft
    import transformers
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    base = transformers.AutoModelForCausalLM.from_pretrained(
        transformers_folder(options["model"]), dtype=torch.float32
    )
    tokens, lengths = (torch.tensor(a, dtype=torch.long) for a in token_rows(options, base.config.vocab_size))
    layers = [f"{name[0]}_proj" for name in options["targets"].split(",")]
    torch.manual_seed(0)
    adapters = peft.LoraConfig(
        r=options["rank"],
        lora_alpha=options["rank"],
        target_modules=layers,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    module = peft.get_peft_model(base, adapters).train()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.003)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=len(tokens))
    module, optimizer, *_ = opacus.PrivacyEngine().make_private(
        module=module,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"criterion": torch.nn.CrossEntropyLoss()} if mode == "ghost" else {}),
    )

    def losses(first, last):
        longest = int(lengths[first:last].max())
        ids, position = tokens[first:last, :longest], torch.arange(1, longest)
        padded = bool((lengths[first:last] < longest).any())
        mask = (
            {"attention_mask": (torch.arange(longest - 1) < lengths[first:last, None]).long()}
            if padded
            else {}
        )
        logits = module(input_ids=ids[:, :-1], use_cache=False, **mask).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(len(ids), -1)
        weights = ((position >= PROMPT) & (position < lengths[first:last, None])).float()
        return (each * weights).sum(1) / weights.sum(1)

    def update(rows):
        if not rows:
            with torch.no_grad():
                return float(np.mean([losses(row, row + 1).item() for row in range(len(tokens))]))
        for first in range(0, rows, options["microbatch"]):
            last = min(rows, first + options["microbatch"])
            if mode == "ghost":
                DPTensorFastGradientClipping(module, optimizer, losses(first, last), "mean").backward()
            else:
                losses(first, last).mean().backward()
            optimizer.signal_skip_step(do_skip=last < rows)
            optimizer.step()
            optimizer.zero_grad()

    return update


MAKERS = {
    "dpsynth": (dpsynth_contender, ["dpsynth"]),
    "keras_api": (keras_api_contender, ["jax_privacy"]),
    "opacus": (opacus_contender, ["torch", "transformers", "peft", "opacus"]),
}
UPDATES = {
    "dpsynth": ["dpsynth", "dpsynth_plain", "dpsynth_plain_batched"],
    "keras_api": ["keras_api"],
    "opacus": ["opacus"],
}


def measure(started, rounds):
    """update name -> {seconds, cpu_seconds} of each round; rounds alternate, and the first of them, for
    compilation, is not counted.
    """
    times = {}
    for turn in range(rounds + 1):
        for name, contender in list(started.items()):
            try:
                for update in UPDATES[name]:
                    answer = contender.run(update)
                    times.setdefault(update, []).extend([answer] if turn else [])
                    print(
                        f"round {turn} {update:22s} {answer['seconds']:8.2f} s,"
                        f" {answer['cpu_seconds']:8.2f} of a processor",
                        flush=True,
                    )
            except Lost as lost:
                print(f"{lost}: left out", flush=True)
                started.pop(name)
    return {update: answers for update, answers in times.items() if answers}


def facts(started):
    """Loss of each contender before its first update, matrix rates, time of the blocks, Opacus' modes."""
    wanted = {
        "dpsynth": ("loss", "rate", "blocks"),
        "keras_api": ("loss",),
        "opacus": ("loss", "rate", "modes"),
    }
    return {
        name: {what: contender.run(what)["result"] for what in wanted[name]}
        for name, contender in started.items()
    }


def figures_of(answers, rows, cores):
    """Figures of one contender: a median counts, of the seconds of its updates."""
    seconds = [answer["seconds"] for answer in answers]
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "runs": seconds,
        "rows_per_core_second": rows / middle / cores,
        "core_seconds_per_row": middle * cores / rows,
        "processor_seconds_per_row": statistics.median(answer["cpu_seconds"] for answer in answers) / rows,
    }


def ratios_of(contenders):
    """How many times as long the peers take, and private over the faster of the plain ones; nothing where
    dpsynth is left out.
    """
    if "dpsynth" not in contenders:
        return {}
    ours = contenders["dpsynth"]["seconds"]
    peers = {
        f"ours_over_{name}": figures["seconds"] / ours
        for name, figures in contenders.items()
        if not name.startswith("dpsynth")
    }
    return peers | {
        "dp_over_non_dp": ours
        / min(contenders[name]["seconds"] for name in ("dpsynth_plain", "dpsynth_plain_batched"))
    }


def core_of(found, options):
    """The core's matrix rate, and at what share of it the blocks run."""
    cores, rates = options["cores"], {name: facts["rate"] for name, facts in found.items() if "rate" in facts}
    core = (
        {
            "matrix_gflops": max(rates.values()) / 1e9 / cores,
            "matrix_gflops_of_all_cores": {name: rate / 1e9 for name, rate in rates.items()},
        }
        if rates
        else {}
    )
    if "dpsynth" in found:
        blocks = found["dpsynth"]["blocks"]
        work = block_operations(blocks["shape"], options["length"] - 1, options["rank"])
        core |= {
            "blocks_core_seconds_per_row": blocks["seconds"] * cores,
            "blocks_gflop_per_row": work / 1e9,
            "blocks_share_of_matrix_rate": work / blocks["seconds"] / max(rates.values()),
        }
    return core


def report(times, found, peaks, options, arguments):
    """The record of the run, printed as a table."""
    contenders = {
        name: figures_of(answers, options["rows"], options["cores"]) for name, answers in times.items()
    }
    ratios, core = ratios_of(contenders), core_of(found, options)
    for name, figures in contenders.items():
        print(
            f"{name:22s} {figures['seconds']:8.2f} s   {figures['core_seconds_per_row']:7.3f} core-seconds a"
            f" row   "
            f"{figures['rows_per_core_second']:6.2f} rows a core-second  "
            f" {figures['processor_seconds_per_row']:7.3f} s of processors a row"
        )
    losses = {name: facts["loss"] for name, facts in found.items()}
    print(
        {name: round(value, 3) for name, value in (ratios | core).items() if isinstance(value, float)},
        losses,
        peaks,
    )
    said = {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in vars(arguments).items()
        if name != "json"
    }
    return {
        "name": "training",
        "machine": machine(),
        "versions": versions(
            "dpsynth", "jax", "keras-hub", "jax-privacy", "torch", "transformers", "peft", "opacus"
        ),
        "arguments": said | {"cores": options["cores"]},
        "contenders": contenders,
        "ratios": ratios,
        "core": core,
        "losses": losses,
        "peak_gib": peaks,
        "opacus_modes": found.get("opacus", {}).get("modes"),
    }


def check_losses(losses):
    """Raise where contenders do not have the same loss before the first update: then they do not do the
    same work.
    """
    if max(losses.values()) - min(losses.values()) > NEEDED * max(losses.values()):
        raise SystemExit(
            f"error: not the same model or rows, losses before the first update differ: {losses}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the result")
    parser.add_argument("--model", default="gemma3_270m:english")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row, prompt included")
    parser.add_argument("--lengths", choices=("full", "imdb"), default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--microbatch", type=int, default=8)
    parser.add_argument("--keras-batch", type=int, default=8)
    parser.add_argument("--opacus-modes", default="hooks,functorch,ghost")
    parser.add_argument("--cores", type=int, default=0, help="0: all that this process may use")
    parser.add_argument(
        "--limit-gib", type=float, default=16.0, help="a contender that holds more memory is ended"
    )
    parser.add_argument("--contenders", default=",".join(MAKERS))
    arguments = parser.parse_args()
    names, limit = arguments.contenders.split(","), int(arguments.limit_gib * GIB)
    options = vars(arguments) | {
        "cores": use_cores(arguments.cores),
        "model": installed_model(arguments.model),
    }
    del options["json"]
    prepare_folder(names, options, limit)
    started = start(names, MAKERS, options, limit)
    times = measure(started, arguments.rounds)
    found = facts(started)
    record = report(
        times, found, {name: contender.peak / GIB for name, contender in started.items()}, options, arguments
    )
    if options["lengths"] == "full":
        check_losses(record["losses"])
    write_record(arguments.json, record)
    for contender in started.values():
        contender.close()


if __name__ == "__main__":
    main()
