"""Trains, evaluates, samples, exports: python run.py --config=configs/tiny.py [--workdir=DIR] [--mode=...].

Any config field can be set on the command line: --config.train.steps=200 --config.seed=1
"""

from livo_jax.__main__ import main, start

__all__ = ["main", "start"]

if __name__ == "__main__":
    start()
