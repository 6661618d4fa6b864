"""The training loop trains, stops where it should, and starts from the same weights on every system."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from utils import training


class Own(nn.Module):
    """Parameters of its own, weights (d_in, d_out), beside a layer of each kind."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(400, 30))
        self.gain = nn.Parameter(torch.ones(30))
        self.start = nn.Parameter(torch.tensor([0.8]))
        self.linear = nn.Linear(900, 1)
        self.gru = nn.GRU(5, 100)
        self.embedding = nn.Embedding(50, 40, padding_idx=0)
        self.norm = nn.LayerNorm(30)


def line(rng, slope=3.0):
    """Batches of a straight line."""
    while True:
        x = torch.from_numpy(rng.standard_normal((16, 1)))
        yield x, slope * x


def squared_error(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def linear():
    return training.initialise(nn.Linear(1, 1).double(), 0)


def test_first_weights_do_not_depend_on_the_generator_of_torch():
    weights = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        weights.append(training.initialise(Own(), seed=7).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_seed_draws_other_weights():
    assert not torch.equal(training.initialise(Own(), 0).w, training.initialise(Own(), 1).w)


def test_the_scale_is_the_usual_one_and_constants_stay():
    module = training.initialise(Own(), 0)
    for parameter, bound in ((module.w, 1 / 20), (module.linear.weight, 1 / 30), (module.gru.weight_ih_l0, 1 / 10)):
        assert 0.97 * bound < parameter.abs().max() <= bound
    assert abs(module.embedding.weight[1:].std() - 1) < 0.05 and (module.embedding.weight[0] == 0).all()
    assert (module.gain == 1).all() and (module.norm.weight == 1).all() and (module.norm.bias == 0).all()
    assert module.start.item() == pytest.approx(0.8)


def test_fit_finds_the_slope_and_records_every_step():
    model = linear()
    history = training.fit(model, line(np.random.default_rng(0)), squared_error, steps=300, lr=0.05)
    assert len(history.losses) == 300 and history.losses[-1] < 1e-3 < history.losses[0]
    assert abs(model.weight.item() - 3) < 0.05
    assert history.steps == history.metrics == []


def test_fit_repeats_exactly():
    losses = [training.fit(linear(), line(np.random.default_rng(0)), squared_error, 20).losses for _ in range(2)]
    assert losses[0] == losses[1]


def test_evaluation_happens_every_so_often_and_after_the_last_step_without_gradients():
    states = []

    def evaluate(model):
        states.append((model.training, torch.is_grad_enabled()))
        return 0.0

    history = training.fit(linear(), line(np.random.default_rng(0)), squared_error, 25, evaluate=evaluate, every=10)
    assert history.steps == [10, 20, 25] and states == 3 * [(False, False)]


def test_training_stops_when_the_metric_is_reached():
    model = linear()

    def closeness(model):
        return -abs(model.weight.item() - 3)

    history = training.fit(
        model, line(np.random.default_rng(0)), squared_error, 1000, lr=0.05, evaluate=closeness, every=10, stop_at=-0.1
    )
    assert history.metrics[-1] >= -0.1 > history.metrics[-2]
    assert len(history.losses) == history.steps[-1] < 1000 and not model.training


def test_one_huge_batch_does_not_throw_the_model_away():
    model = nn.Linear(1, 1).double()
    before = model.weight.item()
    training.fit(model, line(np.random.default_rng(0), slope=1e12), squared_error, 1, lr=0.01)
    assert abs(model.weight.item() - before) < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps and every must be at least 1, not 0 and 50"),
        ({"steps": 5, "stop_at": 0.9}, "stop_at needs evaluate"),
        ({"steps": 5, "batches": []}, "batches ended after 0 of 5 steps"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    given = {"batches": line(np.random.default_rng(0))} | arguments
    with pytest.raises(ValueError, match=message):
        training.fit(linear(), loss=squared_error, **given)


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(RuntimeError, match="the loss is nan at step 1: a smaller lr than 0.003 may help"):
        training.fit(linear(), line(np.random.default_rng(0), slope=float("nan")), squared_error, 3)


def test_the_progress_bar_can_be_switched_off(pytestconfig, capfd, monkeypatch):
    code = (
        "import torch; from torch import nn; from utils import training;"
        "training.fit(nn.Linear(1, 1), [torch.ones(2, 1)] * 3, lambda m, x: m(x).mean() ** 2, 3)"
    )
    monkeypatch.setenv("TQDM_DISABLE", "1")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pytestconfig.rootpath)
    assert capfd.readouterr() == ("", "")


def test_windows_are_stretches_of_the_ids_and_the_same_for_a_seed():
    ids = torch.arange(100)
    first, second = (next(training.windows(ids, 7, 5, seed)) for seed in (3, 3))
    assert first.shape == (5, 8)
    assert torch.equal(first, second)
    assert torch.equal(first - first[:, :1], torch.arange(8).expand(5, 8))
    seen = torch.cat([batch for batch, _ in zip(training.windows(ids, 7, 50, 0), range(20))])
    assert (seen.min().item(), seen.max().item()) == (0, 98)


@pytest.mark.parametrize("length", [0, 99, 500])
def test_windows_longer_than_the_text_are_refused(length):
    with pytest.raises(ValueError, match=f"length must be from 1 to 98 for 100 ids, not {length}"):
        next(training.windows(torch.arange(100), length, 2, 0))


def test_next_token_loss_of_a_model_that_knows_nothing_is_the_log_of_the_vocabulary():
    ids = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert training.next_token_loss(lambda x: torch.zeros(*x.shape, 8), ids).item() == pytest.approx(np.log(8))
    sure = training.next_token_loss(lambda x: 50.0 * nn.functional.one_hot(ids[:, 1:], 4).double(), ids)
    assert sure.item() == pytest.approx(0.0, abs=1e-12)
