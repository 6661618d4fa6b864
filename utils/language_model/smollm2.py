"""SmolLM2-135M-Instruct out of its GGUF file: weights, tokenizer and the format of a chat."""

import math
import weakref

import numpy as np
import torch

from utils.language_model import files
from utils.language_model.gguf import GGUF
from utils.language_model.model import Attention, Block, Config, FeedForward, LanguageModel, RMSNorm

CONTROL = 3  # the type of a token that is no text, such as <|im_end|>


_loaded = weakref.WeakValueDictionary()


def load():
    """The model as a LanguageModel, in float32; or None, after a sentence that says how to get it.

    It is loaded once, for as long as anybody has it: smollm = None gives 540 MB back. ValueError where the file holds
    other bytes than the course was tested with.
    """
    problem = files.problem()
    if problem:
        print(problem)
        return None
    model = _loaded.get("smollm2")
    if model is None:
        model = _loaded["smollm2"] = _load(files.path())
    return model


def _load(path):
    files.check_content(path)
    file = GGUF(path)
    says = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
    config = Config(
        says["vocab_size"],
        says["embedding_length"],
        says["attention.head_count"],
        says["attention.head_count_kv"],
        says["block_count"],
        says["feed_forward_length"],
        says["rope.freq_base"],
        says["attention.layer_norm_rms_epsilon"],
    )

    # One piece: it can be given back whole. Of torch, because NumPy asks for huge pages, slow in virtual machines.
    store = torch.empty(sum(map(math.prod, file.shapes.values()))).numpy()
    filled = 0

    def weight(name, n_heads=None):
        """A matrix as (d_in, d_out), a view of the (d_out, d_in) of the file."""
        nonlocal filled
        size = math.prod(file.shapes[name + ".weight"])
        rows = file.tensor(name + ".weight", out=store[filled : filled + size])
        if n_heads:
            rows[:] = half_split(rows, n_heads)
        filled += size
        return torch.from_numpy(rows.T)

    def norm(name):
        return RMSNorm(weight(name), config.epsilon)

    blocks = []
    for at in (f"blk.{layer}." for layer in range(config.n_layers)):
        attention = Attention(
            config,
            weight(at + "attn_q", config.n_heads),
            weight(at + "attn_k", config.n_kv_heads),
            weight(at + "attn_v"),
            weight(at + "attn_output"),
        )
        feed_forward = FeedForward(weight(at + "ffn_gate"), weight(at + "ffn_up"), weight(at + "ffn_down"))
        blocks.append(Block(norm(at + "attn_norm"), attention, norm(at + "ffn_norm"), feed_forward))
    return LanguageModel(config, Tokenizer(file.metadata), weight("token_embd").T, blocks, norm("output_norm"))


def half_split(rows, n_heads):
    """Rows of a projection in the order of Llama's own code: llama.cpp stores the pairs of RoPE side by side."""
    pairs = rows.reshape(n_heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


class Tokenizer:
    """Byte-pair encoding: digits one by one, everything else merged as the file says. Nothing is put in front.

    end: the id of the token that ends an answer.
    """

    def __init__(self, metadata):
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        self._chat, self.end = metadata["tokenizer.chat_template"], metadata["tokenizer.ggml.eos_token_id"]
        self._made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        self._made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self._made.decoder = decoders.ByteLevel()
        self._made.add_special_tokens(
            [AddedToken(token, special=True) for token, kind in zip(tokens, kinds) if kind == CONTROL]
        )

    def encode(self, text):
        """A list of ids. ValueError for what is no string."""
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, got {type(text).__name__}")
        return self._made.encode(text).ids

    def decode(self, ids):
        """The text of a list of ids. A token that is only a part of a letter becomes the sign for that."""
        return self._made.decode(ids, skip_special_tokens=False)

    def chat(self, question):
        """The text after which the model answers a question, as it was tuned to."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self._chat)
        return template.render(messages=[{"role": "user", "content": question}], add_generation_prompt=True)
