"""attention/: modules made of export cells, the imports they need, experiments apart, and a public face."""

import ast
import importlib
import importlib.util
import subprocess
import sys

import pytest

import attention
from tests.authoring.courses import SAMPLE
from utils.authoring import module
from utils.authoring import source as lecture_source
from utils.paths import ROOT

# The public table of the course: triples, then the modules and helpers that others rely on.
TRIPLES = {
    "fundamentals": ["attention"],
    "multi_head": ["multi_head_attention"],
    "rotary": ["apply_rope"],
    "long_context": ["softmax_rows", "matmul"],
    "kv_cache": ["decode_attention", "paged_decode_attention"],
    "flash": ["flash_attention", "flash_attention_backward"],
    "sparse": ["block_sparse_attention"],
    "grouped_query": ["grouped_query_attention"],
    "latent": ["latent_decode_attention"],
    "linear": ["linear_attention", "selective_scan"],
    "differential": ["differential_attention"],
    "mixture": ["mixture_attention"],
    "beyond": [],
}
HELPERS = {
    "fundamentals": "softmax attention_weights causal_mask padding_mask AdditiveAttention Seq2Seq",
    "multi_head": "split_heads merge_heads MultiHeadAttention TransformerConfig TransformerLM",
    "rotary": "rope_frequencies alibi_slopes",
    "long_context": "attention_share kv_cache_bytes prompt_cost place_needle effective_length",
    "kv_cache": "KVCache RingKVCache PagePool PagedKVCache QuantizedKVCache keep_window keep_sinks keep_random"
    " keep_heavy keep_voted evict generate",
    "flash": "online_softmax merge_by_lse ring_attention_numpy ring_attention",
    "sparse": "sliding_window_attention_cuda sliding_window_mask longformer_mask bigbird_mask reachable select_blocks"
    " compressed_attention longformer_attention native_sparse_attention LightningIndexer",
    "grouped_query": "GroupedQueryAttention merge_kv_heads aligned_merge cache_per_device",
    "latent": "MultiHeadLatentAttention LatentCache joint_latent",
    "linear": "chunked_attention memory_step scan favor_features stream wkv long_convolution Mamba",
    "differential": "DifferentialAttention lambda_init",
    "mixture": "MixtureOfHeadsAttention RoutedAttention top_k_gates load_balancing_loss router_z_loss balancing_step"
    " kept_slots",
    "beyond": "segment_softmax graph_attention SetBlock InducedSetAttention patchify memory_by_gradient",
}


def lecture(*exports, others=(), **header):
    """A lecture with some export cells and some other ones."""
    cells = [lecture_source.Cell("code", source, 1, ("export",)) for source in exports]
    cells += [lecture_source.Cell("code", source, 1) for source in others]
    return lecture_source.Lecture(SAMPLE, "Exports", {"module": "exports"} | header, {}, cells, [])


def text(*exports, others=(), **header):
    return module.texts(lecture(*exports, others=others, **header))["exports.py"]


def head(*exports, others=()):
    """What stands between the docstring and the first export."""
    return text(*exports, others=others).split('code."""\n\n')[1].split("\n\n__all__")[0]


# ---- The course's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIPLES)
def test_the_public_names_are_those_of_the_table(name):
    triples = [f"{triple}_{kind}" for triple in TRIPLES[name] for kind in ("numpy", "torch", "cuda")]
    own = importlib.import_module(f"attention.{name}")
    assert sorted(own.__all__) == sorted(triples + HELPERS[name].split())
    assert all(attention.HOME[public] == name for public in own.__all__)


def test_the_public_face_has_nothing_else():
    assert set(attention.HOME.values()) == set(TRIPLES)
    for public, home in attention.HOME.items():
        assert public in importlib.import_module(f"attention.{home}").__all__


def test_a_public_name_is_the_module_s_own_also_when_that_is_replaced(monkeypatch):
    from attention import attention_numpy, fundamentals

    assert attention_numpy is fundamentals.attention_numpy
    monkeypatch.setattr(fundamentals, "attention_numpy", len)
    assert attention.attention_numpy is len


def test_a_name_that_is_not_public_is_named():
    with pytest.raises(AttributeError, match="attention has no public name 'attend'"):
        attention.attend  # noqa: B018
    with pytest.raises(ImportError, match="attend"):
        from attention import attend  # noqa: F401


def test_importing_the_face_imports_no_lecture():
    program = "import sys, attention; attention.__all__; print([m for m in sys.modules if m[:10] == 'attention.'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_no_mechanism_imports_an_experiment():
    for path in (ROOT / "attention").glob("*.py"):
        assert "attention.experiments" not in path.read_text(encoding="utf-8"), path.name


# ---- How a module is made -----------------------------------------------------------------------------------------


def test_the_module_holds_the_exports_with_their_solutions_and_imports_on_top(course):
    path = course / "attention" / "sample.py"
    spec = importlib.util.spec_from_file_location("sample", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.mean([1, 2, 6]) == 3 and "x[i] + 1.0f" in made.KERNEL and made.__all__ == ["mean", "KERNEL"]
    written = path.read_text(encoding="utf-8")
    assert written.startswith("# Generated from solutions/01_sample.py") and "SOLUTION" not in written
    assert "1. A sample lecture" in made.__doc__
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", path], check=True)


def test_imports_are_found_anywhere_in_the_source_merged_and_sorted():
    others = ("import torch\nfrom utils import data", "from torch import nn\nimport os", "import numpy as np, math")
    exports = ("x = math.pi * nn.GELU", "from utils import cuda\n\ny = torch.ones(1), data, cuda")
    wanted = "import math\n\nimport torch\nfrom torch import nn\n\nfrom utils import cuda, data"
    assert head(*exports, others=others) == wanted


def test_an_import_that_no_export_uses_stays_away():
    assert "import" not in text("x = 1", others=["import torch"])


def test_a_name_that_a_function_binds_itself_needs_no_import():
    assert "import" not in text("def f(data):\n    return [torch for torch in data]", others=["import torch, data"])


def test_a_name_in_an_inner_scope_is_found():
    export = "class A:\n    def f(self):\n        return lambda x: torch.exp(x)"
    assert head(export, others=["import torch"]) == "import torch"


def test_the_lecture_s_own_module_is_no_import():
    assert "import" not in text("def f():\n    return 1\n\nx = f()", others=["from attention.exports import f"])


def test_long_imports_are_wrapped():
    names = [f"a_rather_long_name_{i}" for i in range(8)]
    made = head(f"x = {', '.join(names)}", others=[f"from numpy import {', '.join(names)}"])
    assert max(map(len, made.splitlines())) < 120 and len(ast.parse(made).body[0].names) == 8


@pytest.mark.parametrize(
    ("exports", "others", "header", "message"),
    [
        (["def f(x):\n    return x * scale"], [], {}, "use 'scale', which none of them defines and no cell imports"),
        (["import math"], [], {}, "an export cell of imports only"),
        (["x = f(1)"], ["from a import f", "from b import f"], {}, "'f' is imported from two places"),
        (["x = 1"], [], {"public": ["y"]}, "the header names 'y', which no export cell defines"),
        (["x = 1"], [], {"experiments": ["y"]}, "the header names 'y', which no export cell defines"),
        (["x = 1\ny = 2"], [], {"public": ["x"], "experiments": ["y"]}, "y is an experiment and x is public"),
        (["x = 1", "y = x"], [], {"experiments": ["x"]}, "an export uses 'x', which is an experiment"),
        (["%time f()"], [], {}, "not plain Python"),
    ],
)
def test_exports_that_make_no_module_are_refused(exports, others, header, message):
    with pytest.raises(lecture_source.SourceError, match=message):
        module.texts(lecture(*exports, others=others, **header))


def test_experiments_stand_apart_and_import_the_mechanisms():
    made = module.texts(
        lecture("def f():\n    return 1", "N = 2\n\ndef train():\n    return f() * N", experiments=["train"])
    )
    assert "train" not in made["exports.py"]
    assert "from attention.exports import f\n" in made["experiments/exports.py"]
    assert '__all__ = ["train"]' in made["experiments/exports.py"]


def test_a_public_name_has_one_home():
    twice = [lecture("x = 1", public=["x"]), lecture("x = 2", public=["x"])]
    with pytest.raises(lecture_source.SourceError, match="the public name 'x' is that of exports, too"):
        module.face(twice)
