"""Video Diffusion Alignment via Reward Gradients.

The front door: `from vader_nb import Config, fit, sample, load_model, load_reward`.
"""
__version__ = "0.1.0"

import os as _os
from importlib import import_module as _import_module

# GNU OpenMP's idle threads spin for long, and on a busy machine they spin on each other: sampling takes 60 times as
# long. A short spin costs a quiet machine nothing. It must be set before torch loads; a user's own setting wins.
if not {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & _os.environ.keys():
    _os.environ['GOMP_SPINCOUNT'] = '1000'

_front_door = {
    'Config': 'config',
    'fit': 'training.trainer',
    'sample': 'diffusion.rollout',
    'load_model': 'zoo',
    'load_reward': 'zoo',
}
__all__ = list(_front_door)


def __getattr__(name):
    "The names of the front door, imported when they are first used: `import vader_nb` alone loads no torch."
    if name not in _front_door:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(_import_module(f'{__name__}.{_front_door[name]}'), name)


def __dir__(): return sorted([*globals(), *_front_door])
