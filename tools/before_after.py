"""Draw nbs/images/before_after.gif, the first picture of the README: clips of the recorded run modelscope-aesthetic,
seed 2, before and after, from the same noise.
"""

from pathlib import Path
import torch
from vader_nb.memory.lora import load_lora, lora_off
from vader_nb.models.modelscope import load_modelscope
from vader_nb.diffusion.rollout import sample
from vader_nb.show import save_gif

nbs = Path(__file__).resolve().parent.parent / 'nbs'
prompts = ['a penguin riding a bike', 'a lion playing chess', 'an elephant washing dishes', 'a koala playing chess']
model = load_modelscope('small', 'cpu')
load_lora(model, nbs.parent / 'vader_nb/recorded/modelscope-aesthetic-small-2/lora')
after = sample(model, prompts, T=12, guidance=4.0, seed=0)
with lora_off(model):
    before = sample(model, prompts, T=12, guidance=4.0, seed=0)
large = torch.cat([before, after]).repeat_interleave(3, -1).repeat_interleave(3, -2)  # 192 pixels a frame
save_gif(large, nbs / 'images/before_after.gif', [*prompts, *['after 40 steps'] * len(prompts)])
