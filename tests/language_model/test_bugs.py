"""Planted mistakes are seen, with the loss each costs; and what is printed of them does not hang on a rounding."""

import json
import os
import subprocess
import sys

import pytest

from attention.fundamentals import attention_torch
from utils import language_model
from utils.language_model import BUGS, LanguageModel
from utils.paths import ROOT

RIGHT = 2.775
# The loss that each mistake leads to, in nats a token.
LOSSES = {
    "no scale": 7.40,
    "scale 1/d": 7.84,
    "scale 1/sqrt(d_model)": 5.77,
    "softmax over the queries": 12.09,
    "no mask": 1.75,
    "mask of -1": 1.72,
    "mask of -10": 2.80,
    "one future token seen": 1.72,
    "own token not seen": 2.91,
    "mask at the top left": 6.00,
    "repeat, not repeat_interleave": 13.33,
    "wrong pairs in RoPE": 6.45,
    "RoPE with base 10,000": 2.88,
    "no positions": 5.96,
    "positions twice as large": 3.17,
    "positions restarted": 4.33,
    "positions one too early": 2.79,
}
SAME_TEXT = [
    "mask of -10",
    "own token not seen",
    "RoPE with base 10,000",
    "positions twice as large",
    "positions one too early",
]
LEAST_LEAD = 0.01  # of a written token over the next likeliest; rounding makes 1e-4
OTHER_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "OMP_NUM_THREADS": "2",
}
COMPARED_AGAIN = ["no scale", "mask at the top left", "repeat, not repeat_interleave", "positions restarted"]


@pytest.fixture(scope="module")
def found(smollm):
    """(comparison, smallest lead of a written token) for each mistake, and for none."""
    comparisons = {}
    with pytest.MonkeyPatch.context() as patch:
        logits, leads = LanguageModel.logits, []

        def spy(self, x):
            scores = logits(self, x)
            if x.shape[1] == 1:  # writing: one token at a time
                best = scores[0, 0].topk(2).values
                leads.append(float(best[0] - best[1]))
            return scores

        patch.setattr(LanguageModel, "logits", spy)
        language_model.compare(smollm)  # the right one is read once and kept
        for name, parts in {"none": {}, **BUGS}.items():
            leads.clear()
            comparisons[name] = language_model.compare(smollm, **parts), min(leads)
    return comparisons


def test_every_mistake_is_listed_here():
    assert list(LOSSES) == list(BUGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_mistake_is_seen_with_the_loss_it_costs(found, name):
    comparison, _ = found[name]
    assert not comparison.same and comparison.difference > 1
    assert comparison.loss == pytest.approx(LOSSES[name], abs=0.011)
    assert comparison.right_loss == pytest.approx(RIGHT, abs=0.001)


@pytest.mark.slow
def test_without_a_mistake_nothing_changes(found):
    comparison, _ = found["none"]
    assert comparison.same and comparison.loss == comparison.right_loss
    assert comparison.text == comparison.right_text == " Berlin. The capital of the United States"


@pytest.mark.slow
def test_what_is_written_shows_some_mistakes_and_not_others(found):
    unseen = [name for name in BUGS if found[name][0].text == found["none"][0].text]
    assert unseen == SAME_TEXT


@pytest.mark.slow
def test_a_loss_near_the_right_one_proves_nothing(found):
    near = [name for name in BUGS if abs(found[name][0].loss - RIGHT) < 0.03]
    assert near == ["mask of -10", "positions one too early"]
    better = [name for name in BUGS if found[name][0].loss < RIGHT - 0.5]
    assert better == ["no mask", "mask of -1", "one future token seen"]


@pytest.mark.slow
def test_no_written_token_hangs_on_a_rounding(found):
    assert min(lead for _, lead in found.values()) > LEAST_LEAD


@pytest.mark.slow
def test_two_threads_and_a_processor_without_avx_512_tell_the_same(found):
    code = (
        "import json, sys; from utils import language_model as lm; model = lm.load()\n"
        "print(json.dumps([str(lm.compare(model, **lm.BUGS[name])) for name in json.loads(sys.argv[1])]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(COMPARED_AGAIN)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | OTHER_PROCESSOR,
    )
    assert json.loads(done.stdout) == [str(found[name][0]) for name in COMPARED_AGAIN]


# --- what a learner sees ---------------------------------------------------------------------------------------------


def test_a_right_answer_stays_in_the_model(smollm, capsys):
    changed = language_model.put_in(smollm, attention=attention_torch)
    assert changed.parts.attention is attention_torch
    assert capsys.readouterr().out == (
        "logits: off by less than 0.001\n"
        "loss:   2.78 (should be 2.78)\n"
        "text:   ' Berlin. The capital of the United States'\n"
        "        (the same as it should)\n"
        "It speaks with your attention.\n"
    )


def test_a_wrong_answer_is_told_what_it_costs_and_does_not_stay(smollm, capsys):
    changed = language_model.put_in(smollm, **BUGS["no scale"])
    assert changed is smollm
    said = capsys.readouterr().out
    assert said.startswith("logits: off by more than 10\nloss:   7.4 (should be 2.78)\n")
    assert said.endswith("With your attention it is another model.\n")


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (None, "attention must be a function"),
        (lambda q, k, v: v, "unexpected keyword argument 'causal'"),
        (lambda q, k, v, causal: None, "attention must return a tensor of shape (1, 9, 64, 64), got NoneType"),
        (
            lambda q, k, v, causal: v[:, :, :1],
            "attention must return a tensor of shape (1, 9, 64, 64), got (1, 9, 1, 64)",
        ),
        (lambda q, k, v, causal: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_answer_that_cannot_run_gets_a_sentence(smollm, capsys, answer, sentence):
    assert language_model.put_in(smollm, attention=answer) is smollm
    said = capsys.readouterr().out
    assert said.startswith("The model could not run with your attention: ") and sentence in said


def test_an_answer_of_nan_is_wrong_and_can_be_told():
    found = language_model.bugs.Comparison(float("nan"), float("nan") < 1, float("nan"), 2.775, "x", "y")
    assert not found.same and str(found).startswith("logits: off by nan\nloss:   nan")


def test_an_answer_that_writes_into_its_arguments_is_seen(smollm):
    def careless(q, k, v, causal):
        out = attention_torch(q, k, v, causal=causal)
        q.zero_(), k.zero_(), v.zero_()
        return out

    assert language_model.compare(smollm, attention=careless).same  # the model has given it copies


def test_without_the_model_nothing_is_said(capsys):
    assert language_model.put_in(None, attention=max) is None
    assert capsys.readouterr().out == ""
