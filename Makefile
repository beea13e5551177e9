# Needs make and a Python from 3.10 to 3.13; everything else goes into .venv.
ok := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.10 python; do \
  $$p -c '$(ok)' >/dev/null 2>&1 && { echo $$p; break; }; done)
bin := .venv/bin
sources := settings.ini setup.py pyproject.toml
# On Linux the ordinary torch brings gigabytes of CUDA libraries. TORCH=cpu takes PyTorch's CPU build from its own index,
# TORCH=cuda the ordinary one; auto looks for an NVIDIA card. Where that index cannot be reached, the ordinary one is taken.
TORCH ?= auto
cpu_torch := --index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 15 --quiet
as_root := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

.PHONY: help demo test test-lowest lab readme hooks clean
help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: .venv/installed  ## align the small ModelScope with the aesthetic reward (1 to 2 minutes); see runs/demo/report.md
	$(bin)/vader run modelscope-aesthetic --scale small --out runs/demo --resume

test: .venv/developer  ## the export check, all notebooks and all tests
	@# Side by side: neither keeps two cores busy alone. Both must pass.
	export OMP_NUM_THREADS=1; $(bin)/pytest tests & tests=$$!; \
	  MPLBACKEND=agg $(bin)/nbdev_test --n_workers 2 --timing; notebooks=$$?; \
	  wait $$tests && exit $$notebooks

test-lowest: .venv  ## the tests with the lowest versions that settings.ini allows, in an environment of its own (6 GB)
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/python -m uv pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest tests

lab: .venv/developer  ## open the notebooks in JupyterLab, which sees runs/ too
	$(bin)/jupyter lab $(as_root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb

readme: .venv/developer  ## make the tables of contents, and README.md from nbs/index.ipynb
	$(bin)/python tools/contents.py
	$(bin)/python tools/readme.py

hooks: .venv/developer  ## keep notebooks clean in git: clean on save, merge by cell
	$(bin)/nbdev_install_hooks

clean:  ## remove the environment and what builds left behind
	rm -rf .venv .venv-lowest build dist *.egg-info

# Stamps: pip runs again only when what it installs has changed.
.venv/installed: $(sources) | .venv/torch
	$(bin)/python -m pip install --editable .
	@touch $@

.venv/developer: $(sources) | .venv/torch
	$(bin)/python -m pip install --editable '.[dev]'
	@touch .venv/installed $@

.venv/torch: | .venv
	@if [ "$(TORCH)" = cpu ] || { [ "$(TORCH)" = auto ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; }; then \
	  $(bin)/python -m pip install 'torch>=2.10,!=2.13.0' 'torchvision>=0.25' $(cpu_torch) \
	  || echo "PyTorch's CPU index cannot be used here: taking the ordinary build."; fi
	@touch $@

.venv:
	@test -n "$(PYTHON)" || { echo "vader_nb needs Python 3.10 to 3.13 with its venv module (Debian, Ubuntu: apt install python3-venv)." \
	  "Found none; name one with: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
