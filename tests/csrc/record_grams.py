"""Writes recorded_grams.npz: Grams of a learned image compression model in training, for the tests of the refresh.

    python examples/train_lic.py --model bmshj2018-hyperprior --quality 3 --steps 60 --batch-size 4 --patch-size 128 \\
        --save runs/grams
    python tests/csrc/record_grams.py runs/grams/checkpoint.pth.tar
"""

import sys
from pathlib import Path

import numpy as np
import torch

# (size, how many): the first ones found, in the order of the parameters
WANTED = {3: 1, 5: 2, 128: 2, 192: 1}


def main(checkpoint: str) -> None:
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    left, found = dict(WANTED), {}
    for number, state in saved["optimizer"]["state"].items():
        for key, value in state.items():
            if key.startswith("gram_") and left.get(len(value), 0) > 0:
                left[len(value)] -= 1
                found[f"parameter{number}.{key}"] = value.float().numpy()
    target = Path(__file__).with_name("recorded_grams.npz")
    np.savez_compressed(target, **found)
    for name, gram in found.items():
        values = np.linalg.eigvalsh(gram.astype(np.float64))
        print(f"{name}: {gram.shape}, eigenvalues {values[-1]:.3g} .. {values[0]:.3g}")
    print(f"{target.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
