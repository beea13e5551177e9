"The zoo: names, friendly errors where weights cannot be had, and the small checkpoints that the package ships."

import re
import subprocess, sys
from pkgutil import resolve_name

import pytest, torch
from diffusers import UNet2DModel
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from vader_nb.experiments.registry import EXPERIMENTS
from vader_nb.world.captions import check_vocabulary
from vader_nb.core import VaderError, read_json
from vader_nb.zoo import (
    CHECKPOINTS,
    MODELS,
    REWARDS,
    Checkpoint,
    card,
    load_model,
    load_net,
    load_reward,
    model_path,
    parameters,
)

here = [k for k, c in CHECKPOINTS.items() if c.small and (model_path('clip').parent / c.small).is_dir()]
root = model_path('clip').parent
files = sorted(root.rglob('*.safetensors'))
whole = pytest.mark.skipif(not (root / 'modelscope/unet').is_dir(), reason='the small ModelScope is not trained yet')

# Names and errors


def test_small_weights_lie_in_the_package():
    assert model_path('clip') == model_path('clip', 'small') and (model_path('vae') / 'config.json').is_file()
    assert model_path('vae') == model_path('modelscope') / 'vae'


@pytest.mark.parametrize(
    'call,says',
    [
        (lambda: model_path('dalle'), "unknown checkpoint 'dalle': use one of modelscope, vae, videocrafter"),
        (lambda: model_path('clip', 'huge'), "unknown scale 'huge': use 'small' or 'full'"),
        (lambda: model_path('vae', 'full'), "vae exists only at the small scale: use scale='small'"),
        (lambda: card('dalle'), 'unknown checkpoint'),
        (lambda: parameters('dalle'), 'unknown checkpoint'),
    ],
)
def test_bad_names(call, says):
    with pytest.raises(VaderError, match=says) as e:
        call()
    assert '\n' not in str(e.value)


def test_a_missing_folder_is_named(monkeypatch):
    monkeypatch.setitem(CHECKPOINTS, 'lost', Checkpoint('never trained', small='nowhere'))
    with pytest.raises(VaderError, match='small lost checkpoint is missing at .*nowhere: install the package again'):
        model_path('lost')
    monkeypatch.setitem(CHECKPOINTS, 'large', Checkpoint('has no small one', hub='who/what', size='9 GB'))
    with pytest.raises(VaderError, match="large exists only at the full scale: use scale='full'"):
        model_path('large')


@pytest.mark.parametrize('name', [k for k, c in CHECKPOINTS.items() if c.hub and c.small])
def test_offline_the_error_says_what_was_wanted(name, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(VaderError) as e:
        model_path(name, 'full')
    c, text = CHECKPOINTS[name], str(e.value)
    assert (
        c.hub in text
        and c.size in text
        and f"the small {name}, which comes with the package (scale='small')" in text
        and '\n' not in text
    )


def test_without_a_small_one_none_is_offered(monkeypatch):
    def nothing(*args, **kw):
        raise OSError('no network')

    monkeypatch.setattr('huggingface_hub.snapshot_download', nothing)
    monkeypatch.setitem(CHECKPOINTS, 'large', Checkpoint('has no small one', hub='who/what', size='9 GB'))
    with pytest.raises(VaderError, match=r'large needs who/what \(9 GB\).*OSError.*connect to the hub$'):
        model_path('large', 'full')


def test_full_weights_are_fetched_by_name(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        'huggingface_hub.snapshot_download',
        lambda hub, allow_patterns: asked.update(hub=hub, files=allow_patterns) or str(tmp_path),
    )
    assert model_path('modelscope', 'full') == tmp_path
    assert asked == dict(hub='ali-vilab/text-to-video-ms-1.7b', files=CHECKPOINTS['modelscope'].files.split())


def test_every_full_checkpoint_says_what_it_takes():
    for c in CHECKPOINTS.values():
        assert c.about and (not c.hub or (c.files and c.size and c.licence))
    assert not [f for c in CHECKPOINTS.values() for f in c.files.split() if f.endswith('.py')], (
        'code from a hub is never run'
    )


# What the package ships


@pytest.mark.parametrize('file', files, ids=[str(f.relative_to(root)) for f in files])
def test_small_weights_are_small_and_half_precision(file):
    assert file.stat().st_size <= (
        5.2e6 if file.parent.parent.name == 'svd' else 3.3e6
    )  # SVD's norms have 32 groups, so that no narrower network works
    for name, w in load_file(file).items():
        assert w.dtype in (torch.float16, torch.int64) or not torch.equal(w.half().float(), w), (
            f'{name} loses nothing in fp16'
        )


def test_the_zoo_fits_in_forty_megabytes():
    everything = [f for f in root.rglob('*') if f.is_file()]
    assert sum(f.stat().st_size for f in everything) < 40e6
    assert not [f for f in everything if f.suffix not in ('.json', '.md', '.safetensors', '.txt')]


@pytest.mark.parametrize('name', here)
def test_every_checkpoint_has_a_card(name):
    c, text = card(name), (model_path(name) / 'README.md').read_text(encoding='utf8')
    assert c['title'] and {'steps', 'command'} <= set(c['training']) and {'data', 'start'} & set(c['training'])
    assert all(str(v) in text for v in [c['title'], *c['training'].values(), *c['quality'].values()])


def test_parameters_are_counted():
    n, size = parameters('vae')
    (file,) = model_path('vae').glob('*.safetensors')
    assert size == file.stat().st_size and abs(size - 2 * n) < 50_000 and 0.9e6 < n < 1.1e6
    assert parameters('modelscope')[0] > n, 'a pipeline counts all its parts'


@whole
def test_a_plain_pipeline_loads_and_samples():
    from diffusers import TextToVideoSDPipeline

    pipe = TextToVideoSDPipeline.from_pretrained(model_path('modelscope'))
    assert {k: type(v).__name__ for k, v in pipe.components.items()} == dict(
        vae='AutoencoderKL',
        text_encoder='CLIPTextModel',
        tokenizer='CLIPTokenizer',
        unet='UNet3DConditionModel',
        scheduler='DDIMScheduler',
    )
    assert (
        pipe.tokenizer.model_max_length == read_json(model_path('clip') / 'tokenizer_config.json')['model_max_length']
    )
    pipe.set_progress_bar_config(disable=True)
    video = pipe.to('cpu')(
        prompt='a fox riding a bike', height=32, width=32, num_frames=2, num_inference_steps=2, output_type='pt'
    ).frames
    assert video.shape == (1, 2, 3, 32, 32) and video.isfinite().all()


# By name


@pytest.mark.parametrize('name', [m for m in MODELS if m != 'wan'])
@whole
def test_every_small_base_loads_by_its_name(name):
    from vader_nb.models.base import VideoModel

    model = load_model(name, 'small', 'cpu')
    assert isinstance(model, VideoModel)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}


@pytest.mark.parametrize('name', REWARDS)
def test_every_small_reward_loads_by_its_name(name):
    from vader_nb.rewards.base import Reward

    reward = load_reward(name, 'small', 'cpu')
    assert isinstance(reward, Reward)


def test_names_lead_to_their_own_loaders():
    for name, place in (MODELS | REWARDS).items():
        assert place.endswith(f':load_{name}') and callable(resolve_name(place))
    assert load_model('modelscope', dtype='bf16', device='cpu').denoiser.dtype == torch.bfloat16
    from vader_nb.rewards.hps import load_hps21

    assert resolve_name(REWARDS['hps21']) is load_hps21


def test_unknown_names_are_refused():
    with pytest.raises(
        VaderError, match="unknown base model 'kling': use one of modelscope, videocrafter, opensora, svd, wan"
    ):
        load_model('kling')
    with pytest.raises(VaderError, match="unknown reward 'beauty': use one of aesthetic, hps"):
        load_reward('beauty')
    with pytest.raises(VaderError, match="unknown base model 'modlscope', did you mean 'modelscope'"):
        load_model('modlscope')
    with pytest.raises(VaderError, match='wan exists only at the full scale'):
        load_model('wan')


def test_the_tables_import_nothing():
    heavy = ('vader_nb.models', 'vader_nb.rewards', 'diffusers', 'transformers')
    run = f'import sys, vader_nb.zoo as z; print([m for m in sys.modules if m.startswith({heavy})])'
    assert subprocess.check_output([sys.executable, '-c', run], text=True).strip() == '[]'


def test_a_new_base_needs_one_line(tmp_path, monkeypatch):
    (tmp_path / 'my_base.py').write_text("def load_mine(scale, device, **options): return scale, device, options")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODELS, 'mine', 'my_base:load_mine')
    assert load_model('mine', 'full', 'cpu', dtype='bf16') == ('full', 'cpu', dict(dtype='bf16'))


# Reading weights


def tiny_unet():
    config = UNet2DModel(
        4,
        3,
        3,
        block_out_channels=(8, 8),
        down_block_types=('DownBlock2D',) * 2,
        up_block_types=('UpBlock2D',) * 2,
        norm_num_groups=4,
    )
    return config.eval()


def tiny_clip():
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
    ).eval()


@pytest.mark.parametrize('make', [tiny_unet, tiny_clip])
@pytest.mark.parametrize(
    'how', [{}, dict(variant='fp16'), dict(max_shard_size='20KB'), dict(variant='fp16', max_shard_size='20KB')]
)
def test_whole_and_sharded_files_marked_fp16_or_not(make, how, tmp_path):
    net = make()
    net.save_pretrained(tmp_path, **how)
    assert (len(list(tmp_path.glob('*.safetensors'))) > 1) == ('max_shard_size' in how)
    again = load_net(type(net), tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_a_missing_shard_is_named(tmp_path):
    tiny_unet().save_pretrained(tmp_path, variant='fp16', max_shard_size='20KB')
    next(tmp_path.glob('*00002-of*')).unlink()
    with pytest.raises(VaderError, match='no usable UNet2DModel in') as e:
        load_net(UNet2DModel, tmp_path)
    assert '\n' not in str(e.value)


# Words that a small model does not know


@pytest.mark.parametrize('name', ['modelscope', 'videocrafter', 'opensora', 'svd'])
def test_a_small_model_draws_nothing_else_for_an_unknown_word(name):
    model = load_model(name, 'small', 'cpu')
    for prompt, word in [
        ('a pandda riding a bike', "'pandda'.*'panda'"),
        ('a zebra playing chess', 'zebra'),
        ('two pandas', "'two'"),
        ('a panda riding a horse', 'horse'),
    ]:
        with pytest.raises(VaderError, match=word) as e:
            model.encode(['a panda riding a bike', prompt])
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', sorted(EXPERIMENTS))
def test_the_small_models_know_the_words_of_the_experiments(name):
    for prompts in EXPERIMENTS[name].prompts('small'):
        check_vocabulary([re.sub(r' \(\d+\)$', '', p) for p in prompts])
