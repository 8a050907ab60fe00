"""What a folder for transformers computes, from its files alone: slowly, in numpy, as that library says."""

import json
import math
import pathlib

import numpy as np
from safetensors.numpy import load_file


def turned(x, rope, d):
    """x[length, heads, d] rotated, the halves of each head with each other."""
    frequency = rope["rope_theta"] ** (-np.arange(0, d, 2) / d)
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * ((1 - smooth) / rope["factor"] + smooth)
    angle = np.arange(len(x))[:, None] * frequency
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class SlowSafetensors:
    """The model in a folder with config.json and model.safetensors, float64."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.w = {
            name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()
        }
        self.gemma = self.config["model_type"] == "gemma3_text"

    def _norm(self, x, name):
        scale = self.w[name] + 1 if self.gemma else self.w[name]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * scale

    def _attention(self, x, i):
        at, config = f"model.layers.{i}.self_attn.", self.config
        d, heads, shared = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
        q, k, v = ((x @ self.w[f"{at}{n}_proj.weight"].T).reshape(len(x), -1, d) for n in "qkv")
        kind = config["layer_types"][i] if self.gemma else "full_attention"
        if self.gemma:
            q, k = self._norm(q, f"{at}q_norm.weight"), self._norm(k, f"{at}k_norm.weight")
        rope = config["rope_parameters"][kind] if self.gemma else config["rope_parameters"]
        q, k = turned(q, rope, d), turned(k, rope, d)
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (distance >= 0) & (
            distance < (config["sliding_window"] if kind == "sliding_attention" else len(x))
        )
        out = np.empty_like(q)
        for head in range(heads):
            other = head // (heads // shared)
            scores = (
                q[:, head] @ k[:, other].T / math.sqrt(config["query_pre_attn_scalar"] if self.gemma else d)
            )
            weights = np.exp(np.where(seen, scores - scores.max(-1, keepdims=True), -np.inf))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, other]
        return out.reshape(len(x), -1) @ self.w[f"{at}o_proj.weight"].T

    def _feed(self, x, i):
        at = f"model.layers.{i}.mlp."
        gate, up = x @ self.w[f"{at}gate_proj.weight"].T, x @ self.w[f"{at}up_proj.weight"].T
        if self.gemma:
            gate = gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
        else:
            gate = gate / (1 + np.exp(-gate))
        return gate * up @ self.w[f"{at}down_proj.weight"].T

    def logits(self, ids):
        """float64[length, pieces] of a list of ids."""
        config, gemma = self.config, self.gemma
        x = self.w["model.embed_tokens.weight"][ids] * (math.sqrt(config["hidden_size"]) if gemma else 1)
        for i in range(config["num_hidden_layers"]):
            at = f"model.layers.{i}."
            more = self._attention(self._norm(x, f"{at}input_layernorm.weight"), i)
            x = x + (self._norm(more, f"{at}post_attention_layernorm.weight") if gemma else more)
            before = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
            more = self._feed(self._norm(x, f"{at}{before}.weight"), i)
            x = x + (self._norm(more, f"{at}post_feedforward_layernorm.weight") if gemma else more)
        head = self.w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
        return self._norm(x, "model.norm.weight") @ head.T
