"""A training run on a tiny random model; also as a program: `python tests/tiny_run.py FOLDER 'CHANGES AS JSON'
[--resume]`.
"""

import json, os, subprocess, sys
import torch
from tiny_models import tiny_parts, tiny_pipeline
from vader_nb.models.modelscope import ModelScope
from vader_nb.rewards.base import reward_from
from vader_nb.config import Config
from vader_nb.training.trainer import Trainer, fit
from vader_nb.zoo import random_net

PROMPTS, TESTS = (
    ['a panda riding a bike', 'a fox playing chess', 'a dog washing dishes'],
    ['a fox riding a bike', 'a panda washing dishes'],
)
TINY = dict(T=3, K=2, frames=4, height=16, width=16, rank=2, alpha=2.0, batch_size=2)


def tiny_model(seed=0):
    pipe = tiny_pipeline(seed)
    return ModelScope(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, (4, 16, 16))


def bright(chance=0.0):
    "Brightness, with a little chance from torch's global state, as a user's reward may have."
    return reward_from(lambda video, prompts: video.mean((1, 2, 3, 4)) * (1 + chance * torch.rand(())), 'bright')


class TinyScope(ModelScope):
    "The tiny model with settings of its own at full size, as a base model of the zoo."

    name = 'tiny'
    full = dict(frames=8, height=64, width=64, T=4, sampler='ddim', guidance=3.0, mixed_precision='fp32')


def load_tiny(scale='small', device=None, dtype=None, weights=True):
    if weights:
        return tiny_model()
    nets = [
        random_net(lambda: tiny_parts()[part], device or 'meta', dtype or torch.float32)
        for part in ('unet', 'vae', 'text_encoder')
    ]
    return TinyScope(*nets, None, tiny_parts()['scheduler'], (8, 64, 64)).remember(12, 32)


def load_bright(scale='small', device=None, dtype=None, weights=True):
    "Brightness as a reward of the zoo."
    return bright()


def tiny_fit(folder, model=None, reward=None, chance=0.0, changes=None, **how):
    return fit(
        model or tiny_model(),
        reward or bright(chance),
        PROMPTS,
        Config(**{**TINY, **(changes or {})}),
        folder,
        TESTS,
        **how,
    )


def tiny_trainer(folder, **changes):
    "A trainer that is ready to train."
    return Trainer(tiny_model(), bright(), PROMPTS, Config(**{**TINY, **changes}), folder).setup()


def two_processes(folder, changes):
    "The same run as a program of two processes, begun; wait for it and read its errors."
    port = str(29600 + os.getpid() % 300)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', port]
    program = [*launch, __file__, str(folder), json.dumps(changes)]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


if __name__ == '__main__':
    changes = json.loads(sys.argv[2])
    for record in tiny_fit(
        sys.argv[1], chance=changes.pop('chance', 0.0), changes=changes, resume='--resume' in sys.argv
    ):
        print(record['step'], flush=True)
