"""Peak memory of training and sampling at a real vocabulary: dpsynth beside its peers.

    python benchmarks/memory.py --json OUT

Each figure is the most memory that a fresh process ever held (resident, libraries and weights included), of
one update or of one batch of texts. `train_*`: one DP update of LoRA adapters on as many rows as a microbatch
has (`--microbatch`, of `--length` tokens), as in `training.py`: the peers take the microbatch at once, as
they do, and Opacus its per-sample gradients by hooks. `sample_*`: one batch of `--microbatch` texts of up to
`--length` tokens, as in `sampling.py`; the texts end early, so that it takes minutes and not hours, but for
transformers, whose cache grows with the text. `batch_*`: one update of dpsynth on so many rows of `--short`
tokens in the same microbatches.

A process that holds more than `--limit-gib` is ended and counts as that much, so its ratio is a lower bound.
What is measured is written to the record at once, and a second call goes on after it. `made` is the most that
was held until model and rows were ready; `ready` what was left of it then.
"""

import argparse
import json
import pathlib

import sampling
import training
from side_by_side import (
    GIB,
    Lost,
    installed_model,
    machine,
    prepare_folder,
    start,
    use_cores,
    versions,
    write_record,
)

EARLY = (8, 10, 13)  # quartiles of lengths


def cases(arguments):
    """name -> (contender, makers, what is run, its arguments, further options)."""
    rows = arguments.microbatch
    found = {
        f"train_{name}": (name, training.MAKERS, name, (), {"rows": rows, "length": arguments.length})
        for name in training.MAKERS
    }
    for name in ("dpsynth", "keras_hub", "transformers"):
        ends = {} if name == "transformers" else {"quartiles": EARLY}
        found[f"sample_{name}"] = (
            name,
            sampling.MAKERS,
            "sample",
            (rows, 1),
            {"batch": rows, "length": arguments.length, **ends},
        )
    for batch in map(int, arguments.batches.split(",")):
        found[f"batch_{batch}"] = (
            "dpsynth",
            training.MAKERS,
            "dpsynth",
            (),
            {"rows": batch, "length": arguments.short},
        )
    return found


def peak(name, case, options, limit):
    """Figures of one fresh process, or None where a library is missing."""
    contender_name, makers, run, inputs, more = case
    try:
        started = start([contender_name], makers, options | more, limit, strict=True)
        if not started:
            return None
        contender = started[contender_name]
        answer = contender.run(run, *inputs)
        figures = {
            "peak_gib": contender.peak / GIB,
            "made_gib": contender.made / GIB,
            "ready_gib": contender.ready / GIB,
            "seconds": answer["seconds"],
        }
        contender.close()
        return figures
    except Lost as lost:
        if "holds more" not in str(lost):
            raise
        return {"peak_gib": limit / GIB, "ended": True}


def ratios(found):
    """How many times as much the peers hold, and the largest batch over the smallest."""
    figures = {name: case["peak_gib"] for name, case in found.items()}
    ours = {
        what: figures[f"{what}_dpsynth"]
        for what in ("train", "sample")
        if not found.get(f"{what}_dpsynth", {"ended": True}).get("ended")
    }
    of_peers = {
        f"{name}_over_ours": figure / ours[name.partition("_")[0]]
        for name, figure in figures.items()
        if name.partition("_")[0] in ours and not name.endswith("dpsynth")
    }
    batches = sorted(
        (int(name.partition("_")[2]), figure) for name, figure in figures.items() if name.startswith("batch_")
    )
    flat = (
        {f"batch_{batches[-1][0]}_over_{batches[0][0]}": batches[-1][1] / batches[0][1]}
        if len(batches) > 1
        else {}
    )
    return of_peers | flat


def earlier(path, said):
    """Figures that a record of the same arguments has."""
    if path is None or not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["contenders"] if record["arguments"] == said else {}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=pathlib.Path, help="file for the result; a second call goes on with it"
    )
    parser.add_argument("--model", default="gemma3_270m")
    parser.add_argument("--microbatch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--short", type=int, default=64)
    parser.add_argument("--batches", default="64,256,1024")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--cores", type=int, default=0, help="0: all that this process may use")
    parser.add_argument(
        "--limit-gib", type=float, default=16.0, help="a process that holds more memory is ended"
    )
    parser.add_argument(
        "--cases", default="", help="only these of train_…, sample_…, batch_…, separated by commas"
    )
    arguments = parser.parse_args()
    limit, cores = int(arguments.limit_gib * GIB), use_cores(arguments.cores)
    said = {name: value for name, value in vars(arguments).items() if name not in ("json", "cases")} | {
        "cores": cores
    }
    options = said | {
        "model": installed_model(arguments.model),
        "keras_batch": arguments.microbatch,
        "opacus_modes": "hooks",
        "lengths": "full",
        "gguf": "",
    }
    chosen = {
        name: case
        for name, case in cases(arguments).items()
        if not arguments.cases or name in arguments.cases.split(",")
    }
    found = earlier(arguments.json, said)
    peers = [case[0] for name, case in chosen.items() if name not in found]
    prepare_folder(peers, options, limit)
    options = sampling.add_facts(options, peers, limit)
    for name, case in chosen.items():
        if name not in found and (figures := peak(name, case, options, limit)):
            found[name] = figures
        if name in found:
            print(
                f"{name:20s} "
                f"{'at least ' if found[name].get('ended') else '':9s}{found[name]['peak_gib']:6.2f} GiB",
                flush=True,
            )
        record = {
            "name": "memory",
            "machine": machine(),
            "versions": versions(
                "dpsynth", "jax", "keras-hub", "jax-privacy", "torch", "transformers", "peft", "opacus"
            ),
            "arguments": said,
            "contenders": found,
            "ratios": ratios(found),
        }
        write_record(arguments.json, record)
    print({name: round(value, 3) for name, value in ratios(found).items()})


if __name__ == "__main__":
    main()
