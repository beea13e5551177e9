"A training run on a tiny random model, as a program: `python tests/tiny_run.py FOLDER [CONFIG AS JSON] [--resume]`."
import json, os, sys
import torch
from tiny_models import tiny_pipeline
from vader_nb.models.modelscope import ModelScope
from vader_nb.reward import reward_from
from vader_nb.train import Config, fit

PROMPTS, TESTS = ['a panda riding a bike', 'a fox playing chess', 'a dog washing dishes'], ['a fox riding a bike', 'a panda washing dishes']
SIZE = dict(T=3, frames=4, height=16, width=16, rank=2, alpha=2., batch=2)


def tiny_model(seed=0):
    pipe = tiny_pipeline(seed)
    return ModelScope(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, (4, 16, 16))


def bright(chance=0.):
    "Brightness, with a little chance from torch's global state, as a user's reward may have."
    return reward_from(lambda video, prompts: video.mean((1, 2, 3, 4)) * (1 + chance * torch.rand(())), 'bright')


def tiny_fit(folder, model=None, reward=None, step_fn=None, resume=False, **changes):
    kwargs = dict(step_fn=step_fn) if step_fn else {}
    return fit(model or tiny_model(), reward or bright(), PROMPTS, Config(**{**SIZE, **changes}), folder, TESTS, resume=resume, **kwargs)


if __name__ == '__main__':
    changes = json.loads(next((a for a in sys.argv[2:] if a.startswith('{')), '{}'))
    for record in tiny_fit(sys.argv[1], resume='--resume' in sys.argv, **changes): print(record['step'], record['reward'], flush=True)
