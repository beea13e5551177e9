"A training of a second, and a process that is killed in its midst: `python tiny_training.py FOLDER STEP`."

import os, signal, sys
import torch
from vader_nb.core import make_generator
from vader_nb.pretrain import loop
from vader_nb.pretrain.loop import pretrain


def toy():
    "A small network with dropout, which draws random numbers of its own."
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=make_generator(p.numel()))
    return net


def train(out, net=None, stop=None, steps=60, poison=lambda step: 1.0, **kw):
    "Train the toy on x -> sum(x); `stop` dies in a step as a power cut would."
    net = net or toy()

    def loss_fn(g, step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=g)
        loss = (net(x) - x.sum(1, keepdim=True)).pow(2).mean() * poison(step)
        return loss, dict(twice=2 * loss.detach())

    return pretrain(net, loss_fn, steps, out, **dict(save_every=0) | kw)


def kill_at(out, step):
    "Train with a state every few steps, and die by SIGKILL in `step`."
    clock = iter(range(10**6))
    loop.time.time = lambda: next(clock)  # a second for each look at it
    train(out, save_every=8, poison=lambda s: os.kill(os.getpid(), signal.SIGKILL) if s == step else 1.0)


if __name__ == '__main__':
    kill_at(sys.argv[1], int(sys.argv[2]))
