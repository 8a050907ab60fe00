"""How much does the audit see? Detection rates by what is planted, how much of it, and how many rows there
are.

    python benchmarks/audit_power.py --json OUT [--jobs N]

Generated film reviews, each signed with an invented name and a number of seven digits of its own. Into a
fresh sample are planted verbatim copies of training rows, near copies (each fifth word replaced by a word
from elsewhere), or the names and numbers of training rows under fresh texts. Counted is in how many of 20
draws the attack made for it succeeds at the level that is left to each of the attacks on a text; the other
attacks can only add to that. Lines without anything planted count in how many draws any of these attacks
raises a false alarm. Beside the rates stands the smallest share of verbatim copies that the verdict says
would be found four times in five, computed from the numbers of rows. A run that was stopped goes on where OUT
ends.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import platform
import sys

import numpy as np

from dpsynth.audit import LEVEL, copy_test, exact_interval
from dpsynth.demo import reviews
from dpsynth.audit.words import Words, folded, near_copies, unique_identifiers, unique_names

SIZES = ((2000, 500, 2000), (1200, 1200, 1200))  # training, held-out and synthetic rows
ATTACKS = 13  # on a text
SHARES = {
    "nothing": (0.0,),
    "copies": (0.01, 0.02, 0.03),
    "near copies": (0.01, 0.02, 0.03, 0.05),
    "names and numbers": (0.01, 0.02, 0.03, 0.05),
}
SYLLABLES = "ba de fi go ku la me ni po ru sa te vi wo zy ka lo mi ne pu".split()


def invented(rng):
    """A name and a number."""
    words = [
        "".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=4)).capitalize() for _ in range(2)
    ]
    return f"{words[0]} {words[1]}, {rng.integers(1_000_000, 10_000_000)}"


def each_fifth_replaced(text, rng, vocabulary):
    """A near copy."""
    return " ".join(
        vocabulary[rng.integers(len(vocabulary))] if i % 5 == 4 else word
        for i, word in enumerate(text.split())
    )


class Draw:
    """Training, held-out and fresh rows, and the attacks on them."""

    def __init__(self, seed, sizes):
        self.rng, (self.train, held, _) = np.random.default_rng(seed), sizes
        texts = [row["text"] for row in reviews(sum(sizes), seed=20_000 + seed)]
        texts = [texts[i] for i in self.rng.permutation(len(texts))]
        self.who = [invented(self.rng) for _ in texts]
        self.units = self.train + held
        signed = [f"{text} Written by {person}." for text, person in zip(texts, self.who)]
        self.plain, self.real, self.fresh = texts[self.units :], signed[: self.units], signed[self.units :]
        self.words, self.owner, self.member = (
            Words.of(self.real),
            np.arange(self.units),
            np.arange(self.units) < self.train,
        )

    def rows(self, kind, share):
        """Synthetic rows with so much planted in them."""
        count, vocabulary = round(share * self.train), " ".join(self.plain[:100]).split()
        made = {
            "nothing": lambda: [],
            "copies": lambda: self.real[:count],
            "near copies": lambda: [
                each_fifth_replaced(text, self.rng, vocabulary) for text in self.real[:count]
            ],
            "names and numbers": lambda: [
                f"{text} Written by {person}." for text, person in zip(self.plain, self.who[:count])
            ],
        }[kind]()
        return made + self.fresh[len(made) :]

    def succeeds(self, kind, rows):
        """Whether the attack made for this kind, or any where nothing is planted, succeeds."""
        able = lambda found: (found.was_found[found.has_some], self.member[found.has_some])
        rest = lambda attack: able(attack(self.words, self.owner, Words.of(rows), self.units))
        attacks = {
            "copies": lambda: (np.isin(folded(self.words), folded(Words.of(rows))), self.member),
            "near copies": lambda: rest(near_copies),
            "names and numbers": lambda: rest(
                lambda words, owner, ours, units: unique_identifiers(self.real, owner, rows, units)
            ),
            "names": lambda: rest(lambda *others: unique_names(self.real, *others)),
        }
        tried = attacks.values() if kind == "nothing" else [attacks[kind]]
        return any(
            copy_test(kind, *attack(), level=LEVEL / ATTACKS).p_value <= LEVEL / ATTACKS for attack in tried
        )


def draw(seed, sizes):
    """Which plantings are detected in one draw, by kind and share."""
    made = Draw(seed, sizes)
    return {
        f"{kind} {share:.0%}": made.succeeds(kind, made.rows(kind, share))
        for kind, shares in SHARES.items()
        for share in shares
    }


def line(name, sizes, found):
    """What stands in the record of one kind and share."""
    count, member = sum(seen[name] for seen in found), np.arange(sizes[0] + sizes[1]) < sizes[0]
    return {
        "rows": dict(zip(("train", "holdout", "synthetic"), sizes)),
        "draws": len(found),
        "detected": count,
        "rate": count / len(found),
        "interval": exact_interval(count, len(found)),
        "level": LEVEL,
        "attacks": ATTACKS,
        "copies_detectable": copy_test(
            "", np.zeros(len(member), bool), member, level=LEVEL / ATTACKS
        ).detectable,
    }


def report(lines):
    """The record: all lines by name, and how many draws without anything planted pass."""
    return {
        "name": "audit_power",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "contenders": lines,
        "ratios": {
            f"passed, {name}": 1 - found["rate"] for name, found in lines.items() if "nothing" in name
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    lines = json.loads(args.json.read_text())["contenders"] if args.json and args.json.exists() else {}
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for sizes in SIZES:
            rows = f"{sizes[0]} training and {sizes[1]} held-out rows"
            if not any(
                name.startswith(rows) and found["draws"] == args.draws for name, found in lines.items()
            ):
                found = list(pool.map(functools.partial(draw, sizes=sizes), range(args.draws)))
                lines |= {f"{rows}, {name}": line(name, sizes, found) for name in found[0]}
                if args.json:
                    args.json.write_text(json.dumps(report(lines), indent=1) + "\n")
    print(f"level {LEVEL:g} for all {ATTACKS} attacks together, {args.draws} draws")
    for name, found in lines.items():
        print(
            f"{name:65} detected {found['rate']:4.0%}; copies are seen from {found['copies_detectable']:.2%}"
            f" on"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
