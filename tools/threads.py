"""Time sampling under several ways of waiting, on this machine as it is and with every core wanted by others:
python tools/threads.py

GNU OpenMP's threads spin while they wait for each other. The package sets GOMP_SPINCOUNT=1000 (a short spin) unless the
user has set something.
"""

import os, subprocess, sys
from contextlib import contextmanager
from statistics import median

WAITING = {
    'GOMP_SPINCOUNT=1000': dict(GOMP_SPINCOUNT='1000'),
    'OMP_WAIT_POLICY=PASSIVE': dict(OMP_WAIT_POLICY='PASSIVE'),
    'the runtime\'s own': dict(GOMP_SPINCOUNT='300000'),  # GNU OpenMP's default
    'one thread': dict(OMP_NUM_THREADS='1'),
}
SAMPLING = """
import time, warnings
warnings.filterwarnings('ignore')
from vader_nb import load_model, sample
model = load_model('modelscope', 'small', device='cpu')
def seconds():
    began = time.perf_counter()
    sample(model, 'a panda riding a bike', T=5, guidance=1.)
    return time.perf_counter() - began
seconds()
print(*(seconds() for _ in range(3)))
"""


@contextmanager
def others(n):
    "Inside, `n` other programs want a core each."
    programs = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
        for program in programs:
            program.wait()


def seconds(settings):
    "Median time of sampling in a Python of its own with these settings of the environment."
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMP_', 'GOMP_'))}
    out = subprocess.check_output([sys.executable, '-c', SAMPLING], env=env | settings, text=True)
    return median(map(float, out.split()))


if __name__ == '__main__':
    cores = os.cpu_count()
    print(f'{cores} cores, load {os.getloadavg()[0]:.1f}\n\n{"seconds to sample":24} as it is   {cores} others')
    for name, settings in WAITING.items():
        now = seconds(settings)
        with others(cores):
            busy = seconds(settings)
        print(f'{name:24} {now:8.2f} {busy:10.2f}', flush=True)
