"""Records the weights of six of the nine readers of lecture 04: seeds 1 and 2 of each choice of positions.

python -m data.recorded.lecture_04          # about two minutes; writes data/recorded/lecture_04.npz
"""

import numpy as np
import torch

from attention.experiments.long_context import statement_reader, train_reader
from attention.multi_head import Positions
from attention.rotary import ALiBi, Rotary
from utils import data, training

SEEDS, STEPS = (1, 2), 400
POSITIONS = {"RoPE": lambda: Rotary(16), "ALiBi": lambda: ALiBi(2), "no positions": Positions}


def weights(kind, seed):
    """The parameters of one trained reader as one row, float32."""
    model = train_reader(training.initialise(statement_reader(POSITIONS[kind]()), seed), seed, STEPS)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().float().numpy()


def main():
    torch.set_num_threads(1)
    readers = {f"{kind} {seed}": weights(kind, seed) for kind in POSITIONS for seed in SEEDS}
    path = data.FOLDER / "recorded" / "lecture_04.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, made_by=np.array("python -m data.recorded.lecture_04"), **readers)


if __name__ == "__main__":
    main()
