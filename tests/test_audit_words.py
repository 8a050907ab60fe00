"""What the audit of rows sees beside copies: things that one unit has for itself, near copies, and what it
says that it could not see."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from dpsynth import audit
from dpsynth.audit import words
from dpsynth.demo import reviews
from dpsynth.settings import DataError

TEXT_ATTACKS = 13
TRAIN, HELD = 2000, 500
SYLLABLES = "ba de fi go ku la me ni po ru sa te vi wo zy ka".split()


def invented(rng):
    """A name and a number of seven digits, as in `Bafeku Lamizo, 4711471`."""
    name = " ".join(
        "".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=4)).capitalize() for _ in range(2)
    )
    return f"{name}, {rng.integers(1_000_000, 10_000_000)}"


def signed(texts, who):
    return [f"{text} Written by {person}." for text, person in zip(texts, who)]


def each_fifth_replaced(text, rng, vocabulary):
    return " ".join(
        vocabulary[rng.integers(len(vocabulary))] if i % 5 == 4 else word
        for i, word in enumerate(text.split())
    )


@pytest.fixture(scope="module")
def people():
    """2,000 training, 500 held-out and 2,000 fresh texts, each with a name and number of its own, and
    those of the training rows.
    """
    rng, texts = np.random.default_rng(0), [row["text"] for row in reviews(2 * TRAIN + HELD, seed=1)]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    who = [invented(rng) for _ in texts]
    return (
        *np.split(np.array(signed(texts, who), object), [TRAIN, TRAIN + HELD]),
        np.array(texts[TRAIN + HELD :], object),
        who,
    )


@pytest.fixture(scope="module")
def reports(people):
    """Reports on the fresh texts, with 2.5 % of them under other people's names, and with 3 % near copies
    among them.
    """
    train, held, fresh, unsigned, who = people
    rng, vocabulary = np.random.default_rng(1), " ".join(fresh).split()
    carrying = [*signed(unsigned[:50], who), *fresh[50:]]
    rewritten = [*(each_fifth_replaced(text, rng, vocabulary) for text in train[:60]), *fresh[60:]]
    return {
        name: audit.audit_files([*rows], [*train], [*held], max_rows=200)
        for name, rows in (("fresh", fresh), ("carrying", carrying), ("rewritten", rewritten))
    }


def attack(report, word):
    return next(found for found in report.attacks if word in found.name)


def counts(found, member):
    """How many training and how many held-out units showed something."""
    return int((found.was_found & member).sum()), int((found.was_found & ~member).sum())


# the setting in which only copies were seen


def test_two_and_a_half_percent_fresh_rows_with_a_training_rows_name_and_number_fail(reports):
    report = reports["carrying"]
    numbers, names = attack(report, "numbers"), attack(report, "names")
    assert (
        report.verdict == "fails"
        and numbers in report.failed
        and numbers.p_value < 3e-4
        and names.p_value < 3e-3
    )
    assert (
        numbers.detail == "50 of 2,000 training, 1 of 500 held-out rows"
    )  # one of so many numbers of seven digits recurs by chance
    assert not [
        found for found in report.failed if found not in (numbers, names)
    ]  # no other attack sees them
    assert (
        "50 training and 1 held-out rows with numbers, codes or addresses that no other row has occur"
        in " ".join(report.notices)
    )


def test_three_percent_copies_with_each_fifth_word_replaced_fail(reports):
    report = reports["rewritten"]
    assert attack(report, "verbatim").statistic == 0 and attack(report, "50-grams").statistic == 0
    assert report.verdict == "fails" and attack(report, "near copies") in report.failed


def test_fresh_rows_with_names_and_numbers_pass(reports):
    report = reports["fresh"]
    assert report.passed and len(report.attacks) == TEXT_ATTACKS and attack(report, "numbers").p_value == 1


def test_the_level_of_all_attacks_together_counts_the_new_ones(reports):
    for report in reports.values():
        assert (
            report.worst.adjusted_p == pytest.approx(TEXT_ATTACKS * report.worst.p_value)
            or report.worst.adjusted_p == 1
        )


# what could not have been seen


def test_the_verdict_says_what_could_not_have_been_seen(reports):
    report = reports["fresh"]
    copies = attack(report, "verbatim copies")
    assert (
        copies.sees == f"{100 * copies.detectable:.2g} % of the training rows" == "1.8 % of the training rows"
    )
    for shown in (
        report.summary,
        report.unseen,
        report.markdown(),
        report._repr_html_(),
        json.dumps(report.to_dict()),
    ):
        assert (
            "would mostly not have found: verbatim copies below 1.8 % of the training rows; " in shown
            and "near copies below" in shown
        )
    assert reports["carrying"].unseen in reports["carrying"].markdown()


@pytest.mark.parametrize("train, held", [(2000, 500), (1200, 1200), (600, 600), (2000, 2000)])
def test_the_smallest_share_that_is_seen_follows_from_the_rows_and_the_level(train, held):
    level, member, rng = audit.LEVEL / TEXT_ATTACKS, np.arange(train + held) < train, np.random.default_rng(0)
    test = lambda hits: audit.copy_test("", hits, member, level=level)
    least = test(np.zeros(train + held, bool)).detectable
    found = lambda share: np.mean(
        [test(member & (rng.random(train + held) < share)).p_value <= level for _ in range(120)]
    )
    assert 0.7 < found(least) < 0.93 and found(least / 2) < 0.2
    fewest = next(k for k in range(1, train) if test(np.arange(train + held) < k).p_value <= level)
    assert fewest / train < least < 2 * fewest / train
    assert (fewest <= 0.01 * train) is (
        (train, held) in ((1200, 1200), (2000, 2000))
    )  # where 1 % of copies fail


def test_natural_coincidences_raise_the_smallest_share_that_is_seen():
    member, rng = np.arange(2500) < 2000, np.random.default_rng(0)
    shares = [
        audit.copy_test("", rng.random(2500) < natural, member, level=1e-3).detectable
        for natural in (0.0, 0.05, 0.2)
    ]
    assert shares[0] < shares[1] < shares[2]


def test_where_no_row_has_any_the_verdict_says_so():
    texts = [row["text"] for row in reviews(600, seed=5)]
    report = audit.audit_files(texts[:200], texts[200:400], texts[400:])
    assert (
        "any at all of: numbers, codes or addresses of their own" in report.summary
        and attack(report, "numbers").p_value == 1
    )


# the null hypothesis


@pytest.mark.parametrize("train, held", [(400, 100), (100, 400), (300, 300)])
def test_names_and_numbers_that_come_from_everybody_alike_are_no_leak(train, held):
    rng, member = np.random.default_rng(3), np.arange(train + held) < train
    texts = [f"note number {rng.integers(10**6, 10**7)}" for _ in member]
    p = []
    for _ in range(60):
        chosen = rng.choice(len(texts), (train + held) // 4, replace=False)
        found = words.unique_identifiers(texts, np.arange(len(texts)), [texts[i] for i in chosen], len(texts))
        p.append(
            audit.copy_test("", found.was_found[found.has_some], member[found.has_some], level=0.01).p_value
        )
    assert sum(counts(found, member)) == len(chosen) and np.mean(np.array(p) <= 0.05) <= 0.1 and min(p) > 1e-4


def test_the_new_attacks_pass_twenty_of_twenty_fresh_samples():
    rng, alarms, member = np.random.default_rng(4), [], np.arange(400) < 250
    for seed in range(20):
        texts = [row["text"] for row in reviews(700, seed=50 + seed)]
        texts = signed([texts[i] for i in rng.permutation(700)], [invented(rng) for _ in texts])
        owner, real, ours = np.arange(400), words.Words.of(texts[:400]), words.Words.of(texts[400:])
        found = [
            words.unique_identifiers(texts[:400], owner, texts[400:], 400),
            words.unique_names(texts[:400], real, owner, ours, 400),
            words.unique_ngrams(real, owner, ours, 400),
            words.near_copies(real, owner, ours, 400),
        ]
        p = [
            audit.copy_test("", f.was_found[f.has_some], member[f.has_some], level=0.01).p_value
            for f in found
        ]
        alarms.append(min(p) <= audit.LEVEL / TEXT_ATTACKS)
    assert not any(alarms)


def test_what_two_units_have_is_nobodys_own():
    texts = ["call 5551234", "call 555 1234", "call 5559999"]
    both = words.unique_identifiers(texts, np.arange(3), ["5551234 and 5559999"], 3)
    one = words.unique_identifiers(texts, np.array([0, 0, 1]), ["5551234"], 2)
    assert both.has_some.tolist() == [
        False,
        False,
        True,
    ] == both.was_found.tolist() and one.was_found.tolist() == [
        True,
        False,
    ]


# what is found


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("call 030 / 1234-567 now", {"0301234567"}),
        (
            "(555) 123-4567",
            {
                "5551234567",
            },
        ),
        ("card 4111 1111 1111 1111.", {"4111111111111111"}),
        ("born 24.12.1971", {"24121971"}),
        ("in 1999, aged 27", set()),
        ("Mail A.B@X-y.example.org!", {"a.b@x-y.example.org"}),
        ("see https://example.org/u/77, there", {"https://example.org/u/77"}),
        ("ask @Jo_Doe", {"@jo_doe"}),
        ("badge QX17Z3", {"qx17z3"}),
        ("number 1234567", {"1234567"}),
        ("1,234,567 in all", {"1234567"}),
        ("the 1980s", {"1980s"}),
        ("well-known plain words", set()),
    ],
)
def test_identifiers_have_one_form(text, wanted):
    assert words.identifiers(text) == wanted


@pytest.mark.parametrize(
    "said, found",
    [("ADA QUILL came", True), ("met ada quill,", True), ("quill met ada", True), ("adam quillson", False)],
)
def test_names_are_found_in_any_case_and_as_whole_words(said, found):
    texts = ["It was Ada Quill who came", "It was Bo Dahl who came"]
    result = words.unique_names(texts, words.Words.of(texts), np.arange(2), words.Words.of([said]), 2)
    assert result.has_some.all() and result.was_found.tolist() == [found, False]


def test_where_full_names_recur_by_chance_only_those_with_a_word_of_their_own_count():
    rng, first = (
        np.random.default_rng(0),
        [f"{a}{b}en".capitalize() for a in SYLLABLES[:5] for b in SYLLABLES[:4]],
    )
    common = [f"It was {rng.choice(first)} {rng.choice(first)} again" for _ in range(600)]
    real = [
        f"{text}, with {invented(rng).split(',')[0]}" if i < 300 else text
        for i, text in enumerate(common[:400])
    ]
    ours = [*common[400:], *(f"well, {text.split('with ')[1]}" for text in real[:30])]
    found = words.unique_names(real, words.Words.of(real), np.arange(400), words.Words.of(ours), 400)
    assert found.what == "full names with a rare word" and found.has_some.sum() > 250
    assert found.was_found[:30].sum() >= 28 and not found.was_found[30:].any()


def test_a_rare_phrase_is_found_and_its_length_is_that_of_the_texts():
    free, rng = [row["text"] for row in reviews(600, seed=8)], np.random.default_rng(0)
    phrase = lambda: " ".join(
        rng.choice("a heron blue tattoo left ankle seen twice near old mill by dawn".split(), 14)
    )
    real = [f"{text} {phrase()}" for text in free[:400]]
    ours = [f"{fresh} {text[-120:]}" for fresh, text in zip(free[400:], real[:40])]
    found = words.unique_ngrams(words.Words.of(real), np.arange(400), words.Words.of(ours), 400)
    notes = [f"patient {invented(rng)}" for _ in range(200)]
    short = words.unique_ngrams(words.Words.of(notes), np.arange(200), words.Words.of(notes[:9]), 200)
    assert (
        int(found.what.split("-")[0]) >= 8
        and found.was_found[:40].mean() > 0.8
        and found.was_found[40:].mean() < 0.1
    )
    assert short.what in ("2-grams", "3-grams") and counts(short, np.arange(200) < 9) == (
        9,
        0,
    )


@pytest.mark.parametrize("rows_each", [1, 3])
def test_near_copies_are_measured_by_the_texts_of_other_units(rows_each):
    rng, texts = (
        np.random.default_rng(0),
        [row["text"] for row in reviews(900, seed=9) if len(row["text"].split()) > 30][:500],
    )
    owner = np.repeat(np.arange(300), rows_each)
    vocabulary = " ".join(texts).split()
    real = [
        each_fifth_replaced(text, rng, vocabulary) for text in texts[:300] for _ in range(rows_each)
    ]  # the rows of a unit resemble each other
    ours = [*(each_fifth_replaced(text, rng, vocabulary) for text in real[::rows_each][:20]), *texts[300:480]]
    found = words.near_copies(words.Words.of(real), owner, words.Words.of(ours), 300)
    assert (
        found.has_some.mean() > 0.9
        and found.was_found[:20].mean() > 0.8
        and found.was_found[20:].mean() < 0.03
    )


def test_texts_in_common_use_are_not_near_copies():
    form = (
        "please be informed that your order number {} was sent on its way to you this very morning "
        "by our partner"
    )
    real, ours = ([form.format(i) for i in range(start, start + 100)] for start in (0, 100))
    own = [row["text"] for row in reviews(400, seed=3)]
    found = words.near_copies(
        words.Words.of(real + own[:200]), np.arange(300), words.Words.of(ours + own[200:]), 300
    )
    assert not found.was_found[:100].any() and found.was_found.sum() <= 5


def test_texts_are_read_in_parts(monkeypatch):
    texts = [row["text"] for row in reviews(70, seed=1)]
    whole = words.Words.of(texts)
    monkeypatch.setattr(words, "PART", 30)
    parts = words.Words.of(iter(texts))
    assert (
        np.array_equal(whole.hashes, parts.hashes)
        and np.array_equal(whole.lengths, parts.lengths)
        and len(words.Words.of([]).hashes) == 0
    )


@pytest.mark.parametrize("texts", [[""] * 60, ["one"] * 60, ["日本"] * 60, [f"Word{i}" for i in range(60)]])
def test_texts_in_which_nothing_is_to_be_found_pass_or_cannot_tell(texts):
    rows = [pd.DataFrame({"text": texts[i : i + 20]}) for i in (0, 20, 40)]
    assert audit.audit_files(*rows, text_column="text").verdict in ("passes", "cannot tell")


# whole units


@pytest.fixture(scope="module")
def of_units():
    """Rows of 100 people, three each, the number of a person in one of them; and as many fresh rows."""
    rng, texts = np.random.default_rng(5), [row["text"] for row in reviews(600, seed=11)]
    who, says = np.repeat(rng.permutation(100), 3), np.tile(np.arange(3), 100)
    chosen = rng.integers(3, size=100)
    numbers = rng.integers(10**6, 10**7, size=100)
    rows = [
        f"{text} Number {numbers[unit]}." if says[i] == chosen[unit] else text
        for i, (text, unit) in enumerate(zip(texts, who))
    ]
    return rows, who, texts[300:], numbers


def test_all_rows_of_a_unit_are_searched_and_the_unit_counts_once(of_units):
    rows, who, fresh, numbers = of_units
    train = who < 50
    carried = [f"{text} Number {numbers[i]}." for i, text in enumerate(fresh[:30])] + fresh[30:]
    sides = [[row for row, inside in zip(rows, side) if inside] for side in (train, ~train)]
    report = audit.audit_files(carried, *sides, train_units=who[train], holdout_units=who[~train])
    assert (
        report.verdict == "fails"
        and attack(report, "numbers").detail == "30 of 50 training, 0 of 50 held-out rows"
    )
    assert "in all of its rows" in report.warnings[0]


def test_each_text_has_the_row_that_stands_for_its_unit(of_units):
    rows, who, fresh, _ = of_units
    train = who < 50
    sides = [[row for row, inside in zip(rows, side) if inside] for side in (train, ~train)]
    pool = audit.make_pool(fresh, *sides, train_units=who[train], holdout_units=who[~train])
    unit_of = dict(zip(rows, who))
    stands = [unit_of[text] for text in pool.real["text"]]
    assert len(pool.texts) == 300 and [stands[k] for k in pool.owner] == [
        unit_of[text] for text in pool.texts
    ]
    alone = audit.make_pool(fresh, *sides)
    assert alone.real["text"][alone.owner].tolist() == alone.texts
    twice = audit.make_pool(fresh, sides[0] + sides[0][:40], sides[1], copies_together=True)
    assert twice.real["text"][twice.owner].tolist() == twice.texts and len(twice.texts) == 300


# tables


def accounts(rng, rows):
    return pd.DataFrame(
        {
            "account": [f"DE{number}" for number in rng.integers(10**9, 10**10, rows)],
            "town": rng.choice(["Ulm", "Bonn"], rows),
            "age": rng.integers(18, 90, rows),
        }
    )


def test_a_value_of_ones_own_in_an_otherwise_fresh_row_is_a_leak():
    rng = np.random.default_rng(0)
    train, held, fresh = (accounts(rng, rows) for rows in (800, 400, 800))
    assert audit.audit_files(fresh, train, held).passed
    leaky = fresh.assign(account=[*train["account"][:40], *fresh["account"][40:]])
    report = audit.audit_files(leaky, train, held)
    assert report.verdict == "fails" and [found.name for found in report.failed] == ["values of their own"]
    assert attack(report, "values").detail == "40 of 800 training, 0 of 400 held-out rows"


def test_columns_that_number_their_rows_or_recur_are_nobodys_own():
    rng = np.random.default_rng(0)
    numbered = [
        accounts(rng, 300).drop(columns="account").assign(id=np.arange(start, start + 300))
        for start in (0, 0, 300)
    ]
    pool = audit.make_pool(*numbered)
    assert not audit.unique_values(pool).has_some.any()


# numbers with which nothing can be computed


def numbers(seed):
    return pd.DataFrame(np.random.default_rng(seed).normal(size=(60, 2)), columns=["a", "b"])


@pytest.mark.parametrize("side", [0, 1, 2])
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e308, -1e301, "inf", "1e400", "-Infinity"])
def test_infinite_and_huge_numbers_are_refused_and_the_file_the_column_and_the_row_are_named(
    tmp_path, side, value
):
    rows = [numbers(seed).astype(object) for seed in range(3)]
    rows[side].loc[7:40, "a"] = value
    for name, frame in zip("sth", rows):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(
        DataError, match="column a: 34 of 60 values in .* are infinite or beyond .*the first in row 7 "
    ) as error:
        audit.audit_files(*(tmp_path / f"{name}.csv" for name in "sth"))
    assert f"{'sth'[side]}.csv" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match=f"values in {('synthetic', 'train', 'holdout')[side]} are"):
        audit.audit_files(*rows)


def test_the_same_infinite_file_three_times_is_one_line_on_the_command_line(tmp_path, capsys):
    from dpsynth import cli

    path = tmp_path / "inf.csv"
    texts = [f"row {i} of a film that was good" for i in range(100)]
    pd.DataFrame({"text": texts, "label": [0, 1] * 50, "x": [math.inf] * 50 + [1e308] * 50}).to_csv(
        path, index=False
    )
    assert cli.main(["audit", "--synthetic", str(path), "--train", str(path), "--holdout", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "column x" in said and str(path) in said


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.where(a.index > 3),
        lambda a: a * math.nan,
        lambda a: a * 0 + 5e-324,
        lambda a: a * 1e299,
        lambda a: a.astype(object).where(a.index > 3, "NA"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_gaps_and_tiny_numbers_are_audited(change):
    rows = [numbers(seed) for seed in range(3)]
    assert audit.audit_files(*(frame.assign(a=change(frame["a"])) for frame in rows)).verdict in (
        "passes",
        "cannot tell",
    )


def test_numbers_of_too_many_digits_are_identifiers():
    long = [f"90000000000000000{i:03d}" for i in range(60)]
    for values in (long, [int(number) for number in long]):
        rows = [numbers(seed).assign(a=values[20 * seed : 20 * seed + 20] * 3) for seed in range(3)]
        pool = audit.make_pool(*rows)
        assert (
            pool.categories == ("a",)
            and set(pool.real["a"]) == set(long[20:])
            and set(pool.synthetic["a"]) == set(long[:20])
        )
