"""Small GGUF files of both families with random weights, and what such a file computes, slowly and in its own
conventions."""

import math

import gguf
import numpy as np

HIDDEN, HEADS, SHARED, FEED, HEAD = 64, 4, 2, 96, 16
LAYERS = {"gemma3": 6, "llama": 1}  # the sixth of a Gemma3 looks at the whole text


def gemma_pieces():
    """tokens, scores, types of a small SentencePiece vocabulary in the manner of Gemma 3's."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<start_of_turn>", "<end_of_turn>"]
    fixed = ["\n", "  ", "<b>", "<start_of_image>", "<end_of_image>", "<img>"]
    letters = [chr(c) for c in range(33, 127)] + ["▁", "é", "漢"]
    made = [
        "he",
        "ll",
        "hell",
        "hello",
        "▁hello",
        "wo",
        "wor",
        "worl",
        "world",
        "▁world",
        "th",
        "the",
        "▁the",
        "ro",
        "row",
        "rows",
        "▁rows",
        "in",
        "ing",
        "re",
        "rea",
        "read",
        "reading",
        "▁reading",
        "漢漢",
    ]
    tokens = [*special, *fixed, *(f"<0x{b:02X}>" for b in range(256)), *made, *letters]
    types = [3] * len(special) + [4] * len(fixed) + [6] * 256 + [1] * (len(made) + len(letters))
    scores = [-1000.0] * (len(special) + len(fixed) + 256) + [
        -float(i) for i in range(len(made) + len(letters))
    ]
    return tokens, scores, types


def byte_pieces():
    """tokens, types, merges of a small byte-level vocabulary."""
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    merges = [
        "t h",
        "th e",
        "h e",
        "l l",
        "he ll",
        "hell o",
        "Ġ hello",
        "w o",
        "wo r",
        "Ġ wor",
        "Ġwor l",
        "Ġ the",
        "r o",
        "ro w",
        "Ġ row",
        "Ċ Ċ",
        "Ġ Ġ",
    ]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *letters, *(merge.replace(" ", "") for merge in merges)]
    return tokens, [3] * 3 + [1] * (len(tokens) - 3), merges


def arrays(architecture, pieces, rng, tied=True):
    """Name -> float32 array of each tensor, as a GGUF file has them."""

    def matrix(rows, columns):
        return rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    def scale(size=HIDDEN):
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    found = {"token_embd.weight": matrix(pieces, HIDDEN), "output_norm.weight": scale()}
    if not tied:
        found["output.weight"] = matrix(pieces, HIDDEN)
    for i in range(LAYERS.get(architecture, 1)):
        block = {
            "attn_norm": scale(),
            "ffn_norm": scale(),
            "attn_q": matrix(HEADS * HEAD, HIDDEN),
            "attn_k": matrix(SHARED * HEAD, HIDDEN),
            "attn_v": matrix(SHARED * HEAD, HIDDEN),
            "attn_output": matrix(HIDDEN, HEADS * HEAD),
            "ffn_gate": matrix(FEED, HIDDEN),
            "ffn_up": matrix(FEED, HIDDEN),
            "ffn_down": matrix(HIDDEN, FEED),
        }
        if architecture == "gemma3":
            block |= {
                "post_attention_norm": scale(),
                "post_ffw_norm": scale(),
                "attn_q_norm": scale(HEAD),
                "attn_k_norm": scale(HEAD),
            }
        found |= {f"blk.{i}.{name}.weight": array for name, array in block.items()}
    return found


def write(
    path,
    architecture="gemma3",
    kind="llama",
    stored="F32",
    tied=True,
    seed=0,
    stretch=None,
    change=lambda tensors: tensors,
    facts=(),
):
    """Write a small GGUF file; `change` may alter its tensors, `facts` are (key, value) pairs of texts that
    it states too."""
    writer = gguf.GGUFWriter(path, architecture)
    (
        writer.add_block_count(LAYERS.get(architecture, 1)),
        writer.add_embedding_length(HIDDEN),
        writer.add_feed_forward_length(FEED),
    )
    writer.add_head_count(HEADS), writer.add_head_count_kv(SHARED)
    writer.add_layer_norm_rms_eps(1e-6 if architecture == "gemma3" else 1e-5)
    writer.add_rope_freq_base(1e6 if architecture == "gemma3" else 5e5)
    writer.add_name("Small test"), writer.add_license("apache-2.0")
    if architecture == "gemma3":
        writer.add_key_length(HEAD), writer.add_value_length(HEAD), writer.add_sliding_window(8)
    writer.add_tokenizer_model(kind)
    if kind == "llama":
        tokens, scores, types = gemma_pieces()
        if architecture == "llama":
            tokens[1:3] = ["</s>", "<s>"]
        writer.add_token_scores(scores), writer.add_add_space_prefix(False)
        (
            writer.add_bos_token_id(2),
            writer.add_eos_token_id(1),
            writer.add_unk_token_id(3),
            writer.add_pad_token_id(0),
        )
    else:
        tokens, types, merges = byte_pieces()
        writer.add_token_merges(merges), writer.add_tokenizer_pre("smollm")
        writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_pad_token_id(2)
    writer.add_token_list(tokens), writer.add_token_types(types)
    for key, value in facts:
        writer.add_string(key, value)
    tensors = arrays(architecture, len(tokens), np.random.default_rng(seed), tied)
    if stretch is not None:
        tensors["rope_freqs.weight"] = stretch.astype(np.float32)
    for name, array in change(tensors).items():
        kept = array.ndim == 1 or stored == "F32"
        kind_of = gguf.GGMLQuantizationType.F32 if kept else gguf.GGMLQuantizationType[stored]
        writer.add_tensor(
            name, array if kept else gguf.quantize(array, kind_of), raw_dtype=None if kept else kind_of
        )
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path


class Slow:
    """The model in a GGUF file, in plain numpy: float64, one text at a time, tensors as they lie in the
    file."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.w = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        self.family = reader.fields["general.architecture"].contents()
        self.facts = {
            k.removeprefix(f"{self.family}."): f.contents()
            for k, f in reader.fields.items()
            if k.startswith(f"{self.family}.")
        }

    def _norm(self, x, name):
        return (
            x
            / np.sqrt((x**2).mean(-1, keepdims=True) + self.facts["attention.layer_norm_rms_epsilon"])
            * self.w[name]
        )

    def _turn(self, x, base):
        """x[length, heads, d] rotated: halves with each other in Gemma3, neighbours with each other in the
        permuted rows of Llama."""
        d = x.shape[-1]
        angle = (
            np.arange(len(x))[:, None]
            * base ** (-np.arange(0, d, 2) / d)
            / self.w.get("rope_freqs.weight", 1.0)
        )
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = (
            (x[..., : d // 2], x[..., d // 2 :]) if self.family == "gemma3" else (x[..., ::2], x[..., 1::2])
        )
        out = np.empty_like(x)
        first, second = (
            (out[..., : d // 2], out[..., d // 2 :])
            if self.family == "gemma3"
            else (out[..., ::2], out[..., 1::2])
        )
        first[...], second[...] = a * cos - b * sin, b * cos + a * sin
        return out

    def _attention(self, x, i):
        at, gemma = f"blk.{i}.", self.family == "gemma3"
        heads, shared = self.facts["attention.head_count"], self.facts["attention.head_count_kv"]
        q, k, v = (
            (x @ self.w[f"{at}attn_{n}.weight"].T).reshape(len(x), h, -1)
            for n, h in (("q", heads), ("k", shared), ("v", shared))
        )
        if gemma:
            q, k = self._norm(q, f"{at}attn_q_norm.weight"), self._norm(k, f"{at}attn_k_norm.weight")
        local = gemma and (i + 1) % 6
        base = 1e4 if local else self.facts["rope.freq_base"]
        q, k = self._turn(q, base), self._turn(k, base)
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (distance >= 0) & (distance < (self.facts["attention.sliding_window"] if local else len(x)))
        out = np.empty_like(q)
        for head in range(heads):
            other = head * shared // heads
            scores = np.where(seen, q[:, head] @ k[:, other].T / math.sqrt(q.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, other]
        return out.reshape(len(x), -1) @ self.w[f"{at}attn_output.weight"].T

    def _feed(self, x, i):
        gate, up = x @ self.w[f"blk.{i}.ffn_gate.weight"].T, x @ self.w[f"blk.{i}.ffn_up.weight"].T
        if self.family == "gemma3":
            gate = gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
        else:
            gate = gate / (1 + np.exp(-gate))
        return gate * up @ self.w[f"blk.{i}.ffn_down.weight"].T

    def logits(self, ids):
        """float64[length, pieces] of a list of ids."""
        gemma = self.family == "gemma3"
        x = self.w["token_embd.weight"][ids] * (math.sqrt(self.facts["embedding_length"]) if gemma else 1)
        for i in range(self.facts["block_count"]):
            more = self._attention(self._norm(x, f"blk.{i}.attn_norm.weight"), i)
            x = x + (self._norm(more, f"blk.{i}.post_attention_norm.weight") if gemma else more)
            more = self._feed(self._norm(x, f"blk.{i}.ffn_norm.weight"), i)
            x = x + (self._norm(more, f"blk.{i}.post_ffw_norm.weight") if gemma else more)
        return (
            self._norm(x, "output_norm.weight") @ self.w.get("output.weight", self.w["token_embd.weight"]).T
        )
