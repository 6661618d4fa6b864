"""Records the weights of what lecture 04 asks: nine readers, three seeds of each choice of positions, and six of parity.

python -m data.recorded.lecture_04          # about three minutes; writes data/recorded/lecture_04.npz
"""

import numpy as np
import torch

from attention.experiments.long_context import POSITIONS, STEPS, train_parity, train_statement_reader
from utils import data

SEEDS = (0, 1, 2)


def row(model):
    """The parameters of a model as one row, float32."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().float().numpy()


def main():
    torch.set_num_threads(1)
    models = {f"{kind} {seed}": row(train_statement_reader(kind, seed)) for kind in POSITIONS for seed in SEEDS}
    models |= {f"{name} {seed}": row(train_parity(name, seed)) for name in STEPS for seed in SEEDS}
    path = data.FOLDER / "recorded" / "lecture_04.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, made_by=np.array("python -m data.recorded.lecture_04"), **models)


if __name__ == "__main__":
    main()
